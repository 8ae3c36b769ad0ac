"""The toy world read back: what was drawn, what was lost, and how far a video is from the exact truth."""

import math

import numpy as np
import pytest
import torch
from worlds import read_video

import data
import readings
import toy

# ----------------------------------------------------------------------------------------------------
# what a frame shows

def read_back(video, prompt):
    return {k: v.numpy() for k, v in readings.judge(readings.fit(data.to_uint8(video)), prompt).items()}


def without_sprite(world, frames):
    return toy.render(world._replace(shape="disc", radius=-toy.SIZE), frames)


def soften(video, sigma):
    f = torch.fft.fftfreq(toy.SIZE).square().view(-1, 1) + torch.fft.rfftfreq(toy.SIZE).square()
    return torch.fft.irfft2(torch.fft.rfft2(video) * torch.exp(-2 * (math.pi * sigma) ** 2 * f)).clamp(-1, 1)


@pytest.mark.parametrize("sigma,shapes,off", [(0, 0.99, 1), (2, 0.8, 2)])
def test_what_was_drawn_is_read_back(sigma, shapes, off):
    """Blurred by 2 pixels a video is at 28 dB."""
    right_shape, near, right_direction, colours = [], [], [], []
    for i in range(10):
        world = toy.draw_world("truth", i)
        video = toy.render(world, readings.LAG + 9)
        reading = readings.fit(data.to_uint8(soften(video, sigma) if sigma else video))
        t = torch.arange(len(video))
        step = torch.tensor(toy.DIRECTIONS[world.direction]) * world.speed
        error = (reading["place"] - world.place - step * t.view(-1, 1) + 16) % 32 - 16
        judged = readings.judge(reading, toy.caption(world))
        right_shape.append((reading["shape"] == toy.SHAPES.index(world.shape)).float().mean())
        near.append((error.norm(dim=1) < off).float().mean())
        right_direction.append(judged["direction"][readings.LAG:].mean())
        colours.append((reading["colour"] - world.colour).abs().mean() * 127.5)
        assert judged["direction"][:readings.LAG].isnan().all() and judged["sprite"].mean() > 0.9
    assert torch.stack(right_shape).mean() >= shapes and torch.stack(near).mean() >= 0.97
    assert torch.stack(right_direction).mean() >= 0.97 and (sigma or max(colours) < 6)


def test_a_lost_sprite_is_missed():
    for i in range(5):
        world = toy.draw_world("lost", i)
        frames = 20 + readings.LAG
        video = toy.render(world, frames)
        video[20:] = without_sprite(world, frames)[20:]
        for noise in (0, 0.05):
            seen = read_back((video + noise * torch.randn(video.shape)).clamp(-1, 1), toy.caption(world))
            assert seen["sprite"][:20].mean() > 0.9 and seen["sprite"][20:].mean() < 0.1
            assert np.isnan(seen["colour"][20:]).mean() > 0.9 and seen["direction"][readings.LAG:].mean() == 0


def test_another_shape_or_way_is_not_what_was_told():
    world = toy.draw_world("told", 0)._replace(shape="disc", direction="left", speed=0.2)
    video = toy.render(world, 73)
    video[21:] = toy.render(world._replace(shape="triangle"), 73)[21:]
    seen = read_back(video, "A disc moving left")
    assert seen["shape"][:21].mean() == 1 and seen["shape"][21:].mean() < 0.1 and seen["sprite"].mean() == 1
    for prompt, share in (("A disc moving left", 1), ("A disc moving up", 0), ("A disc moving right.", 0),
                          ("A reversed video of a disc moving right", 1)):
        assert read_back(video, prompt)["direction"][readings.LAG:].mean() == share, prompt
    for speed in (0.0, 0.01):  # places are whole pixels: a step of one may be none
        still = read_back(toy.render(world._replace(speed=speed), 2 * readings.LAG), "A disc moving left")
        assert still["direction"][readings.LAG:].mean() == 0
    whole = read_back(video, "A disc moving left")
    sparse = readings.judge(readings.fit(data.to_uint8(video[::4])), "A disc moving left", stride=4)
    sparse = {k: v.numpy() for k, v in sparse.items()}
    for name in ("sprite", "shape", "direction"):  # every fourth frame tells the same
        assert np.array_equal(sparse[name], whole[name][::4], equal_nan=True), name
    assert sparse["background"] == pytest.approx(whole["background"][::4], abs=0.3)
    untold = read_back(video, "A cat")
    assert np.isnan(untold["shape"]).all() and np.isnan(untold["direction"]).all()


def test_background_and_colour_that_walk_away_are_measured():
    world = toy.draw_world("walk", 1)._replace(base=torch.tensor([-0.2, 0.1, 0.0]))
    frames = [toy.render(world._replace(base=world.base + 0.004 * i * torch.tensor([1.0, -1.0, 0.5]),
                                        colour=world.colour * (1 - i / 160)), 1, start=i) for i in range(80)]
    seen = read_back(torch.cat(frames), toy.caption(world))
    walked = 127.5 * 0.004 * (np.arange(80) - 4) * 2.5 / 3
    assert seen["background"][20:] == pytest.approx(walked[20:], abs=1.2)
    faded = 127.5 * world.colour.abs().mean().item() * (np.arange(80) - 4) / 160
    assert seen["colour"][20:] == pytest.approx(faded[20:], abs=4)


# ----------------------------------------------------------------------------------------------------
# judged by the truth

def truth_for(world, reading, given=9, first=0):
    origin = readings.Origin("any", 0, first, given)
    return readings.truth_of(origin, reading)._replace(world=world)


def validate(tmp_path, seconds, videos, stride=4):
    """The truth at speeds from 0.15 to 0.35, through the VAE and then as sample.py writes it: for each of the
    two the judged frames of all videos, one after another, and whether a video survived."""
    frames = round(seconds * toy.FPS) // 12 * 12 - 3
    judged = {"vae": [], "h264": []}
    for i in range(videos):
        world = toy.draw_world("validate", i)._replace(speed=0.15 + 0.2 * i / (videos - 1))
        video = toy.render(world, frames)[None]
        seen = data.to_uint8(readings.coder().decode(readings.coder().encode(video))[0])
        data.write_video(tmp_path / "v.mp4", [data.to_uint8(video[0, :9]), seen[9:]], toy.FPS)
        for kind, shown in (("vae", seen), ("h264", read_video(tmp_path / "v.mp4"))):
            reading = readings.fit(shown[::stride])
            row = readings.judge(reading, toy.caption(world), stride, truth_for(world, reading))
            row["whole"] = torch.tensor([readings.survival(row["right"], seconds, stride) == seconds])
            judged[kind].append(row)
    return {kind: {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
            for kind, rows in judged.items()}


def assert_read_right(judged):
    for kind, row in judged.items():
        way = row["direction"][~row["direction"].isnan()]
        shares = {"near": row["place"] < 3, "shape": row["shape"], "colour": row["colour"] <= 15,
                  "direction": way, "sprite": row["sprite"], "survival": row["whole"]}
        shares = {name: share.float().mean().item() for name, share in shares.items()}
        median = row["place"].nanmedian().item()
        print(kind, f"median {median:.2f} px", shares)
        assert median < 0.7 and shares["near"] >= 0.99 and shares["shape"] >= 0.99
        assert shares["colour"] >= 0.99 and shares["direction"] >= 0.98 and shares["survival"] >= 0.95


def test_the_truth_is_read_right(tmp_path):
    assert_read_right(validate(tmp_path, 8, 9))


@pytest.mark.slow
@pytest.mark.parametrize("seconds,videos,stride", [(8, 12, 1), (8, 40, 4), (24, 40, 4), (50, 24, 4)])
def test_the_truth_is_read_right_for_long(tmp_path, seconds, videos, stride):
    assert_read_right(validate(tmp_path, seconds, videos, stride))


def made_up(places, shape=0, colour=0.0, seen=True) -> dict:
    """A reading of frames with the sprite at these places."""
    count = len(places)
    full = torch.full((count,), 0.9 if seen else 0.0)
    return {"explained": full, "contrast": full, "shape": torch.full((count,), shape), "place": places,
            "colour": torch.full((count, 3), colour), "background": torch.zeros(count, 3, 8, 8)}


def straight(world, frames, first=0):
    step = world.speed * torch.tensor(toy.DIRECTIONS[world.direction])
    return (world.place + step * torch.arange(first, first + frames).unsqueeze(1)) % toy.SIZE


def test_places_are_from_the_truth_around_the_edges():
    world = toy.draw_world("track", 0)._replace(shape="disc", direction="left", speed=0.25,
                                                place=torch.tensor([3.0, 31.0]))
    track = straight(world, 161)
    assert track.min() < 1 and track[:, 0].max() > 31, "it comes back at the other edge"
    truth = truth_for(world, made_up(track))
    for shift in (0, 0.7, 5.0):  # how a reading defines the place does not matter
        judged = readings.judge(made_up((track + shift) % toy.SIZE), "A disc moving left", truth=truth)
        assert judged["place"].max() < 1e-4 and judged["right"].all()
        assert judged["direction"][readings.LAG:].all()
    still = made_up(torch.cat([track[:9], track[8:9].expand(152, 2)]))
    judged = readings.judge(still, "A disc moving left", truth=truth)
    away = 0.25 * (torch.arange(161) - 8).clamp(min=0)
    away = torch.minimum(away % 32, 32 - away % 32)
    assert torch.allclose(judged["place"], away, atol=1e-4), "at most half the picture away"
    assert torch.equal(judged["right"] == 1, away <= 3) and not judged["direction"][readings.LAG + 9:].any()
    assert readings.survival(judged["right"], 161 / 16) == pytest.approx((8 + 13) / 16), "3.25 px: wrong"
    later = truth_for(world, made_up(track), given=45, first=36)
    judged = readings.judge(made_up(straight(world, 81, first=36)), "A disc moving left", truth=later)
    assert judged["place"].max() < 1e-4, "a video that begins at frame 36 of its world"


def test_right_means_place_shape_and_colour():
    world = toy.draw_world("track", 0)._replace(shape="disc", direction="up")
    track = straight(world, 20)
    truth = truth_for(world, made_up(track))
    for change, is_right in ((dict(), 1), (dict(shape=1), 0), (dict(colour=14.9 / 127.5), 1),
                             (dict(colour=15.1 / 127.5), 0), (dict(seen=False), 0)):
        judged = readings.judge(made_up(track, **change), "A disc moving up", truth=truth)
        assert judged["right"].unique().tolist() == [is_right], change
        assert judged["shape"].unique().tolist() == [change.get("shape", 0) == 0 and change.get("seen", True)]
        assert judged["place"].isnan().all() == (change == dict(seen=False))
    unknown = readings.judge(made_up(track, colour=0.5), "A disc moving up")
    assert not unknown.keys() & {"place", "right"} and unknown["colour"].max() == 0, "from its first chunk's"
    by_truth = readings.judge(made_up(track, colour=0.5), "A cat", truth=truth)
    assert by_truth["colour"].min() > 60 and by_truth["shape"].all(), "whatever the prompt says"


@pytest.mark.parametrize("stride,right,seconds", [
    (1, "1" * 40, 2.5), (1, "1" * 10 + "0" * 7 + "1" * 23, 2.5), (1, "1" * 10 + "0" * 8 + "1" * 22, 10 / 16),
    (1, "0" * 40, 0), (1, "1" * 33 + "0" * 7, 2.5), (1, "1" * 32 + "0" * 8, 2),
    (1, "1" * 5 + "0" * 7 + "1" + "0" * 8 + "1" * 19, 13 / 16),
    (4, "1111111111", 2.5), (4, "1110111111", 2.5), (4, "1110011111", 12 / 16), (4, "1101011100", 2),
    (4, "0", 2.5), (2, "1" * 6 + "0" * 3 + "1" * 11, 2.5), (2, "1" * 6 + "0" * 4 + "1" * 10, 12 / 16)])
def test_survival_ends_where_half_a_second_is_wrong(stride, right, seconds):
    assert readings.survival(torch.tensor([float(c) for c in right]), 2.5, stride) == seconds


def test_where_a_video_begins(tmp_path):
    world = toy.draw_world("held out", 5)
    for frames in (9, 20, 81):
        data.write_video(tmp_path / f"{frames}.mp4", [toy.render(world, frames)], 16, {"world": world.name})
    data.write_video(tmp_path / "other.mp4", [toy.render(world, 9)], 16, {"prompt": "a cat"})

    def of(name, **tags):
        return readings.origin_of({"extend": str(tmp_path / name)} | tags)

    assert readings.origin_of({"world": ["held out", 5]}) == ("held out", 5, 0, 9)
    assert of("9.mp4", context=12) == ("held out", 5, 0, 9)
    assert of("20.mp4", context=12) == ("held out", 5, 20 - 9, 9)
    assert of("81.mp4", context=12) == ("held out", 5, 36, 45) and of("81.mp4", context=3)[2:] == (72, 9)
    assert of("9.mp4", context=12, world=[0, 1]) == ("held out", 5, 0, 9)
    assert None is of("gone.mp4") is of("other.mp4") is readings.origin_of({})
    assert None is readings.origin_of({"world": 7}) is readings.origin_of({"world": [[0], 1]})


def test_psnr_of_known_errors():
    frames = torch.full((2, 3, 32, 32), 100, dtype=torch.uint8)
    off = frames.clone()
    off[1] += 10
    assert readings.psnr(off, frames).tolist() == pytest.approx([58.92, 28.13], abs=0.01)
