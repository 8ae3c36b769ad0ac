"""How fast each stage is, against the hardware's limit and against peers.

    python bench.py vae --width 32 --frames 33 --size 128x128      # our VAE against diffusers'
    python bench.py train --frames 81 --size 32x32                 # a step against its bare passes
    python bench.py generate --frames 81 --size 32x32              # generation against its bare forwards
    python bench.py train --model 1.3B --frames 81 --size 832x480 --batch 4 --device cuda --dtype bfloat16
    python bench.py plan --videos clips/ --out run                 # what a real run of bagger.sh will take
"""

import platform
import re
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

import common
import data
import diffusion
import model
import train_df
import vae
from common import UserError, positional, run

MODELS = {"toy": model.Config(dim=128, ffn_dim=512, num_heads=4, num_layers=4, text_dim=64, text_len=32),
          "1.3B": model.Config()}


@dataclass
class Config:
    what: Literal["vae", "train", "generate", "plan"] = positional()  # the stage to measure
    width: int = 32  # base width of the VAE; Wan2.1's is 96
    model: Literal["toy", "1.3B"] = "toy"  # the transformer's sizes; its weights are random
    frames: int = 33  # of the video, 4n+1
    size: str = "128x128"  # of the video, WIDTHxHEIGHT
    batch: int = 16  # clips in a training step, or videos made at once
    micro: int = 16  # clips computed at once in training
    steps: int = 10  # of the solver for each chunk
    repeats: int = 5  # of every measurement; the median is shown
    videos: str = ""  # plan: the videos to train on
    out: str = "run"  # plan: where the run will go; its disk must hold it
    rounds: int = 3  # plan: of rollouts
    train_steps: int = 16000  # plan: of each training
    train_batch: int = 96  # plan: clips in a step, over all GPUs
    device: str = "cpu"  # cpu, cuda or cuda:N
    dtype: Literal["float32", "bfloat16"] = "float32"  # of weights and activations


def main(cfg: Config):
    threads = f"{torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(cfg.device) if cfg.device.startswith("cuda") else f"{cpu()}, {threads}"
    print(f"{name}, torch {torch.__version__}, {cfg.dtype}", flush=True)
    {"vae": bench_vae, "train": bench_train, "generate": bench_generate, "plan": plan}[cfg.what](cfg)


def cpu():
    info = Path("/proc/cpuinfo")  # Linux only, and the only place that names the CPU there
    name = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return name[1] if name else platform.processor()


def size(cfg) -> tuple[int, int]:
    if not (match := re.fullmatch(r"(\d+)x(\d+)", cfg.size)):
        raise UserError(f"--size {cfg.size}: must be WIDTHxHEIGHT, like 128x128")
    return int(match[1]), int(match[2])


def latent_shape(cfg) -> tuple[int, ...]:
    width, height = size(cfg)
    return (cfg.frames - 1) // 4 + 1, 16, height // 8, width // 8


def alternate(repeats: int, device: str, *functions) -> list[float]:
    """Median seconds of each; they take turns, so that a slow spell of the machine hits all alike."""
    def seconds(function):
        start = time.perf_counter()
        function()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for function in functions:  # the first call also plans and allocates
        seconds(function)
    rounds = [[seconds(function) for function in functions] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


@torch.no_grad()
def bench_vae(cfg: Config):
    """The same random weights and input, through our VAE and through diffusers'."""
    try:
        from diffusers import AutoencoderKLWan
    except ImportError:
        raise UserError("bench.py vae compares with diffusers: pip install diffusers") from None
    width, height = size(cfg)
    dtype = getattr(torch, cfg.dtype)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        AutoencoderKLWan(base_dim=cfg.width).save_pretrained(folder)
        ours = vae.load(folder, cfg.device, dtype)
        theirs = AutoencoderKLWan.from_pretrained(folder, torch_dtype=dtype, low_cpu_mem_usage=False)
    theirs.to(cfg.device)

    video = torch.rand(1, cfg.frames, 3, height, width, device=cfg.device, dtype=dtype) * 2 - 1
    mean = ours.posterior(video)[0]
    z = ours.normalise(mean)
    their_video, their_mean = (x.transpose(1, 2).contiguous().to(dtype) for x in (video, mean))
    pairs = {"encode": (lambda: ours.posterior(video)[0],
                        lambda: theirs.encode(their_video).latent_dist.mode()),
             "decode": (lambda: ours.decode(z), lambda: theirs.decode(their_mean).sample)}
    print(f"width {cfg.width}, {cfg.frames} frames of {cfg.size}, median of {cfg.repeats}\n\n"
          "|        | ours, s | diffusers, s | ratio | ours, clips/s | ours, frames/s | max difference |\n"
          "|--------|---------|--------------|-------|---------------|----------------|----------------|")
    for name, (us, them) in pairs.items():
        off = (us().float() - them().transpose(1, 2).float()).abs().max().item()
        a, b = alternate(cfg.repeats, cfg.device, us, them)
        print(f"| {name} | {a:7.3f} | {b:12.3f} | {b / a:5.2f} | {1 / a:13.3f} | {cfg.frames / a:14.1f} |"
              f" {off:14.1e} |", flush=True)


def bench_train(cfg: Config):
    """Steps of train_df.py, from clips on disk, against forward, backward and AdamW on a batch at hand."""
    with tempfile.TemporaryDirectory() as folder:
        folder, sizes = Path(folder), MODELS[cfg.model]
        entries = []
        for i in range(cfg.batch):
            latents, text = torch.randn(latent_shape(cfg)), torch.randn(8, sizes.text_dim)
            data.write_clip(folder, str(i), latents, text, "a prompt", "a.mp4")
            entries.append({"id": str(i), "file": f"clips/{i}.safetensors", "kind": "seed"})
        data.write_text_embedding(folder / "empty.safetensors", torch.zeros(1, sizes.text_dim))
        data.write_index(folder, entries)
        common.claim(Path(folder, "meta.json"), {"latents": latent_shape(cfg)})
        model.save(model.WanModel(sizes).init_weights("bench"), folder / "init")

        ranks = common.start_ranks(cfg.device)
        flags = train_df.Config(*map(str, (folder, folder / "init", folder)), batch=cfg.batch, held_out=0,
                                micro=cfg.micro, preview_every=0, dtype=cfg.dtype, device=cfg.device)
        flags = train_df.complete(flags, ranks)
        clips = train_df.Clips(flags)
        state = train_df.begin(flags, clips, ranks)
        micro = common.ahead(clips.micro_batch, train_df.shares(flags, ranks, 0))
        held = [clips.micro_batch((0, range(k, min(k + cfg.micro, cfg.batch)))).to(ranks.device)
                for k in range(0, cfg.batch, cfg.micro)]

        def bare():
            for batch in held:
                x = diffusion.add_noise(batch.x0, batch.noise, batch.t)
                error = state.net(x, batch.t, batch.text) - diffusion.velocity(batch.x0, batch.noise)
                (error.square().mean() * len(x) / cfg.batch).backward()
            state.optimizer.step()
            state.optimizer.zero_grad()

        def step():
            train_df.train_step(flags, state, micro, 0, ranks)
        ours, theirs = alternate(cfg.repeats, cfg.device, step, bare)
        micro.close()
        dist.destroy_process_group()
    flops = 3 * cfg.batch * model.forward_flops(sizes, clips.layout())
    tokens = clips.layout()[-1][1]
    print(f"{cfg.model}, {cfg.batch} clips of {tokens:,} tokens, {cfg.micro} at a time: {ours:.3f} s a step, "
          f"bare {theirs:.3f} s, {ours / theirs:.2f}x")
    peak = common.peak_flops(ranks.device)
    print(f"{cfg.batch / ours:.2f} clips/s, {flops / ours / 1e12:.2f} TFLOP/s"
          + (f", MFU {flops / ours / peak:.1%}" if peak else "")
          + f", {train_df.memory_used(ranks.device):.1f} GB at most")
    return ours


def plan(cfg: Config):
    """Clips, disk and GPU hours of a real run on Wan2.1-T2V-1.3B; refuses if the disk cannot hold it."""
    clips = len(data.find_clips(cfg.videos))
    rollouts, models = clips // 2 * cfg.rounds, cfg.rounds + 1
    with torch.device("meta"):
        weights = sum(p.numel() for p in model.WanModel(model.Config()).parameters())
    clip = 2 * 21 * 16 * 60 * 104 + 2 * 200 * 4096  # fp16 latents; bf16 text of some 200 tokens
    # a rollout is kept as made and as reversed; a model beside two checkpoints of weights and two moments
    parts = {"clips": clips * clip, "rollouts": 2 * rollouts * clip,
             "models": models * weights * 4 * (1 + 2 * 3)}
    need, folder = sum(parts.values()), Path(cfg.out).resolve()
    there = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free + there
    print(f"{clips:,} clips, {cfg.rounds} rounds of {clips // 2:,} rollouts, {models} trainings of "
          f"{cfg.train_steps:,} steps of {cfg.train_batch} clips")
    print("disk: " + " + ".join(f"{name} {size / 1e9:.0f} GB" for name, size in parts.items())
          + f" = {need / 1e9:.0f} GB; {free / 1e9:.0f} GB for it in {folder}")
    if need > free:
        raise UserError(f"{folder} is {(need - free) / 1e9:.0f} GB too small; choose another OUT, or fewer "
                        "clips or ROUNDS")
    if not torch.cuda.is_available():
        return print("GPU hours: no GPU here to measure a step on")
    shown = replace(cfg, model="1.3B", frames=81, size="832x480", batch=4, micro=1, steps=2, repeats=3,
                    device="cuda", dtype="bfloat16")
    training = bench_train(shown) / shown.batch * models * cfg.train_steps * cfg.train_batch / 3600
    rolling = bench_generate(replace(shown, batch=1)) * 20 / shown.steps * rollouts / 3600
    print(f"GPU hours: about {training:,.0f} of training, {rolling:,.0f} of rollouts")


@torch.no_grad()
def bench_generate(cfg: Config):
    """generate() against the forwards it consists of, made with tensors at hand."""
    sizes, (frames, *shape) = MODELS[cfg.model], latent_shape(cfg)
    net = model.WanModel(sizes, getattr(torch, cfg.dtype)).init_weights("bench").to(cfg.device)
    if cfg.device.startswith("cuda"):
        net.compile_blocks()
    text = [torch.randn(8, sizes.text_dim, device=cfg.device) for _ in range(cfg.batch)]
    null, count = torch.zeros(1, sizes.text_dim, device=cfg.device), 0

    def generate():
        diffusion.generate(net, text, null, shape=shape, frames=frames, steps=cfg.steps, window=frames,
                           keep=3)

    def bare():
        nonlocal count
        count, words = 0, model.pad_text(2 * text)
        cache = net.new_cache(2 * cfg.batch, frames, *shape[1:])
        x = torch.randn(2 * cfg.batch, 3, *shape, device=cfg.device)
        t = torch.full((2 * cfg.batch, 3), 500.0, device=cfg.device)
        for start in range(0, frames, 3):
            for _ in range(cfg.steps + (start + 3 < frames)):  # and one that writes the finished chunk
                net(x, t, words, chunk=(3,), cache=cache, start=start)
                count += 1
    ours, theirs = alternate(cfg.repeats, cfg.device, generate, bare)
    print(f"{cfg.model}, {cfg.batch} videos of {cfg.frames} frames of {cfg.size}, {cfg.steps} steps a chunk, "
          f"guided: {ours:.3f} s, its {count} forwards {theirs:.3f} s, {ours / theirs:.2f}x, "
          f"{cfg.batch * cfg.frames / ours:.1f} frames/s")
    return ours


if __name__ == "__main__":
    run(main, Config, __doc__)
