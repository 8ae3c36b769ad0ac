"""Stage 1: the loss by hand, the draws, that ranks, micro-batches and kills change nothing, refusals."""

import gc
import json
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from worlds import call, ended, fill_store, fork_ranks, run_stage, start, tiny_model

import checkpoint
import common
import data
import diffusion
import lora
import model
import toy
import train_df
from common import UserError
from train_df import Config, Samples, clip_losses, errors

SHAPE = (15, 4, 4, 4)  # 5 chunks: 4 of prefix, one to learn
TIMES = {"seconds_per_step", "clips_per_second", "gigabytes"}  # what differs from run to run


@pytest.fixture(autouse=True)
def default_signals():
    """Runs in this process install handlers of their own."""
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """init/, agg_0 of 12 seed clips, agg_1 with 6 corrective ones more."""
    root = tmp_path_factory.mktemp("world")
    net = tiny_model("train", num_layers=2, in_dim=4, out_dim=4, text_len=8)
    model.save(net, root / "init")
    fill_store(root / "agg_0", ["seed"] * 12, SHAPE)
    fill_store(root / "agg_1", ["seed"] * 12 + ["corrective"] * 6, SHAPE)
    return root


def config(world, out="out", data="agg_0", **flags) -> Config:
    flags = dict(steps=4, batch=6, micro=3, lr=1e-2, held_out=2, log_every=1, save_every=2, eval_every=2,
                 preview_every=0, device="cpu") | flags
    return Config(str(world / data), init=str(world / "init"), out=str(out), **flags)


def run(cfg: Config):
    return run_stage(train_df, cfg)


def flags_of(cfg: Config) -> list[str]:
    """The command line that gives this Config."""
    flags = []
    for key, value in vars(cfg).items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif value not in (None, ()):
            flags += [f"--{name}", str(value)]
    return flags


def weights(out) -> dict:
    return load_file(Path(out) / "diffusion_pytorch_model.safetensors")


def lines(out) -> list[dict]:
    logged = map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in TIMES} for line in logged]


def newest_state(out) -> dict:
    """Every tensor of the newest checkpoint."""
    folder = train_df.checkpoints(out)[-1][1]
    shares = [load_file(folder / f"{rank}-of-{checkpoint.shares(folder)}.safetensors")
              for rank in range(checkpoint.shares(folder))]
    return {name: torch.cat([share[name] for share in shares]) for name in shares[0]}


def same_run(a, b):
    """To the bit: the model, the log, weights, moments and average in the newest checkpoint."""
    files = ("diffusion_pytorch_model.safetensors", "config.json")
    assert all((Path(a) / f).read_bytes() == (Path(b) / f).read_bytes() for f in files)
    assert lines(a) == lines(b)
    x, y = map(newest_state, (a, b))
    assert x.keys() == y.keys() and len(x) > 100
    assert all(torch.equal(x[k], y[k]) for k in x)


def close_runs(a, b):
    p, q = weights(a), weights(b)  # where a gradient is all rounding, Adam makes a step of it, so not max
    assert all((p[k] - q[k]).norm() < 1e-3 * p[k].norm() + 1e-4 for k in p)
    for x, y in zip(lines(a), lines(b), strict=True):
        assert x.keys() == y.keys() and x["step"] == y["step"]
        for key in x.keys() & {"loss", "grad_norm", "held_out"}:
            assert x[key] == pytest.approx(y[key], rel=1e-4)


# ----------------------------------------------------------------------- the training data and the loss

def test_the_loss_by_hand(world):
    """Seed and corrective clips in one batch, against the paper's words spelled out frame by frame."""
    clips = Samples(config(world, data="agg_1", drop=0.0))
    net = model.load(world / "init")
    batch = clips.batch([(0, ("a", 0)), (14, ("a", 1))], clips.sizes(0))
    loss = clip_losses(errors(clips.cfg, net, batch), batch.weight)
    grid = torch.tensor([1000 * 8 * s / (1 + 7 * s) for s in (1 - i / 1000 for i in range(1000))])
    for row, kind in enumerate(("seed", "corrective")):
        x0, noise, t = batch.x0[row], batch.noise[row], batch.t[row]
        assert torch.equal(x0, clips.load((0, 14)[row])["latents"].float())
        bearing = range(15) if kind == "seed" else range(12, 15)
        for f in range(15):
            assert t[f] == t[f // 3 * 3], "one level a chunk"
            assert (grid - t[f]).abs().min() < 1e-3 if f in bearing else t[f] == 0
        x = torch.stack([(1 - t[f] / 1000) * x0[f] + t[f] / 1000 * noise[f] for f in range(15)])
        v = net(x[None], t[None], batch.text[row:row + 1], chunk=3)[0]
        by_hand = sum(((v[f] - (noise[f] - x0[f])) ** 2).mean() for f in bearing) / len(bearing)
        torch.testing.assert_close(loss[row], by_hand, rtol=1e-5, atol=0)
    assert len(batch.t[0].unique()) == 5, "chunks have levels of their own"


def test_a_prefix_bears_no_loss_but_gradient_reaches_it(world):
    clips = Samples(config(world, data="agg_1"))
    net = model.load(world / "init")
    batch = clips.batch([(15, ("a", 0))], clips.sizes(0))
    x0 = batch.x0.clone().requires_grad_()
    loss = clip_losses(errors(clips.cfg, net, batch._replace(x0=x0)), batch.weight)
    loss.sum().backward()
    assert x0.grad[0, :12].abs().amax((1, 2, 3)).min() > 0, "keys and values of every prefix frame"
    other = batch.noise.clone()
    other[:, :12] += 1  # neither an input nor a target
    again = clip_losses(errors(clips.cfg, net, batch._replace(noise=other)), batch.weight)
    assert torch.equal(loss.detach(), again.detach())


def test_other_modes(world):
    net = model.load(world / "init")
    clips = Samples(config(world, mode="full"))
    batch = clips.batch([(0, ("a", 0))], clips.sizes(0))
    assert clips.sizes(0) == (15,) and len(batch.t.unique()) == 1 and batch.mask.all()
    x = diffusion.add_noise(batch.x0, batch.noise, batch.t)
    v = net(x, batch.t, batch.text, chunk=None)
    expected = (v - (batch.noise - batch.x0)).square().mean((2, 3, 4))
    assert torch.equal(errors(clips.cfg, net, batch), expected)

    clips = Samples(config(world, mode="tf"))
    batch = clips.batch([(0, ("a", 0))], clips.sizes(0))
    x = diffusion.add_noise(batch.x0, batch.noise, batch.t)
    error = errors(clips.cfg, net, batch)
    for first in range(0, 15, 3):  # every chunk by itself behind its clean past
        history = torch.cat([batch.x0[:, :first], x[:, first:first + 3]], 1)
        t = torch.cat([torch.zeros(1, first), batch.t[:, first:first + 3]], 1)
        v = net(history, t, batch.text)[:, first:]
        target = (batch.noise - batch.x0)[:, first:first + 3]
        torch.testing.assert_close(error[:, first:first + 3], (v - target).square().mean((2, 3, 4)))


def test_draws_are_functions_of_seed_and_position(world):
    cfg = config(world, data="agg_1", steps=2)
    clips, other = Samples(cfg), Samples(config(world, data="agg_1", seed=1))
    ranks = [common.Ranks(rank, 3, None) for rank in range(3)]
    dealt = {}
    for rank in ranks:
        for share in train_df.shares(cfg, rank, 0):
            batch = clips.micro_batch(share)
            dealt |= {p: (batch.noise[i], batch.t[i], batch.ids[i]) for i, p in enumerate(share[1])}
    assert sorted(dealt) == list(range(12))
    for p, (noise, t, id) in dealt.items():
        alone = clips.micro_batch((0, [p]))
        assert torch.equal(alone.noise[0], noise) and torch.equal(alone.t[0], t) and alone.ids == [id]
        assert not torch.equal(other.micro_batch((0, [p])).noise[0], noise)
    assert len({t[3].item() for _, t, _ in dealt.values()} - {0}) > 4


def test_knobs_of_the_mixture(world):
    def ids(positions, **flags):
        clips = Samples(config(world, data="agg_1", **flags))
        return [clips.at(p) for p in range(positions)]
    everything = ids(16)
    assert len(set(everything)) == 16 and len(set(ids(64)[16:32])) == 16, "each once an epoch"
    share = ids(120, corrective_share=0.75)
    assert sum(i >= 12 for i in share) == 90 and sum(i >= 12 for i in share[:8]) == 6
    assert sorted(i for i in share if i >= 12)[:15] == [12] * 15, "as often as the others"
    assert all(i < 12 for i in ids(50, corrective_share=0.0))
    assert all(i >= 12 for i in ids(50, corrective_share=1.0))

    def lost(positions, **flags):
        clips = Samples(config(world, data="agg_1", **flags))
        rows = [(clips.at(p), clips.micro_batch((0, [p])).text[0]) for p in range(positions)]
        return [(i >= 12, torch.equal(text, clips.null)) for i, text in rows]
    assert all(gone for _, gone in lost(20, drop=1.0)) and not any(gone for _, gone in lost(20, drop=0.0))
    assert all(gone != corrective for corrective, gone in lost(40, drop=1.0, drop_kind="seed"))
    assert 10 < sum(gone for _, gone in lost(200, drop=0.1)) < 32

    clips = Samples(config(world, seed_prefix=0.5))
    masks = [clips.micro_batch((0, [p])).mask[0] for p in range(100)]
    assert 35 < sum(mask[0] == 0 for mask in masks) < 65
    assert all(mask[12:].all() and len(mask[:12].unique()) == 1 for mask in masks)


def test_image_first(world):
    clips = Samples(config(world, data="agg_1", image_first=0.5))
    sizes = [clips.sizes(step) for step in range(100)]
    assert set(sizes) == {(3,) * 5, (1, 3, 3, 3, 3)} and 35 < sizes.count((3,) * 5) < 65
    image = sizes.index((1, 3, 3, 3, 3))
    batch = clips.micro_batch((image, [0, 1, 2, 3]))
    assert batch.x0.shape[1] == 13 and batch.chunk.tolist() == [0] + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    corrective = batch.mask[:, 0] == 0
    assert corrective.any() and (batch.mask[corrective] == torch.tensor([0.] * 10 + [1.] * 3)).all()
    assert errors(clips.cfg, model.load(world / "init"), batch).shape == (4, 13)


def test_all_rounds_hold_out_the_same_clips(world):
    first, second = (Samples(config(world, data=d, held_out=4)) for d in ("agg_0", "agg_1"))
    assert first.held_out == second.held_out and len(first.held_out) == 4
    assert sorted(first.held_out + first.seed) == list(range(12)) and second.corrective == list(range(12, 18))
    a, b = (c.batch([(c.held_out[0], ("held out", 0))], c.sizes(None), True) for c in (first, second))
    assert all(torch.equal(x, y) for x, y in zip(a[:7], b[:7], strict=True))
    never = Samples(config(world, held_out=4, drop=1.0, seed_prefix=1.0))
    c = never.batch([(never.held_out[0], ("held out", 0))], never.sizes(None), True)
    assert torch.equal(c.text, a.text) and torch.equal(c.mask, a.mask), "no dropout, no prefix"


# ------------------------------------------------------------------------------------------- whole runs

@pytest.fixture(scope="module")
def reference(world, tmp_path_factory):
    """6 steps without interruption, all knobs on, checkpoints at 2, 4, 6."""
    out = tmp_path_factory.mktemp("reference") / "out"
    run(full_config(world, out))
    return out


def full_config(world, out, **flags):
    knobs = dict(data="agg_1", steps=6, ema=0.9, warmup=3, seed_prefix=0.3, image_first=0.3, drop=0.3)
    return config(world, out, **knobs | flags)


def test_micro_batches_change_nothing(world, reference, tmp_path):
    run(full_config(world, tmp_path / "out", micro=1))
    close_runs(reference, tmp_path / "out")
    run(full_config(world, tmp_path / "ragged", micro=4, recompute=True))
    close_runs(reference, tmp_path / "ragged")


def test_ranks_change_nothing(world, reference, tmp_path):
    """Begun by 2 processes that share the state, gone on by 1, ended by 3 that have whole copies."""
    for ranks, steps in ((2, 2), (1, 4), (3, 6)):
        cfg = full_config(world, tmp_path / "out", steps=steps, recompute=ranks == 2, shard=ranks == 2)
        printed = call("train_df.py", *flags_of(cfg), ranks=ranks).stdout
        assert (f"going on from step {steps - 2}" in printed) == (steps > 2)
    held = [line for line in lines(tmp_path / "out") if "held_out" in line]
    assert [line["step"] for line in held] == [0, 2, 4, 6]
    close_runs(reference, tmp_path / "out")


@pytest.mark.parametrize("rank", [None, 4])
def test_gradients_in_bf16_are_the_same_on_two_ranks(rank, tmp_path):
    """Weights that travel in bf16 change nothing beside copies that are rounded at home; one with a LoRA."""
    x, t, text = (torch.randn(shape, generator=common.rng("gradients", i))
                  for i, shape in enumerate([(4, 9, 16, 4, 4), (4, 9), (4, 5, 64)]))
    reference = tiny_model("gradients", num_layers=2)

    def gradients():
        ranks = common.start_ranks("cpu")
        net = model.WanModel(reference.config, torch.bfloat16 if rank else torch.float32, torch.bfloat16)
        net.load_state_dict(reference.state_dict())
        if rank:
            lora.attach(net, rank, 0)
        net.checkpointing = True
        train_df.shard(net, ranks)
        for k in range(ranks.rank, 4, ranks.world):
            v = net(x[k:k + 1], 500 + 100 * t[k:k + 1], text[k:k + 1])
            (v.square().mean() * ranks.world).backward()
        summed = {name: train_df.whole(p.grad) for name, p in net.named_parameters() if p.requires_grad}
        if ranks.rank == 0:
            torch.save(summed, tmp_path / f"{ranks.world}.pt")
        dist.destroy_process_group()

    for count in (1, 2):
        fork_ranks(count, gradients)
    one, two = (torch.load(tmp_path / f"{count}.pt") for count in (1, 2))
    assert one.keys() == two.keys() and len(one) == (40 if rank else 69)
    for name in one:
        assert (two[name] - one[name]).norm() <= 1e-5 * one[name].norm(), name


def test_killed_at_random_it_ends_the_same(world, reference, tmp_path):
    cfg = full_config(world, tmp_path / "out")
    chance = random.Random(0)
    kills = 0
    log = tmp_path / "out" / "log.jsonl"
    while not (tmp_path / "out" / "config.json").exists():
        before = log.read_bytes() if log.exists() else b""
        process = start("train_df.py", *flags_of(cfg), stdout=subprocess.DEVNULL)
        if kills < 3:
            while process.poll() is None and (not log.exists() or log.read_bytes() == before):
                time.sleep(0.01)  # at work
            time.sleep(chance.uniform(0, 0.15))
            process.kill()
            kills += process.wait() == -signal.SIGKILL
            continue
        ended(process)
    assert kills > 1
    same_run(reference, tmp_path / "out")
    assert [step for step, _ in train_df.checkpoints(tmp_path / "out")] == [4, 6], "the newest two are kept"


def test_half_a_checkpoint_does_not_count(world, reference, tmp_path):
    shutil.copytree(reference, tmp_path / "out")
    (tmp_path / "out/train/step-6/0-of-1.json").unlink()
    (tmp_path / "out/config.json").unlink()
    run(full_config(world, tmp_path / "out"))
    same_run(reference, tmp_path / "out")


def test_a_finished_model_that_was_damaged_is_made_again(world, reference, tmp_path, capsys):
    """From its newest checkpoint; without one, which may have been removed to save space, not by training."""
    file = tmp_path / "out/diffusion_pytorch_model.safetensors"
    for damage in (lambda: file.write_bytes(file.read_bytes()[:-9] + b"damaged!!"), file.unlink,
                   lambda: file.with_name("config.json").write_text("{")):
        shutil.copytree(reference, tmp_path / "out", dirs_exist_ok=True)
        damage()
        run(full_config(world, tmp_path / "out"))
        said = capsys.readouterr().out
        assert "warning: " in said and "made again\n" in said and "step 6/6" not in said
        same_run(reference, tmp_path / "out")
        damage()
        shutil.rmtree(tmp_path / "out/train")
        with pytest.raises(UserError, match="no checkpoint to make it of; to train it anew remove .*json"):
            run(full_config(world, tmp_path / "out"))


def test_sigterm_stops_with_a_checkpoint(world, tmp_path, reference):
    cfg = full_config(world, tmp_path / "out", save_every=1000)
    process = start("train_df.py", *flags_of(cfg))
    for line in process.stdout:
        if line.startswith("step 1/"):
            process.terminate()
            break
    assert "stopped after step" in ended(process, 128 + signal.SIGTERM).stdout
    assert train_df.checkpoints(tmp_path / "out") and not (tmp_path / "out/config.json").exists()
    run(full_config(world, tmp_path / "out"))
    same_run(reference, tmp_path / "out")


def test_a_finished_run_is_left_alone_and_can_be_prolonged(world, reference, tmp_path, capsys):
    shutil.copytree(reference, tmp_path / "out")
    run(full_config(world, tmp_path / "out"))
    assert "trained already: 6 steps" in capsys.readouterr().out
    run(full_config(world, tmp_path / "out", steps=8))
    with pytest.raises(UserError, match="step-8 is beyond --steps 7"):
        run(full_config(world, tmp_path / "out", steps=7))
    whole = tmp_path / "whole"
    run(full_config(world, whole, steps=8))
    same_run(whole, tmp_path / "out")


def test_the_average_by_hand(world, tmp_path, monkeypatch):
    seen = []
    step = train_df.train_step

    def watched(cfg, state, *rest):
        if not seen:
            seen.append({k: p.detach().clone() for k, p in state.weights.items()})
        norm = step(cfg, state, *rest)
        seen.append({k: p.detach().clone() for k, p in state.weights.items()})
        return norm
    monkeypatch.setattr(train_df, "train_step", watched)
    run(config(world, tmp_path / "out", ema=0.3))
    saved = weights(tmp_path / "out")
    average = seen[0]
    for s, now in enumerate(seen[1:]):
        decay = min(0.3, (s + 1) / (s + 10))
        average = {k: decay * average[k] + (1 - decay) * now[k] for k in average}
    assert all(torch.allclose(saved[k], average[k], atol=1e-6) for k in average)
    assert not torch.allclose(saved["head.head.weight"], seen[-1]["head.head.weight"], atol=1e-4)


def test_no_step_leaves_anything_behind(world, ranks, tmp_path):
    """An average that was updated under autograd once kept a graph of all steps: gigabytes in 5,000."""
    cfg = train_df.complete(full_config(world, tmp_path / "out"), ranks)
    clips = Samples(cfg)
    state = train_df.begin(cfg, clips, ranks)
    micro = common.ahead(clips.micro_batch, train_df.shares(cfg, ranks, 0))

    def alive():
        gc.collect()
        kinds = map(type, gc.get_objects())
        return sum(issubclass(kind, torch.Tensor) or "Backward" in kind.__name__ for kind in kinds)
    counts = []
    for step in range(5):
        train_df.train_step(cfg, state, micro, step, ranks)
        counts.append(alive())
    micro.close()
    assert not any(x.requires_grad for x in (*state.ema, state.totals, state.broken))
    assert counts[-1] <= counts[1]


def test_the_held_out_loss_is_that_of_the_exported_weights(world, reference):
    cfg = full_config(world, reference)
    clips = Samples(cfg)
    net = model.load(reference)
    losses = []
    for place, i in enumerate(clips.held_out):
        batch = clips.batch([(i, ("held out", place))], clips.sizes(None), held_out=True)
        with torch.no_grad():
            losses.append(clip_losses(errors(cfg, net, batch), batch.weight).item())
    assert lines(reference)[-1]["held_out"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_the_log_says_what_was_computed(world, tmp_path):
    cfg = config(world, tmp_path / "out", steps=2, log_every=2, lr=1e-12)
    run(cfg)
    clips = Samples(cfg)
    net = model.load(world / "init")
    noise, chunk, loss = [[] for _ in range(10)], [[] for _ in range(5)], []
    for p in range(12):
        batch = clips.micro_batch((0, [p]))
        with torch.no_grad():
            error = errors(cfg, net, batch)[0]
        loss.append(error.mean().item())
        for f in range(15):
            noise[min(int(batch.t[0, f] / 100), 9)].append(error[f].item())
            chunk[f // 3].append(error[f].item())
    [line] = [line for line in lines(tmp_path / "out") if "loss" in line]
    assert line["loss"] == pytest.approx(sum(loss) / 12, rel=1e-4)
    assert line["by_chunk"] == pytest.approx([sum(x) / len(x) for x in chunk], rel=1e-4)
    assert line["by_noise"] == [pytest.approx(sum(x) / len(x), rel=1e-4) if x else None for x in noise]


def test_the_log_for_others(world, tmp_path, monkeypatch):
    logged = []
    fake = types.SimpleNamespace(init=lambda **about: types.SimpleNamespace(
        log=lambda line, step: logged.append((step, about["project"], sorted(line)))))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run(config(world, tmp_path / "out", steps=1, wandb="mine"))
    assert [(step, project) for step, project, _ in logged] == [(0, "mine"), (1, "mine"), (1, "mine")]
    assert {"loss", "lr", "grad_norm"} < set(logged[1][2]) and "held_out" in logged[2][2]


def test_it_learns(world, tmp_path):
    """Clips of one colour each: 200 steps must halve the held-out loss."""
    fill_store(tmp_path / "agg", ["seed"] * 64, SHAPE, smooth=True)
    run(config(world, tmp_path / "out", steps=200, batch=4, micro=4, lr=3e-3, held_out=8, log_every=20,
               eval_every=200, save_every=1000, data=tmp_path / "agg"))
    held = [line["held_out"] for line in lines(tmp_path / "out") if "held_out" in line]
    print(held)
    assert held[1] < 0.5 * held[0]


def test_previews(tmp_path, world):
    toy.make_wan(tmp_path / "wan")
    fill_store(tmp_path / "agg", ["seed"] * 4, (6, 16, 4, 4))
    for mode in ("full", "df"):
        run(Config(str(tmp_path / "agg"), init=str(tmp_path / "wan"), out=str(tmp_path / mode), steps=1,
                   batch=2, held_out=2, mode=mode, preview_every=1, device="cpu"))
        names = sorted(p.name for p in (tmp_path / mode / "preview").iterdir())
        assert names == [f"step-{s:06d}{x}" for s in (0, 1) for x in ("-0.mp4", "-1.mp4", ".png")]
        video = data.probe(tmp_path / mode / "preview" / names[0])
        assert (video.frames, video.width, video.height, video.fps) == (21, 32, 32, 16)
        assert data.read_image(tmp_path / mode / "preview/step-000001.png").shape[2] == 2 * (128 + 4)


# -------------------------------------------------------------------------------- failures and refusals

def test_a_gradient_that_is_not_finite_stops_the_run(world, tmp_path):
    fill_store(tmp_path / "agg_0", ["seed"] * 12 + ["corrective"] * 12, SHAPE)
    cfg = config(tmp_path, tmp_path / "out", steps=20, log_every=5, save_every=1, held_out=0)
    cfg.init = str(world / "init")
    cfg.corrective_share = 0.5  # a corrective clip of each two: the 4th of them comes in step 2
    clips = Samples(cfg)
    bad = clips.store[clips.at(7)]["id"]
    assert bad not in [clips.store[clips.at(p)]["id"] for p in range(6)]
    data.write_clip(tmp_path / "agg_0", bad, torch.full(SHAPE, torch.inf), torch.zeros(3, 64), "x", "y")
    with pytest.raises(UserError, match=rf"step 2: .*\n.*not finite on {bad}; .*step-1"):
        run(cfg)
    assert not (tmp_path / "out/config.json").exists()
    assert [step for step, _ in train_df.checkpoints(tmp_path / "out")] == [1]


def test_a_broken_step_leaves_the_weights(world, ranks, tmp_path):
    cfg = train_df.complete(config(world, tmp_path, ema=0.5), ranks)
    clips = Samples(cfg)
    state = train_df.begin(cfg, clips, ranks)
    good = clips.micro_batch((0, range(3)))
    bad = good._replace(x0=good.x0 * torch.inf)
    before = [p.detach().clone() for p in state.weights.values()]
    train_df.train_step(cfg, state, iter([(0, good), (0, bad)]), 0, ranks)
    train_df.train_step(cfg, state, iter([(0, good), (0, good)]), 1, ranks)
    assert int(state.broken) == 0, "the first broken step is remembered"
    assert all(torch.equal(p, q) for p, q in zip(state.weights.values(), before, strict=True))


def test_corrupt_clips(world, tmp_path):
    shutil.copytree(world / "agg_0", tmp_path / "agg_0")
    (tmp_path / "agg_0/clips/c3.safetensors").write_bytes(b"nothing")
    cfg = config(tmp_path, tmp_path / "out", steps=3, held_out=0)
    cfg.init = str(world / "init")
    with pytest.raises(UserError, match="c3.safetensors is truncated(.|\n)*--skip-bad"):
        run(cfg)
    cfg.skip_bad = True
    run(cfg)
    clips = Samples(cfg)
    skipped = [sum(clips.at(p) == 3 for p in range(s * 6, s * 6 + 6)) for s in range(3)]
    logged = [line.get("skipped", 0) for line in lines(tmp_path / "out") if "loss" in line]
    assert logged == skipped and sum(skipped) > 0


def test_a_run_is_another_if_its_data_or_flags_are(world, tmp_path):
    run(config(world, tmp_path / "out", steps=1))
    for flags, message in ((dict(seed=1), "seed = 0, not 1"), (dict(data="agg_1"), "data = "),
                           (dict(mode="tf"), "mode = df, not tf"), (dict(batch=3), "batch = 6, not 3")):
        with pytest.raises(UserError, match="begun with " + message):
            run(config(world, tmp_path / "out", steps=1, **flags))


@pytest.mark.parametrize("flags,message", [
    (dict(steps=0), "--steps 0: give a whole number from 1"), (dict(drop=1.5), "--drop 1.5: give"),
    (dict(corrective_share=-1.0), "--corrective-share -1"), (dict(ema=1.0), "--ema 1.0"),
    (dict(corrective_share=0.5), "0 corrective clips to train on"), (dict(held_out=12), "12 held out: too"),
    (dict(data="agg_1", mode="full"), "seed clips alone"), (dict(mode="full", image_first=1.0), "alone"),
    (dict(preview_every=5), "Previews need a VAE"), (dict(init="nowhere"), "nowhere"),
    (dict(data="short", seed_prefix=0.1), "--prefix of 4 leaves nothing to learn"),
    (dict(prefix=-1), "--prefix -1: give a whole"), (dict(data="ragged"), "no multiple of 3"),
    (dict(data="wide"), "takes 4, and"), (dict(data="words"), "text of width 32"),
    (dict(data="bare"), "empty.safetensors is missing"), (dict(data="rolled"), "a rollout is not"),
    (dict(data="nothing"), "not a clip store"),
])
def test_refusals(world, tmp_path, flags, message):
    odd = {"short": ((12, 4, 4, 4), 64, "seed"), "ragged": ((7, 4, 4, 4), 64, "seed"),
           "wide": ((15, 8, 4, 4), 64, "seed"), "words": (SHAPE, 32, "seed"), "bare": (SHAPE, 64, "seed"),
           "rolled": (SHAPE, 64, "rollout")}
    if flags.get("data") in odd:
        shape, words, kind = odd[flags["data"]]
        fill_store(tmp_path / flags["data"], [kind] * 3, shape, words)
    if flags.get("data") == "bare":
        (tmp_path / "bare/empty.safetensors").unlink()
    flags = dict(flags)
    own = {k: v for k, v in flags.items() if k not in ("data", "init")}
    with pytest.raises((UserError, FileNotFoundError), match=message):
        cfg = config(world, tmp_path / "out", **own)
        if "data" in flags:
            here = flags["data"].startswith("agg")
            cfg.data = str((world if here else tmp_path) / flags["data"])
        cfg.init = flags.get("init", cfg.init)
        run(cfg)
    assert not (tmp_path / "out/config.json").exists()


def test_a_model_that_sees_the_future_is_refused(world, tmp_path, monkeypatch):
    everything = model.causal_layout

    def blind(sizes, per_frame, start=0):
        return everything((sum(sizes),), per_frame, start)
    monkeypatch.setattr(model, "causal_layout", blind)
    with pytest.raises(UserError, match="not causal"):
        run(config(world, tmp_path / "out"))


def test_batches_that_cannot_be_shared(world, tmp_path):
    done = call("train_df.py", *flags_of(config(world, tmp_path / "out", batch=5)), ranks=2, code=1)
    assert "--batch 5 cannot be shared by 2 processes; use 4 or 6" in done.stderr


def test_other_means_and_weights_of_the_loss(world):
    flags = dict(data="agg_1", drop=0.0)
    chosen = [(0, ("a", 0)), (14, ("a", 1))]
    net = model.load(world / "init")
    plain = Samples(config(world, **flags)).batch(chosen, (3,) * 5)
    error = errors(config(world), net, plain)
    by_latent = Samples(config(world, loss_mean="latent", **flags)).batch(chosen, (3,) * 5)
    loss, expected = clip_losses(error, by_latent.weight), clip_losses(error, plain.weight)
    torch.testing.assert_close(loss, expected * torch.tensor([1, 3 / 15]))
    bell = Samples(config(world, loss_weight="bell", **flags)).batch(chosen, (3,) * 5)
    grid = torch.tensor([1000 * 8 * s / (1 + 7 * s) for s in (1 - i / 1000 for i in range(1000))])
    shape = (-2 * ((grid - 500) / 1000)**2).exp()
    mean = (shape - shape.min()).mean()
    by_hand = ((-2 * ((plain.t - 500) / 1000)**2).exp() - shape.min()) / mean
    torch.testing.assert_close(bell.weight, plain.weight * by_hand, rtol=1e-4, atol=1e-6)
    noisiest, middle = diffusion.bell_weight(torch.tensor([1000.0, 500.0]), 8.0)
    assert noisiest == 0 and middle > 2
    assert diffusion.bell_weight(grid, 8.0).mean().item() == pytest.approx(1)
    held = Samples(config(world, loss_mean="latent", loss_weight="bell", **flags))
    batch = held.batch([(held.held_out[0], ("held out", 0))], (3,) * 5, held_out=True)
    assert (batch.weight == 1 / 15).all(), "the held-out loss compares runs, whatever they train with"


def test_a_prefix_of_another_length(world):
    clips = Samples(config(world, data="agg_1", prefix=2))
    batch = clips.batch([(14, ("a", 0))], clips.sizes(0))
    assert batch.mask[0].tolist() == [0] * 6 + [1] * 9 and (batch.t[0, :6] == 0).all() and batch.t[0, 6] > 0


def test_corrective_clips_of_held_out_ones_are_left_out(world, tmp_path):
    shutil.copytree(world / "agg_1", tmp_path / "agg_1")
    entries = list(data.Clips(tmp_path / "agg_1"))
    for place, entry in enumerate(entries[12:]):
        entry["id"] = f"c{2 * place}-round0-reversed"
    data.write_index(tmp_path / "agg_1", entries)
    for count in (0, 3, 6):
        clips = Samples(config(world, data=str(tmp_path / "agg_1"), held_out=count))
        unseen = {f"c{i}" for i in clips.held_out}
        assert len(unseen) == count
        assert [clips.store[i]["id"] for i in clips.corrective] == [
            f"c{2 * k}-round0-reversed" for k in range(6) if f"c{2 * k}" not in unseen]
    assert len(clips.corrective) < 6, "the test must leave some out"


def test_it_works_as_typed(world, tmp_path):
    """--out and --init follow from --data: the Wan directory that the clips came from, and model_k beside."""
    shutil.copytree(world / "agg_0", tmp_path / "agg_3")
    shutil.copytree(world / "init", tmp_path / "wan")
    meta = json.loads((tmp_path / "agg_3/meta.json").read_text())
    (tmp_path / "agg_3/meta.json").write_text(json.dumps(meta | {"wan": str(tmp_path / "wan")}))
    flags = "--steps 1 --batch 2 --held-out 0 --preview-every 0 --device cpu".split()
    call("train_df.py", "--data", "agg_3/", *flags, cwd=tmp_path)
    made = json.loads((tmp_path / "model_3/config.json").read_text())
    assert (made["step"], made["held_out"], made["wan"]) == (1, 0, "../wan")


def test_leftovers_of_killed_runs_are_swept(world, tmp_path, reference):
    out = tmp_path / "out"
    shutil.copytree(reference, out)
    (out / "config.json").unlink()
    for name in (".config.json.123.tmp", "preview/.step-000002-0.mp4.77.tmp", "train/step-3/0-of-2.json"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("half")
    (out / ".mine.tmp").write_text("not ours")
    (out / "train/step-3-backup").mkdir()
    run(full_config(world, out))
    left = {p.relative_to(out).as_posix() for p in out.rglob("*") if ".tmp" in p.name or p.name == "step-3"}
    assert left == {".mine.tmp"} and (out / "train/step-3-backup").exists() and (out / "config.json").exists()
