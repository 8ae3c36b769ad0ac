"""Scorers: streaming, formulas on hand-made clips, metrics without weights, the Frechet distance."""

import itertools
import math

import numpy as np
import pytest
import torch
from worlds import assert_close, blank, call_text, curves_of, digest, levels, noise, pan, shifted, texture

import data
import metrics
import toy
from common import UserError, rng


def free(video, *names, stride=1, **options):
    scorers, missing = metrics.open_scorers(names, stride=stride, **options)
    assert not missing
    curves = {}
    for scorer in scorers:
        curves |= curves_of(scorer, video)
    assert set(curves) == set(names)
    return curves


# ----------------------------------------------------------------------------------------------------
# streaming

@pytest.mark.parametrize("stride", [1, 2, 4])
def test_pieces_change_nothing_in_the_weight_free(stride):
    video = pan(11, height=32, width=48)
    names = [*metrics.FREE, *metrics.OPTIONAL]
    whole = free(video, *names, stride=stride, batch=3)
    for pieces in (1, 2, 5):
        for scorer in metrics.open_scorers(names, stride=stride, batch=3)[0]:
            for name, curve in curves_of(scorer, video, pieces).items():
                assert np.array_equal(curve.value, whole[name].value), name
                assert np.array_equal(curve.frame, whole[name].frame), name
    assert whole["contrast"].frame.tolist() == list(range(0, 11, stride))
    assert whole["motion"].frame.tolist() == list(range(1, 11, stride))
    assert whole["flicker"].frame.tolist() == list(range(1, 10, stride))
    thin = free(video, *names, stride=1)  # a stride leaves values out and changes none
    for name in names:
        at = np.isin(thin[name].frame, whole[name].frame)
        np.testing.assert_allclose(thin[name].value[at], whole[name].value, rtol=1e-5)


def test_a_scorer_takes_one_video_after_another_and_its_own_copy():
    video, other = pan(6, height=32, width=32), pan(5, 0.0, 32, 32)
    [scorer], _ = metrics.open_scorers(["motion"], stride=1)
    first, second = (curves_of(scorer, clip)["motion"] for clip in (video, other))
    assert first.total > 1 and second.total == 0 and len(second.value) == 4
    scorer.start(16)
    buffer = torch.empty_like(video[:1])
    for frame in video:  # a decoder may reuse its buffer
        scorer.add(buffer.copy_(frame[None]))
    assert np.array_equal(scorer.finish()["motion"].value, first.value)


def test_memory_is_that_of_a_batch():
    [scorer], _ = metrics.open_scorers(["flicker"], stride=4, batch=5)
    scorer.start(16)
    frames = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    for _ in range(50):
        scorer.add(frames)
        kept = [*itertools.chain(*scorer.ready), *scorer.held.values()]
        assert len(kept) <= 5 * 3 + 3  # and none of them a view of its piece
        assert all(frame.untyped_storage().nbytes() == 3 * 32 * 32 for frame in kept)


@pytest.mark.slow
def test_memory_stays_flat_over_801_frames():
    printed = call_text("""
        import resource, torch, metrics
        torch.set_num_threads(1)
        scorers, _ = metrics.open_scorers([*metrics.FREE, *metrics.OPTIONAL])
        for scorer in scorers:
            scorer.start(16)
        for piece in range(100):
            frames = torch.randint(0, 256, (8, 3, 480, 832), dtype=torch.uint8)
            for scorer in scorers:
                scorer.add(frames)
            if piece in (19, 99):
                print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        """)
    early, late = map(int, printed.split())
    assert late - early < 50, f"{early} MB after 160 frames, {late} MB after 800"


def test_videos_that_end_too_soon_are_refused():
    [scorer], _ = metrics.open_scorers(["motion"])
    scorer.start(16, 81)
    scorer.add(pan(80, height=16, width=16))
    with pytest.raises(UserError, match="after 80 of 81 frames"):
        scorer.finish()


def test_unknown_names_and_folders():
    with pytest.raises(UserError, match="no metric is called 'sharpness'; there are saturation, "):
        metrics.open_scorers(["motion", "sharpness"])
    with pytest.raises(UserError, match="no such folder of weights: nowhere"):
        metrics.open_scorers(["motion"], weights="nowhere")


# ----------------------------------------------------------------------------------------------------
# curves of VBench's dimensions

def stub(curve, window, values, names=("x",)):
    """A scorer whose n-th window gets the n-th of these values."""
    left = iter(values)
    return metrics.Scorer(names, lambda *frames: {"x": torch.stack([next(left) for _ in frames[0]])},
                          curve, window, "cpu", 4)


def test_consistency_of_known_cosines():
    angles = torch.tensor([0.0, 30.0, 90.0, 200.0]).deg2rad()
    features = torch.stack((angles.cos(), angles.sin()), 1) * torch.tensor([[1.0], [7.0], [0.1], [3.0]])
    curve = curves_of(stub(metrics.consistency_curve, metrics.singles, features), blank(4))["x"]
    cos30, cos60 = math.cos(math.radians(30)), math.cos(math.radians(60))
    expected = [cos30, cos60 / 2, 0]  # negative cosines count as 0
    np.testing.assert_allclose(curve.value, expected, atol=1e-6)
    assert curve.frame.tolist() == [1, 2, 3] and curve.total == pytest.approx(sum(expected) / 3)


@pytest.mark.parametrize(("frames", "fps", "height", "width", "step", "sampled", "threshold", "needed"), [
    (801, 16, 480, 832, 2, 401, 11.25, 100), (81, 16, 480, 832, 2, 41, 11.25, 10),
    (81, 24, 480, 832, 3, 27, 11.25, 7), (81, 30, 480, 832, 4, 21, 11.25, 5),
    (81, 8, 256, 448, 1, 81, 6.0, 20), (81, 16, 720, 1280, 2, 41, 16.875, 10),
    (11, 8, 256, 448, 1, 11, 6.0, 3), (10, 8, 448, 256, 1, 10, 6.0, 2),
    (18, 20, 256, 448, 2, 9, 6.0, 2), (3, 16, 256, 448, 2, 2, 6.0, 0), (9, 29.97, 256, 256, 4, 3, 6.0, 1)])
def test_dynamic_degree_counts_as_vbench(frames, fps, height, width, step, sampled, threshold, needed):
    def total(moving):
        # at the threshold is not above it
        at = [threshold * 1.0001] * moving + [threshold] * (sampled - 1 - moving)
        scorer = stub(metrics.dynamic_curve, metrics.eighths, torch.tensor(at, dtype=torch.float64))
        scorer.start(fps)
        scorer.add(blank(frames))
        scorer.size = height, width
        curve = scorer.finish()["x"]
        assert curve.frame.tolist() == list(range(step, frames, step)) and len(curve.frame) == sampled - 1
        return curve.total

    assert total(needed) == 1.0
    if needed:
        assert total(needed - 1) == 0.0


# ----------------------------------------------------------------------------------------------------
# metrics without weights

def one(rgb, height=32, width=32):
    return torch.tensor(rgb, dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, height, width).clone()


def test_colours_of_plain_frames():
    names = [*metrics.FREE, *metrics.OPTIONAL]
    for rgb, expected in (((255, 0, 0), {"saturation": 1, "clipped": 1, "brightness": 0.299}),
                          ((200, 100, 50), {"saturation": 0.75, "clipped": 0, "brightness": 124.2 / 255}),
                          ((0, 0, 0), {"saturation": 0, "clipped": 1, "brightness": 0, "colourfulness": 0}),
                          ((128, 128, 128), {"saturation": 0, "clipped": 0, "colourfulness": 0}),
                          ((3, 3, 252), {"clipped": 0}), ((2, 100, 252), {"clipped": 1}),
                          ((3, 100, 253), {"clipped": 1})):
        curves = free(torch.cat((one(rgb), one(rgb))), *names)
        for name, value in expected.items():
            assert curves[name].total == pytest.approx(value, abs=1e-6), (rgb, name)
        for name in ("contrast", "detail", "speed", "motion", "local_contrast", "flicker"):
            assert curves[name].total == pytest.approx(0, abs=1e-4), (rgb, name)  # and not 0/0


def test_free_metrics_against_numpy():
    frame = (noise(1, 3, 48, 36) * 50 + 120).clamp(0, 255).to(torch.uint8)
    r, g, b = frame[0].double().numpy()
    y = 0.299 * r + 0.587 * g + 0.114 * b
    rg, yb = r - g, (r + g) / 2 - b
    colours = np.stack((r, g, b))
    lap = sum(np.roll(y, s, axis) for s in (1, -1) for axis in (0, 1))[1:-1, 1:-1] - 4 * y[1:-1, 1:-1]
    blocks = [y[i:i + 16, j:j + 16].std() for i in (0, 16, 32) for j in (0, 16)]  # 4 columns are left
    expected = {
        "saturation": (colours.max(0) - colours.min(0)).sum() / colours.max(0).sum(),
        "colourfulness": np.sqrt(rg.var() + yb.var()) + 0.3 * np.hypot(rg.mean(), yb.mean()),
        "clipped": ((colours.max(0) >= 253) | (colours.min(0) <= 2)).mean(),
        "contrast": y.std() / 255, "local_contrast": np.mean(blocks) / 255,
        "detail": lap.var() / y.var(), "brightness": y.mean() / 255}
    curves = free(frame, *expected)
    for name, value in expected.items():
        assert curves[name].value[0] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize(("slope_y", "slope_x"), [(0, 1), (3, 0), (1, 1)])
def test_speed_and_motion_of_a_ramp(slope_y, slope_x):
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    ramp = (slope_y * y + slope_x * x).expand(1, 3, 64, 64)
    video = torch.cat([ramp + 6 * t for t in range(4)]).to(torch.uint8)
    curves = free(video, "speed", "motion", "flicker")
    assert curves["speed"].total == pytest.approx(6 / math.hypot(slope_y, slope_x), rel=1e-5)
    assert curves["motion"].total == pytest.approx(6, rel=1e-5)
    assert curves["flicker"].total == pytest.approx(0, abs=1e-5)


def test_flicker_of_steady_motion_and_of_flashes():
    flash = torch.cat([one((100 + 20 * (t % 2),) * 3)[:1] for t in range(9)])
    assert free(flash, "flicker")["flicker"].total == pytest.approx(2)
    held = torch.cat([one((100,) * 3)[:1]] * 6 + [one((120,) * 3)[:1]] * 3)
    assert free(held, "flicker")["flicker"].total == 0  # the median: one cut is no flicker


def blurred(image, sigma):
    y, x = torch.fft.fftfreq(image.shape[-2])[:, None], torch.fft.rfftfreq(image.shape[-1])
    kernel = torch.exp(-2 * (math.pi * sigma) ** 2 * (x**2 + y**2))
    return torch.fft.irfft2(torch.fft.rfft2(image) * kernel, s=image.shape[-2:])


def drifting(defect, frames=40):
    image = texture(128, 160)
    grey = (image * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0)
    video = []
    x = 0.0
    for t in range(frames):
        bad = t / (frames - 1)
        x += 1.5 * (1 - bad if defect == "freeze" else 1)
        frame = image
        if defect in ("saturate", "fade"):
            frame = grey + (image - grey) * (1 + bad if defect == "saturate" else 1 - bad / 2)
        if defect == "blur":
            frame = blurred(image, 2 * bad)
        if defect == "flatten":
            frame = 0.5 + (image - 0.5) * (1 - bad / 2)
        frame = shifted(frame, x)
        if defect == "grain":
            frame = frame + 0.05 * bad * torch.randn(frame.shape, generator=rng("grain", t))
        if defect == "darken":
            frame = frame - 0.2 * bad
        video.append(frame)
    return levels(torch.stack(video))


SAME, LESS, MORE = (0.95, 1.05), (0.3, 0.8), (1.3, 3)
EXPECTED = {  # last fifth over first fifth
    "nothing": {},
    "saturate": {"saturation": MORE, "colourfulness": MORE},
    "fade": {"saturation": LESS, "colourfulness": LESS},
    "blur": {"detail": (0, 0.2), "contrast": (0.7, 1), "speed": (0.6, 1.02), "motion": (0.6, 1),
             "saturation": (0.8, 1), "colourfulness": (0.8, 1)},
    "flatten": {"contrast": LESS, "motion": LESS, "saturation": LESS, "colourfulness": LESS},
    "freeze": {"speed": (0, 0.3), "motion": (0, 0.3)},
    "grain": {"detail": (1.1, 9), "speed": (1, 1.2), "motion": (1, 1.2), "contrast": (1, 1.1),
              "saturation": (1, 1.4), "colourfulness": (1, 1.4)},
    "darken": {"brightness": LESS, "saturation": MORE},
}


@pytest.mark.parametrize("defect", EXPECTED)
def test_each_defect_moves_its_own_metrics(defect):
    for name, curve in free(drifting(defect), *metrics.FREE).items():
        if name == "clipped":  # next to nothing in these scenes; see the plain frames
            continue
        fifth = len(curve.value) // 5
        ratio = curve.value[-fifth:].mean() / curve.value[:fifth].mean()
        low, high = EXPECTED[defect].get(name, SAME)
        assert low <= ratio <= high, f"{name} x{ratio:.3f}"


# Frechet

def test_frechet_of_known_gaussians():
    """Samples with exact moments: shifts and scales along the axes of the reference have known distances."""
    x = noise(500, 40).double()
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T  # mean 0, covariance 1 to the last digit
    spread = torch.linspace(10, 1, 40).double()
    shift, scale = torch.zeros(40).double(), torch.ones(40).double()
    assert metrics.frechet_distance(x * spread + 3, x * spread + 3) == pytest.approx(0, abs=1e-9)
    shift[0], shift[5], shift[39] = 2, 1, 7  # in deviations; the last is not among the 32 widest axes
    scale[1], scale[38] = 3, 9
    distance = metrics.frechet_distance(x * spread, (x * scale + shift) * spread)
    assert distance == pytest.approx(2**2 + 1**2 + (3 - 1) ** 2)


def test_frechet_equals_the_general_formula():
    a = noise(300, 32).double() @ noise(32, 32).double()
    b = noise(200, 32).double() @ noise(32, 32).double().T + 1
    values, axes = torch.linalg.eigh(a.T.cov())
    a_, b_ = ((x - a.mean(0)) @ axes / values.sqrt() for x in (a, b))
    ca, cb = np.cov(a_.T.numpy()), np.cov(b_.T.numpy())
    product = np.linalg.eigvals(ca @ cb)  # the trace of a root of A B
    gap = (a_.mean(0) - b_.mean(0)).square().sum().item()
    general = gap + np.trace(ca + cb) - 2 * np.sqrt(product).real.sum()
    assert metrics.frechet_distance(a, b) == pytest.approx(general, rel=1e-6)


def test_frechet_features_see_drift():
    textures = [texture(64, 64 + 4 * i)[..., :64] for i in range(10)]
    clean = [torch.stack([levels(shifted(image, 3.7 * j + 0.8 * k)) for image in textures for j in range(5)])
             for k in range(4)]
    features = metrics.frechet_features(*clean)
    assert features.shape == (50, 672) and (features >= 0).all()
    assert_close(metrics.frechet_features(*(frame[[17, 20]] for frame in clean)), features[[17, 20]], 1e-5)
    # the same filters for ever, so that reports can be compared
    assert digest(features[:1]) == pytest.approx(
        [0.0448873, 0.0158055, 0.0341482, 0.0572155, 0.03609, 0.0509558, 0.0724722, 0.0447171], rel=1e-4)
    even, odd = features[0::2], features[1::2]
    grey = [frame.float().mean(1, keepdim=True) for frame in clean]
    strong = [(2 * frame.float() - mean).clamp(0, 255).to(torch.uint8)[1::2]
              for frame, mean in zip(clean, grey, strict=True)]
    axes = 8  # more would need more windows than these
    same = metrics.frechet_distance(even, odd, axes)
    assert metrics.frechet_distance(even, metrics.frechet_features(*strong), axes) > 3 * same


def windows(name, count, order=(0, 4, 8, 12), **changes):
    """Features of windows of the toy's worlds: every eighth frame is the first of one."""
    rows = []
    for i in range(count):
        video = data.to_uint8(toy.render(toy.draw_world(name, i)._replace(**changes), 81))
        rows.append(metrics.frechet_features(*(video[offset:offset + 69:8] for offset in order)))
    return torch.cat(rows)


def test_frechet_windows_see_motion():
    """A still picture is far from the truth, and so are frames in another order. Worlds played backwards are
    worlds that move the other way, so that only those of one direction tell forwards from backwards."""
    real = windows("real", 100)
    distance = {name: metrics.frechet_distance(real, windows("others", 40, order)) for name, order in {
        "truth": (0, 4, 8, 12), "still": (0, 0, 0, 0), "slow": (0, 2, 4, 6), "shuffled": (8, 0, 12, 4),
        "backwards": (12, 8, 4, 0)}.items()}
    left = windows("real", 100, direction="left")
    for name, order in {"forwards": (0, 4, 8, 12), "backwards": (12, 8, 4, 0)}.items():
        others = windows("others", 40, order, direction="left")
        distance[f"left {name}"] = metrics.frechet_distance(left, others)
    print(distance)
    assert distance["truth"] < 9 and distance["still"] > 3 * distance["truth"]
    assert distance["slow"] > 1.4 * distance["truth"] and distance["shuffled"] > 2.5 * distance["truth"]
    assert distance["backwards"] == pytest.approx(distance["truth"], rel=0.1)
    assert distance["left backwards"] > 1.1 * distance["left forwards"]


def test_frechet_windows_span_three_quarters_of_a_second():
    assert metrics.quarters(16) == (0, 4, 8, 12) and metrics.quarters(30) == (0, 8, 16, 24)
    assert metrics.quarters(2) == (0, 1, 2, 3)
    video = pan(40, height=32, width=32)
    for stride, pieces in ((4, None), (3, 7)):
        rows = curves_of(metrics.frechet_scorer(stride=stride), video, pieces)["frechet"]
        firsts = torch.arange(0, 28, stride)
        expected = metrics.frechet_features(*(video[firsts + offset] for offset in (0, 4, 8, 12)))
        assert_close(rows, expected, 1e-6)
    with pytest.raises(UserError, match="frechet needs at least 13 frames, not 12"):
        curves_of(metrics.frechet_scorer(), video[:12])


def test_frechet_refuses_what_it_cannot_measure():
    with pytest.raises(UserError, match="more than 32 reference windows and as many others, not 32 and 40"):
        metrics.frechet_distance(noise(32, 336), noise(40, 336))
    with pytest.raises(UserError, match="more varied reference windows than these 40"):
        metrics.frechet_distance(noise(4, 336).repeat(10, 1), noise(40, 336))
