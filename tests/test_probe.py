"""Probes: an exact model shows no bias, recovery is counted, clips are unseen, contexts are spoilt."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from worlds import run_stage, tiny_model

import common
import data
import diffusion
import eval_drift
import flags
import model
import probe
import toy
import vae
from common import UserError


def settings(folder, **changes):
    return probe.Settings(str(folder), None, None, 16, 20, 6.0, 8.0)._replace(**changes)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A clip store of 2 clips, the tiny VAE that made them, and a model that has learned nothing."""
    root = tmp_path_factory.mktemp("world")
    (root / "wan").mkdir()
    coder = vae.WanVAE(8, (1, 1, 1, 1), 1)
    vae.save(coder, root / "wan" / "vae.safetensors")
    for i in range(2):
        video = toy.render(toy.draw_world(0, i), 81)[None]
        data.write_clip(root / "agg_0", str(i), coder.encode(video)[0], torch.ones(4, 64), "a disc", "a.mp4")
    data.write_index(root / "agg_0", [{"id": str(i), "file": f"clips/{i}.safetensors", "kind": "seed"}
                                      for i in range(2)])
    common.claim(Path(root / "agg_0", "meta.json"), {
        "latents": [21, 16, 4, 4], "wan": str(root / "wan"), "vae": data.fingerprint(root / "wan", "vae")})
    data.write_text_embedding(root / "agg_0" / "empty.safetensors", torch.zeros(1, 64))
    model.save(tiny_model("eval"), root / "model")
    return root


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Runs eval_drift.main on a video in tmp_path, and returns the probes' results."""
    monkeypatch.chdir(tmp_path)
    Path("videos").mkdir()
    data.write_video(Path("videos/0.mp4"), [toy.render(toy.draw_world("eval", 0), 41)], 16)

    def run(**flags):
        run_stage(eval_drift, eval_drift.Config(("videos",), **flags))
        return json.loads(Path("report/summary.json").read_text())["probes"]
    return run


def test_probes(world, evaluate, monkeypatch):
    flags = dict(model=(str(world / "model"),), data=str(world / "agg_0"), steps=1, guidance=1.0)
    results = evaluate(**flags)
    [row] = results.values()
    assert row["clips"] == 2 and row["own_minus_real"].keys() == {"first", "last"}
    assert all(len(gap["mean"]) == 5 and gap["mean"] != [0] * 5 for gap in row["own_minus_real"].values())
    assert row["recovery"].keys() == probe.SPOILT.keys()
    assert all(1 <= kind["chunks"] <= 10 and len(kind["within"]) == 9 for kind in row["recovery"].values())
    with monkeypatch.context() as patch:
        patch.setattr(probe, "probe_model", lambda *args: pytest.fail("probed again"))
        assert evaluate(**flags) == results
    table = Path("report/table.md").read_text()
    assert "### Loss on own minus real videos" in table and "### Recovery" in table
    with pytest.raises(UserError, match="clips of at least 15 latent"):
        Path("short").mkdir()
        Path("short/index.jsonl").write_text((world / "agg_0/index.jsonl").read_text())
        common.claim(Path("short", "meta.json"), {"latents": [12, 16, 4, 4]})
        evaluate(**flags | {"data": "short"})


def test_probes_take_clips_that_no_training_saw(tmp_path):
    kinds = ["seed"] * 40 + ["corrective"] * 9
    (tmp_path / "agg_1").mkdir()
    data.write_index(tmp_path / "agg_1", [{"id": str(i), "kind": kind} for i, kind in enumerate(kinds)])
    common.claim(tmp_path / "agg_1" / "meta.json", {"latents": [21, 16, 4, 4]})
    store = data.Clips(tmp_path / "agg_1")

    def chosen(recorded, **changes):
        (tmp_path / "config.json").write_text(json.dumps(recorded))
        return probe.unseen_clips(str(tmp_path), settings(tmp_path / "agg_1", **changes), store)
    assert chosen({}) == data.held_out(store, flags.HELD_OUT)[:16]
    assert chosen({"held_out": 3}) == data.held_out(store, 3) and len(chosen({"held_out": 3}, clips=2)) == 2
    assert chosen({"held_out": 3}, held_out=5) == data.held_out(store, 5)
    for recorded, changes in (({"held_out": 0}, {}), ({}, {"held_out": 0})):
        with pytest.raises(UserError, match="not trained on, and none are held out; train with --held-out"):
            chosen(recorded, **changes)
    with pytest.raises(UserError, match="trained on 12 latent frames; the probes need at least 15"):
        chosen({"window": 12})


def test_probes_look_as_far_as_the_model_was_trained(world, ranks, monkeypatch):
    seen = []

    def generate(*args, window, frames, context, **kwargs):
        seen.append((window, frames))
        yield 0, context
        for first in range(context.shape[1], frames, 3):
            yield first, torch.zeros(len(context), 3, 16, 4, 4)
    monkeypatch.setattr(diffusion, "generate", generate)
    monkeypatch.setattr(probe, "window_of", lambda path: 15)
    store = data.Clips(world / "agg_0")
    probe.probe_model(str(world / "model"), settings(world / "agg_0"), store, [0], ranks)
    assert seen == [(15, 15), (15, 39)]


class Walk:
    """The exact model of latents that walk at random, by a normal step a frame; or, wrongly, of a walk with
    drift, or with steps of another spread."""

    def __init__(self, drift=0.0, spread=1.0):
        self.device = torch.device("cpu")
        self.drift, self.spread = drift, spread

    def new_cache(self, batch, frames, height, width):
        return torch.zeros(batch, frames, 16, height, width)

    def __call__(self, x, t, text, chunk, cache=None, start=0):
        frames = x.shape[1]
        if cache is not None:
            cache[:, start:start + frames] = x
            x = cache[:, :start + frames]
        if x.shape[1] == 3:
            return x  # its prediction without a context is not used
        i, s = torch.arange(1.0, 4), t[0, -1] / 1000
        prior = self.spread**2 * torch.minimum(i[:, None], i)  # the covariance of the chunk's three frames
        mean = x[:, -4:-3] + self.drift * i.view(3, 1, 1, 1)
        # E[noise - x0 | x], where x is normal about (1 - s) mean with this covariance
        covariance = (1 - s)**2 * prior + s**2 * torch.eye(3)
        gain = (s * torch.eye(3) - (1 - s) * prior) @ torch.linalg.inv(covariance)
        v = torch.einsum("ij,bjchw->bichw", gain, x[:, -3:] - (1 - s) * mean) - mean
        return torch.cat([torch.zeros_like(x[:, :-3]), v], 1)[:, -frames:]


@pytest.mark.parametrize("wrong,sign", [
    ({}, 0), ({"drift": 0.5}, -1), ({"spread": 0.7}, -1), ({"spread": 1.5}, 1)])
def test_own_minus_real_is_nothing_for_the_exact_model(wrong, sign):
    gaps = []
    for i in range(8):
        x = torch.randn(1, 21, 16, 8, 8, generator=common.rng("walk", i)).cumsum(1)
        gaps.append(probe.own_minus_real(Walk(**wrong), x, torch.zeros(1, 1, 4), None, str(i),
                                         settings("", shift=1.0), window=21))
    gap = np.mean(gaps, 0) / (np.std(gaps, 0, ddof=1) / 8**0.5)  # in standard errors: [2 chunks, levels]
    assert gap.shape == (2, 5) and ((sign * gap[:, 3:] > 8) if sign else (abs(gap) < 3)).all(), gap


def test_recovery_counts_chunks(world, ranks, monkeypatch):
    """By a stand-in for the model that recovers at once, after two chunks, or never."""
    store = data.Clips(world / "agg_0")
    usual = torch.cat([store.load(i)["latents"] for i in range(2)]).float().mean().item()

    def generate(net, text, null, sampling, *, context, frames, **kwargs):
        yield 0, context
        for chunk, first in enumerate(range(12, frames, 3)):
            levels = [usual, usual if chunk >= 2 else 9, 9, -9]  # of the four kinds of context
            yield first, torch.tensor(levels).view(4, 1, 1, 1, 1).expand(4, 3, 16, 4, 4)

    monkeypatch.setattr(probe, "own_minus_real", lambda *args: [[0.0] * 5] * 2)
    monkeypatch.setattr(probe, "statistics", lambda z, video: [[x.mean().item()] * 4 for x in z])
    monkeypatch.setattr(diffusion, "generate", generate)
    results = probe.probe_model(str(world / "model"), settings(world / "agg_0"), store, [0, 1], ranks)
    recovery = results["recovery"]
    assert [row["chunks"] for row in recovery.values()] == [1, 3, 10, 10]
    assert recovery["untouched"]["within"] == [1] * 9 and recovery["saturated"]["within"] == [0, 0] + [1] * 7


def test_contexts_are_spoilt():
    video = toy.render(toy.draw_world("spoil", 0), 9)[None]
    grey = video.mean(2, True)
    assert (probe.saturate(video) - grey).abs().mean() > 1.4 * (video - grey).abs().mean()
    spoilt = torch.cat([spoil(video) for spoil in probe.SPOILT.values()])
    z = torch.randn(4, 3, 16, 4, 4, generator=common.rng("z"))
    rows = np.array(probe.statistics(z, spoilt))
    assert rows[:, 0] == pytest.approx(z.mean((1, 2, 3, 4)).numpy(), abs=1e-6)
    assert rows[:, 1] == pytest.approx(1, abs=0.1)
    (_, strong, *_), (detail, _, blurred, noisy) = rows[:, 2] / rows[0, 2], rows[:, 3]
    assert strong > 1.4 and blurred < 0.8 * detail < 0.5 * noisy
    assert torch.equal(probe.add_grain(video), probe.add_grain(video))
