"""The code for GPUs, run on tensors of a device that is not there: what is in the wrong place or format, and
what makes the CPU wait for the device, fails here on a CPU. No number is computed.

test_fake_gpu.py runs this file in a process of its own: a device cannot be unregistered, and autograd's
threads for it would forbid other tests to fork."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import fill_store

import common
import diffusion
import model
import predict
import rollout
import t5
import train_df
import vae

SIZES = model.Config(dim=128, ffn_dim=256, num_heads=2, num_layers=1, text_dim=64, text_len=32)
SHAPE = (16, 16, 26)  # 104 tokens a frame: nothing divides 128


class NeverWaits(TorchDispatchMode):
    """A copy between devices that the CPU waits for is an error, as .item() is on a fake tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if func == torch.ops.aten.copy_.default else args[0]
            if {source.device.type, out.device.type} == {"cpu", "gpu"}:
                waits = source.device.type == "gpu" or not ((kwargs or {}).get("non_blocking") or args[2:])
                assert not waits, f"a copy from {source.device} to {out.device}, for which the CPU waits"
        return out


@pytest.fixture
def gpu():
    with predict.faked() as device:
        yield device


def wan(device, dtype=torch.bfloat16, compute=None, **sizes):
    with device:
        return model.WanModel(replace(SIZES, **sizes), dtype, compute)


def texts(count, device="cpu"):
    return [torch.randn(5 + i, SIZES.text_dim, device=device) for i in range(count)]


# ------------------------------------------------------------------------------------------- training

def settings(**flags):
    cfg = train_df.Config("", batch=4, micro=2, **flags)
    return common.for_device(cfg, torch.device("gpu"))


def fake_batch(cfg, sizes, clips=2):
    frames = sum(sizes)
    x, noise, again = torch.randn(3, clips, frames, *SHAPE).unbind()
    t, mask, weight = torch.rand(3, clips, frames).unbind()
    rf = (torch.rand(clips), again) if cfg.mode == "rf" else ()
    return train_df.Batch(x, noise, 1000 * t, mask, weight, model.pad_text(texts(clips)),
                          torch.zeros(frames, dtype=torch.int64), sizes, [], *rf)


def train(cfg, device, sizes=(3, 3, 3)):
    ranks = common.Ranks(0, 1, device)
    net = train_df.set_up(cfg, wan(device, *train_df.formats(cfg)), ranks)
    state = train_df.new_state(cfg, net, sizes, ranks)
    micro = iter([(0, fake_batch(cfg, sizes)) for _ in range(2)])
    with torch.no_grad():  # tables are copied once
        train_df.errors(cfg, net, fake_batch(cfg, sizes).to(device))
    with NeverWaits():
        norm = train_df.train_step(cfg, state, micro, 0, ranks)
    return state, norm


@pytest.mark.parametrize("flags,sizes", [
    (dict(mode="df"), (3, 3, 3)), (dict(mode="df", ema=0.9, loss_weight="bell"), (1, 3, 3)),
    (dict(mode="tf"), (3, 3, 3)), (dict(mode="rf", rf_history="parallel", rf_steps=2), (3, 3, 3)),
    (dict(mode="rf"), (3, 3, 3)), (dict(mode="full"), (9,)), (dict(mode="df", route=1), (3, 3, 3)),
    (dict(mode="df", lora_rank=4), (3, 3, 3)), (dict(mode="df", recompute=False), (3, 3, 3))])
def test_a_training_step_stays_on_the_gpu_and_never_waits(flags, sizes, gpu):
    cfg = settings(**flags)
    assert cfg.dtype == "bfloat16" and cfg.compile
    state, norm = train(cfg, gpu, sizes)
    assert norm.device.type == "gpu"
    for p in state.weights.values():
        assert p.dtype == torch.float32 and state.optimizer.state[p]["exp_avg"].device.type == "gpu"
    frozen = {p.dtype for name, p in state.net.named_parameters() if name.endswith("base.weight")}
    assert frozen == ({torch.bfloat16} if cfg.lora_rank else set())


def test_the_products_of_blocks_are_computed_in_bf16(gpu):
    with predict.Tracker(gpu) as tracker:
        train(settings(), gpu)
    flops = Counter()
    for work in tracker.work:
        flops[work.kind] += work.flops
    assert 0 < flops["fp32"] < 0.05 * flops["matmul"] and flops["attention"] > 0, "the time path and the head"


def test_a_training_step_on_several_gpus(gpu, world=8):
    """Each block's products travel in bf16, and no whole fp32 gradient is left between micro-batches."""
    cfg = replace(settings(), batch=4 * world, shard=True)
    with predict.one_of(world):
        ranks = common.Ranks(0, world, gpu)
        net = train_df.set_up(cfg, wan(gpu, *train_df.formats(cfg), num_layers=2), ranks)
        state = train_df.new_state(cfg, net, (3, 3, 3), ranks)
        train_df.errors(cfg, net, fake_batch(cfg, (3, 3, 3)).to(gpu)).sum().backward()
        held = sum(p.grad.to_local().nbytes for p in state.weights.values())
        whole = sum(4 * p.numel() for p in state.weights.values())
        assert held < 1.1 * whole / world
        block, travelled = net.blocks[0], []
        gathered = torch.ops.c10d._allgather_base_.default

        class Gathers(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func == gathered:
                    travelled.append(args[0].nbytes)
                return func(*args, **(kwargs or {}))

        with Gathers(), torch.no_grad():
            train_df.errors(cfg, net, fake_batch(cfg, (3, 3, 3)).to(gpu))
        products = sum(p.numel() for layer in block.modules() if isinstance(layer, torch.nn.Linear)
                       for p in layer.parameters())
        assert len(travelled) == 3 and all(2 * products <= size < 2.1 * products for size in travelled[1:])


def test_the_loader_pins_what_it_reads(tmp_path, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    fill_store(tmp_path / "agg_0", ["seed"] * 4, (6, 4, 4, 4))
    samples = train_df.Samples(train_df.Config(str(tmp_path / "agg_0"), mode="rf", held_out=0))
    batch = samples.micro_batch((0, range(2)))
    tensors = [x for x in batch if isinstance(x, torch.Tensor)]
    assert len(tensors) == 9 and {id(x) for x in tensors} == {id(x) for x in pinned}


# ------------------------------------------------------------------------------ sampling, and the rest

@torch.no_grad()
@pytest.mark.parametrize("route", [None, 1])
def test_a_cached_step_never_waits(route, gpu):
    net = wan(gpu)
    net.route = route
    x, t = torch.randn(2, 9, *SHAPE, device=gpu), torch.rand(2, 9, device=gpu)
    text = torch.stack(texts(1, gpu) * 2)
    cache = net.new_cache(2, 12, *SHAPE[1:])
    net(x[:, :6], t[:, :6], text, cache=cache)
    step = (x[:, 6:], t[:, 6:], text)
    net(*step, cache=cache, start=6)  # tables, mean keys
    with NeverWaits():
        v = net(*step, cache=cache, start=6)
    assert v.device.type == "gpu" and v.dtype == torch.float32 and cache.k.dtype == torch.bfloat16


@pytest.mark.parametrize("solver,route", [("euler", None), ("euler", 1), ("unipc", None), ("renoise", None)])
def test_rollouts(solver, route, gpu):
    cfg = rollout.Config("model_0", round=0, steps=2, solver=solver)
    net = wan(gpu)
    net.route = route
    clips = [{"id": str(i), "latents": torch.randn(12, *SHAPE, dtype=torch.float16), "text": text}
             for i, text in enumerate(texts(2))]
    latents = rollout.roll_out(cfg, net, clips, texts(1)[0])
    assert latents.shape == (2, 12, *SHAPE)
    assert latents.device.type == "gpu" and latents.dtype == torch.float32


@pytest.mark.parametrize("options", [
    dict(frames=9, window=9), dict(frames=15, window=9, keep=3), dict(frames=15, window=9, sink=1),
    dict(frames=9, window=9, chunk=None)])
def test_videos(options, gpu):
    """Guided by prompt and history, through slides with a frame that is encoded anew, and with a sink."""
    coder = predict.network(lambda: vae.WanVAE(width=32, blocks=1), gpu, torch.bfloat16)
    past = 0.0 if "chunk" in options else 1.2
    sampling = diffusion.Sampling(1, history=past, context_noise=0.2 if past else 0.0)
    slides = options.get("keep", 0)
    film = diffusion.Film(coder, slides or 3, "first" if slides else "as-is")
    chunks = diffusion.generate(wan(gpu), texts(1), texts(1)[0], sampling, shape=SHAPE, reenter=film.reenter,
                                **{"keep": 3} | options)
    videos = [film.show(latents) for _, latents in chunks]
    assert sum(video.shape[1] for video in videos) == 4 * options["frames"] - 3
    assert all(video.device.type == "gpu" and video.shape[3:] == (128, 208) for video in videos)


@torch.no_grad()
def test_clips_and_captions(gpu):
    coder = predict.network(lambda: vae.WanVAE(width=32, blocks=1), gpu, torch.bfloat16)
    small = dict(vocab=100, dim=64, dim_attn=64, dim_ffn=64, heads=4, layers=2)
    encoder = predict.network(lambda: t5.Encoder(**small), gpu, torch.bfloat16)
    latents = coder.encode(torch.rand(1, 9, 3, 64, 64, device=gpu))
    assert latents.shape == (1, 3, 16, 8, 8) and coder.decode(latents).device.type == "gpu"
    assert encoder(torch.zeros(2, 7, dtype=torch.int64, device=gpu)).dtype == torch.bfloat16


# --------------------------------------------------------------------------------- faults that are found

def sabotage(patch, where, name, change):
    before = getattr(where, name)
    patch.setattr(where, name, lambda *given, **more: change(before(*given, **more)))


@pytest.mark.parametrize("where,name,change", [
    (model, "sinusoid", lambda x: x.cpu()),
    (model, "sinusoid", lambda x: x * x.sum().item()),
    (model, "norm", lambda x: x if x.sum() > 0 else -x),
    (diffusion, "add_noise", lambda x: x.cpu().to("gpu", non_blocking=True)),
    (diffusion, "velocity", lambda x: x + torch.tensor(x[0, 0, 0, 0].tolist(), device="gpu")),
    (train_df, "clip_losses", lambda x: x.cpu()),
    (model.Block, "text_kv", lambda kv: (kv[0].float(), kv[1])),
])
def test_faults_are_found(where, name, change, gpu, monkeypatch):
    sabotage(monkeypatch, where, name, change)
    with pytest.raises((RuntimeError, AssertionError)):  # of fake tensors', DataDependentOutputException too
        train(settings(), gpu)
