"""Clips of 249 frames, 63 latent ones, through every stage; and windows as long as a model was trained on."""

import json
from pathlib import Path

import pytest
import test_sample
import torch
from worlds import ROOT, assert_close, fill_store, pan, refused, run_stage, tiny_model

import aggregate
import bench
import data
import diffusion
import model
import plan
import prepare
import rollout
import sample
import train_df
import vae

models = test_sample.models  # a fixture

FRAMES, LATENTS = 249, 63
TRAINING = dict(steps=1, batch=2, micro=2, lr=1e-3, held_out=0, preview_every=0, device="cpu")


@pytest.fixture(scope="module")
def root(models):
    """wan/ with a VAE and a text encoder, base/ with a tiny transformer, and agg_0/ of two clips of 16x16."""
    root = models
    model.save(tiny_model("long"), root / "base")
    (root / "videos").mkdir()
    for i, speed in enumerate((0.2, 0.3)):
        data.write_video(root / f"videos/{i}.mp4", [pan(FRAMES, speed, 16, 16)], 16)
        (root / f"videos/{i}.txt").write_text("A disc moves")
    run_stage(prepare, prepare.Config(str(root / "videos"), str(root / "wan"), str(root / "agg_0"), "16x16",
                                      FRAMES, device="cpu"))
    return root


@pytest.fixture(scope="module")
def model_0(root):
    train(root, "agg_0", "model_0", "df")
    return root / "model_0"


@pytest.fixture(scope="module")
def rollout_0(root, model_0):
    run_stage(rollout, rollout.Config(str(model_0), out=str(root / "rollout_0"), count=1, steps=2,
                                      guidance=1.0, previews=0, device="cpu"))
    return root / "rollout_0"


def train(root, clips, out, mode, **flags):
    run_stage(train_df, train_df.Config(str(root / clips), init=str(root / "base"), out=str(root / out),
                                        mode=mode, **TRAINING | flags))
    return model.settings(root / out)


@pytest.mark.parametrize("mode", ["df", "tf", "rf", "full"])
def test_long_clips_are_trained_on_in_every_mode(root, mode):
    assert data.Clips(root / "agg_0").meta()["latents"] == [LATENTS, 16, 2, 2]
    settings = train(root, "agg_0", f"trained_{mode}", mode)
    assert (settings["mode"], settings["window"]) == (mode, LATENTS)
    losses = [json.loads(line) for line in (root / f"trained_{mode}/log.jsonl").read_text().splitlines()]
    assert not losses or len(losses[0]["by_chunk"]) == 21


def test_long_rollouts(root, rollout_0):
    [made] = data.Clips(rollout_0)
    latents = data.Clips(rollout_0).load(0)["latents"]
    real = data.Clips(root / "agg_0").load(int(made["source"]))["latents"]
    assert latents.shape == (LATENTS, 16, 2, 2) and torch.equal(latents[:3], real[:3])


@pytest.mark.parametrize("flip", ["pixels", "latents"])
def test_long_rollouts_are_reversed_and_trained_on(root, rollout_0, flip):
    out = root / f"agg_{flip}"
    run_stage(aggregate, aggregate.Config(str(rollout_0), str(root / "agg_0"), str(out), flip=flip,
                                          device="cpu"))
    clips, before = data.Clips(out), data.Clips(rollout_0).load(0)["latents"].float()
    assert clips.kinds == ["seed", "seed", "corrective"]
    made = clips.load(2)["latents"].float()
    assert made.shape == (LATENTS, 16, 2, 2)
    if flip == "latents":
        assert torch.equal(made, before.flip(0))
    else:
        coder = vae.load(root / "wan")
        video = coder.decode(before[None])
        assert video.shape[1] == FRAMES
        assert_close(made[:3], coder.encode(video.flip(1)[:, :9])[0], 5e-3)
    samples = train_df.Samples(train_df.Config(str(out), held_out=0))
    batch = samples.batch([(2, ("sample", 0))], samples.sizes(0))
    assert batch.mask[0].tolist() == [0] * 12 + [1] * 51, "4 chunks of prefix, however long the clip"
    assert train(root, out.name, f"model_{flip}", "df")["window"] == LATENTS


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of every call of generate(), which here makes nothing but zeros."""
    calls = []

    def zeros(net, text, null, sampling, *, shape, frames, **options):
        calls.append(options | {"frames": frames})
        yield 0, torch.zeros(len(options["ids"]), frames, *shape)
    monkeypatch.setattr(diffusion, "generate", zeros)
    return calls


def make(root, out, trained, **flags):
    run_stage(sample, sample.Config(str(trained), wan=str(root / "wan"), prompt="a red disc", out=str(out),
                                    size="16x16", preset="ultrafast", **flags))


def test_a_window_is_as_long_as_what_was_trained_on(root, model_0, calls, tmp_path):
    """By the model's config.json, or else by the size of clips that the Wan directory is for."""
    for trained, flags, expected in ((model_0, {}, (63, 12)), (model_0, {"window": 30, "keep": 6}, (30, 6)),
                                     (root / "base", {"causal": True}, (21, 12))):
        make(root, tmp_path / str(len(calls)), trained, seconds=1, **flags)
        [made] = (tmp_path / str(len(calls) - 1)).glob("*.mp4")
        tags = data.read_tags(made)
        assert (calls[-1]["window"], calls[-1]["keep"]) == (tags["window"], tags["keep"]) == expected
        assert tags["context"] == tags["keep"]
    long = tmp_path / "wan"
    model.save(tiny_model("long"), long, geometry={"size": "16x16", "frames": 249, "fps": 16})
    cfg = sample.Config(str(root / "base"), wan=str(long))
    assert sample.trained_window(cfg, vae.load(root / "wan")) == LATENTS


@pytest.mark.parametrize("window,keep", [
    (63, 12), (21, 12), (15, 12), (14, 9), (9, 6), (6, 3), (3, 0), (1, 0)])
def test_a_small_window_keeps_less(window, keep):
    assert sample.in_window(sample.Config(), window).keep == keep
    given = sample.in_window(sample.Config(keep=3, context=6), window)
    assert (given.window, given.keep, given.context) == (window, 3, 6)


def test_a_bidirectional_model_makes_as_much_as_it_was_trained_on(root, calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.save(tiny_model("long"), "whole", mode="full", window=LATENTS)
    make(root, "out", "whole", seconds=15.5)
    assert calls == [calls[0] | {"frames": LATENTS, "window": LATENTS, "chunk": None}]
    with refused("16 s are more than a window of 63 latent frames"):
        make(root, "more", "whole", seconds=16)


def test_a_rollout_is_one_window(model_0, calls, tmp_path):
    run_stage(rollout, rollout.Config(str(model_0), out=str(tmp_path), count=1, previews=0, device="cpu"))
    [call] = calls
    assert (call["frames"], call["window"]) == (LATENTS, LATENTS) and call["context"].shape[1] == 3


@pytest.mark.parametrize("mode", ["df", "full"])
def test_previews_are_as_long_as_the_clips(root, calls, ranks, tmp_path, mode):
    cfg = train_df.Config(str(root / "agg_0"), init=str(root / "base"), out=str(tmp_path), mode=mode,
                          previews=1, **TRAINING)
    cfg = train_df.complete(cfg, ranks)
    samples = train_df.Samples(cfg)
    train_df.preview(cfg, samples, train_df.begin(cfg, samples, ranks), 0, ranks)
    [call] = calls
    chunk = None if mode == "full" else 3
    assert (call["frames"], call["window"], call["chunk"]) == (LATENTS, LATENTS, chunk)
    assert data.probe(tmp_path / "preview/step-000000-0.mp4").frames == FRAMES


def test_clips_longer_than_a_model_was_trained_on(root, tmp_path, monkeypatch):
    """Training makes it know them; rolling them out is refused, and shorter clips are not."""
    monkeypatch.chdir(tmp_path)
    for name, latents in (("agg_0", 15), ("short", 9)):
        made_by = {key: data.Clips(root / "agg_0").meta()[key] for key in ("wan", "vae", "t5")}
        fill_store(Path(name), ["seed"] * 3, (latents, 16, 2, 2), **made_by)
    model.save(tiny_model("long"), "model_0", wan=str(root / "wan"), window=12)
    flags = dict(out="rollout_0", count=1, steps=1, held_out=0, previews=0, device="cpu")
    with refused("agg_0 has clips of 15 latent frames; model_0 was trained on clips of 12, which is the"):
        run_stage(rollout, rollout.Config("model_0", data="agg_0", **flags))
    run_stage(rollout, rollout.Config("model_0", data="short", **flags))
    assert data.Clips("rollout_0").load(0)["latents"].shape[0] == 9
    run_stage(train_df, train_df.Config("agg_0", init="model_0", out="model_1", **TRAINING))
    assert model.settings("model_1")["window"] == 15
    run_stage(rollout, rollout.Config("model_1", data="agg_0", **flags | {"out": "rollout_1"}))
    with refused("rollout_0 was made with latents = .9, .* agg_0 with .15, "):
        run_stage(aggregate, aggregate.Config("rollout_0", "agg_0", "agg_1", device="cpu"))


# ---------------------------------------------------------------------------------------- what it costs

def test_memory_follows_the_clips(root):
    def activations(latents, mode):
        cfg = train_df.Config("", mode=mode, batch=1, dtype="float32", compile=False, recompute=False)
        config = model.read_checkpoint(root / "base")[1]
        return plan.training(cfg, config, (latents, 16, 16, 16), 1, "cpu").peak["activations"]

    short, long, two_streams = (activations(*case) for case in ((21, "df"), (63, "df"), (63, "tf")))
    assert long == pytest.approx(3 * short, rel=0.05)
    assert two_streams > 41 / 21 * long, "twice the tokens but for the last clean chunk, and joined pasts"


def test_the_plan_follows_the_clips(root):
    cfg = bench.Plan("plan", wan=str(root / "wan"), videos=str(root / "videos"), seconds=20,
                     prompts=str(ROOT / "prompts.txt"), prepare="--frames 249 --size 16x16",
                     train="--held-out 0")
    facts = plan.read_run(cfg)
    assert facts.latents == (LATENTS, 16, 2, 2)
    assert (facts.sample.window, facts.sample.keep) == (LATENTS, 12)
    assert plan.clip_bytes(facts) == 2 * LATENTS * 16 * 2 * 2 + 2 * facts.tokens * 64


def test_flops_by_mode(tmp_path):
    """In forward passes over the clip: 3 for df; with a clean past twice the tokens; and in rf the past is
    denoised and cached, all but its last chunk."""
    fill_store(tmp_path, ["seed"], (63, 16, 2, 2))
    config = model.Config(dim=64, ffn_dim=64, num_heads=2, num_layers=2, text_dim=64, text_len=8)
    once = model.forward_flops(config, model.causal_layout((3,) * 21, 1))
    past = model.forward_flops(config, model.causal_layout((3,) * 20, 1))
    beside = model.forward_flops(config, model.teacher_layout((3,) * 21, 1))
    for expected, flags in ((3 * once, {"mode": "df"}), (3 * beside, {"mode": "tf"}),
                            (3 * beside + 2 * past, {"mode": "rf"}),
                            (3 * beside + 4 * past, {"mode": "rf", "rf_steps": 3}),
                            (5 * beside, {"mode": "rf", "rf_steps": 2, "rf_history": "parallel"}),
                            (3 * beside, {"mode": "rf", "rf_history": "noise"})):
        cfg = train_df.Config(str(tmp_path), held_out=0, **flags)
        samples = train_df.Samples(cfg)
        assert train_df.clip_flops(cfg, samples, config) == expected
        assert train_df.clip_flops(cfg, samples, config, resampling=False) == 3 * (
            once if flags["mode"] == "df" else beside)
