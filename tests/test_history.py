"""Training modes: the past that a chunk is shown, beside the same computed in another way."""

import pytest
import test_train
import torch
from test_train import close_runs, config, flags_of, lines, run, same_run
from worlds import call, fill_store, relative

import bench
import common
import diffusion
import history
import model
from train_df import Samples, clip_losses, errors

world = test_train.world  # a fixture


def rf_batch(world, count=2, **flags):
    samples = Samples(config(world, data="agg_1", mode="rf", **flags))
    return samples, samples.batch([(samples.at(p), ("sample", p)) for p in range(count)], samples.sizes(0))


def test_levels_are_logit_normal_and_shifted():
    """The quantiles follow from those of the normal distribution."""
    g = common.rng("levels")
    for shift, middle in ((0.6, 0.375), (1.0, 0.5), (0.1, 1 / 11), (3.0, 0.75)):
        levels = torch.stack([history.draw_level(g, shift) for _ in range(4000)])
        shares = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
        normal = torch.tensor([-1.6449, -0.6745, 0.0, 0.6745, 1.6449])
        plain = normal.sigmoid()
        expected = shift * plain / (1 + (shift - 1) * plain)
        assert expected[2].item() == pytest.approx(middle, abs=1e-4)
        assert (levels.quantile(shares) - expected).abs().max() < 0.025


def test_a_level_of_one_is_a_rollout(world):
    """From pure noise, in one step, the past is what generate() makes of the same noise."""
    net = model.load(world / "init")
    samples, batch = rf_batch(world, count=1, rf_shift=0.6)
    ids, seed = ["x"], 3
    noise = torch.cat([torch.randn(3, *samples.shape[1:], generator=common.rng(seed, "noise", "x", first))
                       for first in range(0, 15, 3)])
    batch = batch._replace(level=torch.ones(1), level_noise=noise[None])
    for steps in (1, 2):
        samples.cfg.rf_steps = steps
        past = history.resampled(samples.cfg, net, batch)
        sampling = diffusion.Sampling(steps=steps, shift=1.0, guidance=1.0)
        chunks = diffusion.generate(net, [batch.text[0]], None, sampling, shape=samples.shape[1:], frames=12,
                                    window=15, keep=3, ids=ids, seed=seed)
        expected = torch.cat([latents for _, latents in chunks], 1)
        assert relative(past[:, :12], expected) < 1e-5


def test_resampling_by_hand(world):
    """Without a cache: each chunk denoised at the end of a whole forward pass over its past."""
    net = model.load(world / "init")
    samples, batch = rf_batch(world, rf_steps=2)
    ar = history.resampled(samples.cfg, net, batch)
    samples.cfg.rf_history = "parallel"
    parallel = history.resampled(samples.cfg, net, batch)
    samples.cfg.rf_history = "noise"
    noised = history.resampled(samples.cfg, net, batch)
    sigma = batch.level.view(-1, 1, 1, 1, 1)
    assert torch.allclose(noised, (1 - sigma) * batch.x0 + sigma * batch.level_noise, atol=1e-6)
    assert len(batch.level.unique()) == 2, "a level for each clip"
    for made, past_of in ((ar, ar), (parallel, batch.x0)):
        for first in range(0, 12, 3):
            x = noised[:, first:first + 3]
            for k in (1.0, 0.5):
                t = torch.zeros(2, first + 3)
                t[:, first:] = 1000 * k * batch.level[:, None]
                v = net(torch.cat([past_of[:, :first], x], 1), t, batch.text)[:, first:]
                x = x - 0.5 * sigma * v
            assert relative(made[:, first:first + 3], x) < 1e-5, first


def test_no_gradient_passes_through_the_past(world):
    net = model.load(world / "init").train()
    samples, batch = rf_batch(world)
    for kind in ("ar", "parallel", "noise"):
        samples.cfg.rf_history = kind
        past = history.resampled(samples.cfg, net, batch)
        assert not past.requires_grad
    net.checkpointing = True  # recomputes what has a gradient; the cached passes have none
    clip_losses(errors(samples.cfg, net, batch), batch.weight).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_level_of_zero_is_teacher_forcing(world):
    net = model.load(world / "init")
    samples, batch = rf_batch(world, rf_warmup=2)
    teacher = Samples(config(world, data="agg_1", mode="tf"))
    same = teacher.batch([(teacher.at(p), ("sample", p)) for p in range(2)], teacher.sizes(0))
    expected = errors(teacher.cfg, net, same)
    assert torch.equal(batch.x0, same.x0) and torch.equal(batch.t, same.t), "the same draws as in other modes"
    near = errors(samples.cfg, net, batch._replace(level=torch.full((2,), 1e-6)))
    assert relative(near, expected) < 1e-5
    warming, later = (samples.micro_batch((step, [0, 1])) for step in (1, 2))
    assert torch.equal(errors(samples.cfg, net, warming), expected) and later.level is not None
    assert relative(errors(samples.cfg, net, later), expected) > 1e-3


def test_corrective_clips_train_in_every_mode(world):
    """The prefix is shown clean, or resampled, as the mode says, and carries no loss."""
    net = model.load(world / "init")
    for mode in ("df", "tf", "rf"):
        samples = Samples(config(world, data="agg_1", mode=mode, drop=0.0))
        batch = samples.batch([(14, ("sample", 0))], samples.sizes(0))
        assert batch.mask[0].tolist() == [0.0] * 12 + [1.0] * 3
        loss = clip_losses(errors(samples.cfg, net, batch), batch.weight)
        x0 = batch.x0.clone()
        x0[:, 0] += 1
        again = clip_losses(errors(samples.cfg, net, batch._replace(x0=x0)), batch.weight)
        assert not torch.equal(loss, again), "the prefix is seen"


def test_runs_in_mode_rf(world, tmp_path):
    """Micro-batches, ranks and a stop change nothing; nor does recomputing activations."""
    knobs = dict(data="agg_1", mode="rf", steps=6, rf_warmup=2, rf_steps=2, ema=0.9)
    run(config(world, tmp_path / "a", **knobs))
    assert lines(tmp_path / "a")[-1]["held_out"] > 0
    run(config(world, tmp_path / "b", micro=1, recompute=True, **knobs))
    close_runs(tmp_path / "a", tmp_path / "b")
    for steps in (4, 6):
        run(config(world, tmp_path / "c", **knobs | {"steps": steps}))
    same_run(tmp_path / "a", tmp_path / "c")
    call("train_df.py", *flags_of(config(world, tmp_path / "d", **knobs)), ranks=2)
    close_runs(tmp_path / "a", tmp_path / "d")
    assert model.settings(tmp_path / "a")["mode"] == "rf"


def test_the_bench_of_modes(capsys):
    bench.bench_modes(bench.Config("modes", frames=33, size="32x32", batch=2, micro=1, repeats=1))
    printed = capsys.readouterr().out
    assert "2 clips of 33 frames, 12 tokens a chunk, 1 at a time" in printed
    rows = [line.strip("|").split("|") for line in printed.splitlines()[4:]]
    assert [row[0].strip() for row in rows] == ["df", "tf", "rf"] and float(rows[0][2]) == 1
    df, tf, rf = (float(row[3]) for row in rows)
    assert df == 1 < tf < rf < 3, "a clean past is that of 2 of 3 chunks"


def test_it_learns_by_resampling(world, tmp_path):
    fill_store(tmp_path / "agg", ["seed"] * 64, (15, 4, 4, 4), smooth=True)
    run(config(world, tmp_path / "out", mode="rf", rf_warmup=50, steps=150, batch=4, micro=4, lr=3e-3,
               held_out=8, log_every=50, eval_every=150, save_every=1000, data=tmp_path / "agg"))
    held = [line["held_out"] for line in lines(tmp_path / "out") if "held_out" in line]
    assert held[1] < 0.5 * held[0], held
