"""Benchmarks of each stage, against the limit of the hardware and against peers.

    python bench.py vae --width 32 --frames 33 --size 128x128      # the VAE against diffusers'
    python bench.py train --frames 81 --size 32x32                 # a training step against its bare passes
    python bench.py modes --frames 81 --size 32x32                 # a training step by mode
    python bench.py generate --frames 81 --size 32x32              # generation against its bare forwards
    python bench.py history --frames 765 --size 192x192 --batch 1 --steps 1  # time by length of the past
    python bench.py train --model 1.3B --frames 81 --size 832x480 --batch 4 --device cuda --dtype bfloat16
    python bench.py times --out toy_run                            # where the time of a run of bagger.sh went
    python bench.py plan --size 1.3B --gpus 8 --gpu h100           # memory, hours and disk of the paper's run
    python bench.py plan --wan Wan2.1-T2V-1.3B --videos clips/     # of a run of bagger.sh, with its flags
"""

import contextlib
import platform
import re
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

from flags import Count, Device, Dtype, Seconds, Size, Whole, in_range, parse, positional


@dataclass
class Config:
    # What to measure; times: where the time of a run of bagger.sh went
    what: Literal["vae", "train", "modes", "generate", "history", "times"] = positional()
    out: str = "toy_run"  # Folder of that run (times)
    width: Count = 32  # Base width of the VAE (vae); Wan2.1's is 96
    model: Literal["toy", "wide", "1.3B"] = "toy"  # Size of the transformer; its weights are random
    frames: Count = 33  # Frames of a video, 4n+1
    size: Size = "128x128"  # Size of a video, WIDTHxHEIGHT
    batch: Count = 16  # Clips per training step, or videos generated at once (generate, history)
    micro: Count = 16  # Clips per forward and backward pass (train, modes)
    steps: Count = 10  # Solver steps per chunk (generate, history)
    route: Count = 5  # Past chunks that a query attends to where history is routed (history)
    sink: Count = 1  # Chunks that stay in a rolling window (history)
    window: Count = 21  # Latent frames of this window (history)
    repeats: Count = 5  # Repetitions of each measurement, of which the median is shown
    soak: Whole = 200  # Further steps over which the growth of memory is measured (train)
    device: Device = "cpu"  # Device to measure on: cpu, cuda or cuda:N
    dtype: Dtype = "float32"  # Data type of weights and activations

    __post_init__ = in_range


@dataclass
class Plan:
    what: Literal["plan"] = positional()  # The cost of a run of bagger.sh
    size: Literal["1.3B", "14B"] = "1.3B"  # Size of the model, if there is no --wan
    # GPUs that the plan is for (default: the kind that is here, or h100)
    gpu: Literal["h100", "h200", "a100", "4090"] | None = None
    gpus: Count | None = None  # GPUs of a machine (default: as --nproc says, or 8 where there are none)
    nodes: Count = 1  # Number of machines
    lora_rank: Count | None = None  # Train a LoRA of this rank
    wan: str = ""  # Wan directory that training starts from (default: none, sizes are --size's)
    videos: str = ""  # Videos to train on, as for prepare.py (default: 55,000, as the paper's)
    out: str = "run"  # Folder of the run, on the disk that must hold it; with --wan
    rounds: Count = 3  # Rounds of rollouts and training
    prompts: str = "prompts.txt"  # Prompts of the videos to make with each model
    seconds: Seconds = 50.0  # Length of these videos
    # Also make the seed model's videos with noised context and with history guidance
    baselines: bool = False
    nproc: str = "gpu"  # Processes on each machine, or gpu for one per GPU
    prepare: str = ""  # Further flags for prepare.py, in one string
    train: str = ""  # Further flags for train_df.py
    rollout: str = ""  # Further flags for rollout.py
    aggregate: str = ""  # Further flags for aggregate.py
    sample: str = ""  # Further flags for sample.py
    eval: str = ""  # Further flags for eval_drift.py

    __post_init__ = in_range


if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    cfg = parse(Plan if sys.argv[1:2] == ["plan"] else Config, __doc__)

import torch
import torch.distributed as dist

import common
import data
import diffusion
import model
import train_df
import vae
from common import UserError, run

MODELS = {"toy": model.Config(dim=128, ffn_dim=512, num_heads=4, num_layers=4, text_dim=64, text_len=32),
          "wide": model.Config(dim=512, ffn_dim=2048, num_heads=4, num_layers=2, text_dim=64, text_len=32),
          "1.3B": model.Config()}


def main(cfg: Config):
    common.checked(cfg.device)
    threads = f"{torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(cfg.device) if cfg.device.startswith("cuda") else f"{cpu()}, {threads}"
    print(f"{name}, torch {torch.__version__}, {cfg.dtype}", flush=True)
    benches = {"vae": bench_vae, "train": bench_train, "modes": bench_modes, "generate": bench_generate,
               "history": bench_history, "times": show_times}
    benches[cfg.what](cfg)


def show_times(cfg):
    """A table of what bagger.sh noted in times.txt: when each stage began, in seconds."""
    file = Path(cfg.out, "times.txt")
    if not file.exists():
        raise UserError(f"no such file: {file}; give the --out of a run of bagger.sh")
    began = [line.split("\t", 1) for line in file.read_text().splitlines()]
    kinds = {"toy world": "toy.py", "seed data": "prepare.py", "train model": "train_df.py",
             "roll model": "rollout.py", "backwards": "aggregate.py", "videos of": "sample.py",
             "drift": "eval_drift.py"}
    spent = defaultdict(list)
    for (start, name), (end, _) in pairwise(began):
        script = next((script for words, script in kinds.items() if words in name), name)
        spent[script].append(int(end) - int(start))
    total = sum(map(sum, spent.values()))
    unfinished = "" if began and began[-1][1].startswith("done") else ", so far"
    print(f"{total} s in all{unfinished}\n")
    print("| stage | times | seconds each | seconds | share |\n|---|---|---|---|---|")
    for script, seconds in spent.items():
        print(f"| `{script}` | {len(seconds)} | {statistics.median(seconds):.0f} | {sum(seconds)} | "
              f"{sum(seconds) / max(total, 1):.0%} |")


def cpu():
    info = Path("/proc/cpuinfo")  # on Linux, where platform.processor() does not name the CPU
    name = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return name[1] if name else platform.processor()


def size(cfg) -> tuple[int, int]:
    width, height = cfg.size.split("x")
    return int(width), int(height)


def latent_shape(cfg) -> tuple[int, ...]:
    width, height = size(cfg)
    return (cfg.frames - 1) // 4 + 1, 16, height // 8, width // 8


def alternate(repeats: int, device: str, *functions) -> list[float]:
    """Median seconds of each function; they alternate, so that a slow phase of the machine affects all."""
    def seconds(function):
        start = time.perf_counter()
        function()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for function in functions:  # the first call also allocates and compiles
        seconds(function)
    rounds = [[seconds(function) for function in functions] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


@torch.no_grad()
def bench_vae(cfg: Config):
    """Encodes and decodes a random video with this VAE and with diffusers', which has the same weights."""
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
    for name, (run_ours, run_theirs) in pairs.items():
        difference = (run_ours().float() - run_theirs().transpose(1, 2).float()).abs().max().item()
        a, b = alternate(cfg.repeats, cfg.device, run_ours, run_theirs)
        print(f"| {name} | {a:7.3f} | {b:12.3f} | {b / a:5.2f} | {1 / a:13.3f} | {cfg.frames / a:14.1f} |"
              f" {difference:14.1e} |", flush=True)


class Training(NamedTuple):
    flags: train_df.Config
    clips: train_df.Samples
    state: train_df.State
    run: Callable  # one step
    in_mode: Callable  # given a mode, one step of the same network in that mode


@contextlib.contextmanager
def training(sizes: model.Config, latents, flags: train_df.Config):
    """train_df.py with random weights on random clips, in a temporary folder."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        entries = []
        for i in range(flags.batch):
            text = torch.randn(8, sizes.text_dim)
            data.write_clip(folder, str(i), torch.randn(latents), text, "a prompt", "a.mp4")
            entries.append({"id": str(i), "file": f"clips/{i}.safetensors", "kind": "seed"})
        data.write_text_embedding(folder / "empty.safetensors", torch.zeros(1, sizes.text_dim))
        data.write_index(folder, entries)
        common.claim(Path(folder, "meta.json"), {"latents": latents})
        model.save(model.WanModel(sizes).init_weights("bench"), folder / "init")

        ranks = common.start_ranks(flags.device)
        stack.callback(dist.destroy_process_group)
        flags = replace(flags, data=str(folder), init=str(folder / "init"), out=str(folder / "model"),
                        held_out=0, corrective_share=None, preview_every=0, rf_warmup=0)
        flags = train_df.complete(flags, ranks)
        clips = train_df.Samples(flags)
        state = train_df.begin(flags, clips, ranks)

        def in_mode(mode):
            changed = replace(flags, mode=mode)
            micro = common.ahead(train_df.Samples(changed).micro_batch, train_df.shares(changed, ranks, 0))
            stack.callback(micro.close)
            return lambda: train_df.train_step(changed, state, micro, 0, ranks)
        yield Training(flags, clips, state, in_mode(flags.mode), in_mode)


def bench_train(cfg: Config):
    """Steps of train_df.py, from clips on disk, against forward, backward and AdamW on a batch in memory."""
    sizes = MODELS[cfg.model]
    flags = train_df.Config("", batch=cfg.batch, micro=cfg.micro, dtype=cfg.dtype, device=cfg.device,
                            ema=0.995 if cfg.model == "toy" else 0.0)  # as bagger.sh trains it
    with training(sizes, latent_shape(cfg), flags) as (flags, clips, state, step, _):
        batches = [clips.micro_batch((0, range(k, min(k + cfg.micro, cfg.batch)))).to(cfg.device)
                   for k in range(0, cfg.batch, cfg.micro)]

        def bare():
            for batch in batches:
                x = diffusion.add_noise(batch.x0, batch.noise, batch.t)
                error = state.net(x, batch.t, batch.text) - diffusion.velocity(batch.x0, batch.noise)
                (error.square().mean() * len(x) / cfg.batch).backward()
            state.optimizer.step()
            state.optimizer.zero_grad()
        ours, theirs = alternate(cfg.repeats, cfg.device, step, bare)
        before = resident()
        for _ in range(cfg.soak):
            step()
        growth = (resident() - before) * 1000 / max(cfg.soak, 1)
    flops = cfg.batch * train_df.clip_flops(flags, clips, sizes)
    tokens = clips.layout()[-1][1]
    print(f"{cfg.model}, {cfg.batch} clips of {tokens:,} tokens, {cfg.micro} at a time: {ours:.3f} s a step, "
          f"bare {theirs:.3f} s, {ours / theirs:.2f}x")
    peak = common.peak_flops(torch.device(cfg.device))
    print(f"{cfg.batch / ours:.2f} clips/s, {flops / ours / 1e12:.2f} TFLOP/s"
          + (f", MFU {flops / ours / peak:.1%}" if peak else "")
          + f", {common.memory_used(torch.device(cfg.device)):.2f} GB at most, "
          f"{growth:+.2f} GB of main memory per 1,000 steps (over {cfg.soak})")


def bench_modes(cfg: Config):
    """Steps of train_df.py in each causal mode, which take turns, beside what their FLOPs let expect."""
    sizes = MODELS[cfg.model]
    flags = train_df.Config("", batch=cfg.batch, micro=cfg.micro, dtype=cfg.dtype, device=cfg.device)
    modes = ("df", "tf", "rf")
    with training(sizes, latent_shape(cfg), flags) as step:
        times = alternate(cfg.repeats, cfg.device, *map(step.in_mode, modes))
        samples = [train_df.Samples(replace(step.flags, mode=mode)) for mode in modes]
    flops = [train_df.clip_flops(s.cfg, s, sizes) for s in samples]
    tokens = samples[0].layout()[0][1]
    print(f"{cfg.model}, {cfg.batch} clips of {cfg.frames} frames, {tokens} tokens a chunk, {cfg.micro} at a "
          f"time; median of {cfg.repeats}\n\n"
          "| mode | s a step | of df | by FLOPs |\n"
          "|------|----------|-------|----------|")
    for mode, seconds, count in zip(modes, times, flops, strict=True):
        print(f"| {mode}   | {seconds:8.3f} | {seconds / times[0]:5.2f} | {count / flops[0]:8.2f} |")


def resident() -> float:
    """GB of this process in main memory; 0 where there is no /proc."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * resource.getpagesize() / 1e9 if pages.exists() else 0.0


@torch.no_grad()
def bench_generate(cfg: Config):
    """generate() against the forwards it consists of, on tensors in memory."""
    sizes = MODELS[cfg.model]
    frames, *shape = latent_shape(cfg)
    net = model.WanModel(sizes, getattr(torch, cfg.dtype)).init_weights("bench").to(cfg.device)
    if cfg.device.startswith("cuda"):
        net.compile_blocks()
    text = [torch.randn(8, sizes.text_dim, device=cfg.device) for _ in range(cfg.batch)]
    null = torch.zeros(1, sizes.text_dim, device=cfg.device)
    count = 0

    def generate():
        list(diffusion.generate(net, text, null, diffusion.Sampling(cfg.steps), shape=shape, frames=frames,
                                window=frames, keep=3))

    def bare():
        nonlocal count
        count = 0
        words = model.pad_text(2 * text)
        cache = net.new_cache(2 * cfg.batch, frames, *shape[1:])
        x = torch.randn(2 * cfg.batch, 3, *shape, device=cfg.device)
        t = torch.full((2 * cfg.batch, 3), 500.0, device=cfg.device)
        for start in range(0, frames, 3):
            for _ in range(cfg.steps + (start + 3 < frames)):  # one more caches the finished chunk
                net(x, t, words, chunk=(3,), cache=cache, start=start)
                count += 1
    ours, theirs = alternate(cfg.repeats, cfg.device, generate, bare)
    print(f"{cfg.model}, {cfg.batch} videos of {cfg.frames} frames of {cfg.size}, {cfg.steps} steps a chunk, "
          f"guided: {ours:.3f} s, its {count} forwards {theirs:.3f} s, {ours / theirs:.2f}x, "
          f"{cfg.batch * cfg.frames / ours:.1f} frames/s")


@torch.no_grad()
def bench_history(cfg: Config):
    """Seconds per chunk against the number of chunks before it: with all of them in view, with history
    routing, and with a rolling window. The three take turns at every chunk."""
    sizes = MODELS[cfg.model]
    frames, *shape = latent_shape(cfg)
    net = model.WanModel(sizes, getattr(torch, cfg.dtype)).init_weights("bench").to(cfg.device)
    text = [torch.randn(8, sizes.text_dim, device=cfg.device) for _ in range(cfg.batch)]
    sampling = diffusion.Sampling(cfg.steps, guidance=1.0)

    def stream(route, **options):
        chunks = diffusion.generate(net, text, None, sampling, shape=shape, frames=frames, **options)
        while True:
            net.route = route
            start = time.perf_counter()
            if next(chunks, None) is None:
                return
            if cfg.device.startswith("cuda"):
                torch.cuda.synchronize(cfg.device)
            yield time.perf_counter() - start

    streams = (stream(None, window=frames, keep=3), stream(cfg.route, window=frames, keep=3),
               stream(None, window=cfg.window, sink=cfg.sink))
    times = list(zip(*streams, strict=True))
    print(f"{cfg.model}, {cfg.batch} videos of {shape[1] * shape[2] // model.PATCH**2 * 3} tokens a chunk, "
          f"{cfg.steps} steps a chunk, unguided; median seconds of a chunk\n\n"
          f"| chunks  | all of the past | route {cfg.route:2} | window of {cfg.window}, sink {cfg.sink} |\n"
          "|---------|-----------------|----------|----------------------|")
    for first in range(0, len(times), 8):
        part = times[first:first + 8]
        dense, routed, rolled = (statistics.median(column) for column in zip(*part, strict=True))
        print(f"| {first + 1:2} .. {first + len(part):2} | {dense:15.3f} | {routed:8.3f} | {rolled:20.3f} |")


if __name__ == "__main__":
    if isinstance(cfg, Plan):
        import plan
        main = plan.main
    run(main, cfg)
