"""Benchmarks of each stage, against the limit of the hardware and against peers.

    python bench.py vae --width 32 --frames 33 --size 128x128      # the VAE against diffusers'
    python bench.py train --frames 81 --size 32x32                 # a training step against its bare passes
    python bench.py modes --frames 81 --size 32x32                 # a training step by mode
    python bench.py generate --frames 81 --size 32x32              # generation against its bare forwards
    python bench.py history --frames 765 --size 192x192 --batch 1 --steps 1  # time by length of the past
    python bench.py train --model 1.3B --frames 81 --size 832x480 --batch 4 --device cuda --dtype bfloat16
    python bench.py plan --wan Wan2.1-T2V-1.3B --videos clips/ --out run     # cost of a run of bagger.sh
"""

import contextlib
import json
import platform
import re
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from flags import Count, Device, Dtype, Seconds, Size, Whole, in_range, parse, positional


@dataclass
class Config:
    # What to measure; plan: the cost of a run of bagger.sh
    what: Literal["vae", "train", "modes", "generate", "history", "plan"] = positional()
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
    wan: str = ""  # Plan: the Wan directory that training starts from
    videos: str = ""  # Plan: the videos to train on, as for prepare.py
    out: str = "run"  # Plan: the folder of the run, on the disk that must hold it
    rounds: Count = 3  # Plan: rounds of rollouts and training
    prompts: str = "prompts.txt"  # Plan: prompts of the videos to make with each model
    seconds: Seconds = 50.0  # Plan: length of these videos
    # Plan: also make the seed model's videos with noised context and with history guidance
    baselines: bool = False
    nproc: str = "gpu"  # Plan: processes on each machine, or gpu for one per GPU
    nodes: Count = 1  # Plan: number of machines
    prepare: str = ""  # Plan: further flags for prepare.py, in one string
    train: str = ""  # Plan: further flags for train_df.py
    rollout: str = ""  # Plan: further flags for rollout.py
    aggregate: str = ""  # Plan: further flags for aggregate.py
    sample: str = ""  # Plan: further flags for sample.py
    eval: str = ""  # Plan: further flags for eval_drift.py
    device: Device = "cpu"  # Device to measure on: cpu, cuda or cuda:N
    dtype: Dtype = "float32"  # Data type of weights and activations

    __post_init__ = in_range


if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    cfg = parse(Config, __doc__)

import torch
import torch.distributed as dist

import aggregate
import common
import data
import diffusion
import eval_drift
import files
import locate
import metrics
import model
import prepare
import records
import rollout
import sample
import sources
import t5
import train_df
import vae
import vbench
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
               "history": bench_history, "plan": plan}
    benches[cfg.what](cfg)


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


# ----------------------------------------------------------------------------------------------------
# the plan of a real run: the disk that each stage takes and, if there is a GPU, its time on one GPU

class Run(NamedTuple):
    """A run of bagger.sh: the flags of its stages, and the sizes that follow from them."""
    wan: str
    listed: int  # number of videos
    clips: list[sources.Source]  # those that exist and have a caption
    tokens: float  # mean number of tokens in a caption
    rounds: int
    rollouts: int  # per round
    geometry: data.Geometry
    latents: tuple[int, ...]
    sizes: model.Config
    weights: int
    methods: int  # models, and further ways to sample the first
    guided: int  # methods with history guidance, which computes twice the branches
    videos: list[int]  # latent frames of each video
    prepare: prepare.Config
    train: train_df.Config
    rollout: rollout.Config
    aggregate: aggregate.Config
    sample: sample.Config
    eval: eval_drift.Config
    device: str | None  # measured on; None: nothing is measured


def plan(cfg: Config):
    """Prints clips, disk and GPU hours of a real run. Measurements are kept in --out; free disk space is
    checked every time."""
    facts = read_run(cfg)
    file = Path(cfg.out, "plan.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    missing = missing_weights(facts.eval.weights)
    name = facts.device and (torch.cuda.get_device_name() if facts.device == "cuda" else cpu())
    inputs = asdict(cfg) | {
        "clips": len(facts.clips), "tokens": facts.tokens, "latents": facts.latents,
        "sizes": asdict(facts.sizes), "latent frames": facts.videos, "unscored": list(missing),
        "gpu": name, "torch": torch.__version__}
    inputs = json.loads(json.dumps(inputs))  # as it will be read back, with lists for tuples
    kept = records.read(file) if file.exists() else {}
    if kept.get("inputs") != inputs:
        kept = {"inputs": inputs, "stages": {stage: measured(stage, facts) for stage in STAGES}}
        files.write_text(file, files.as_json(kept, indent=1) + "\n")
    show(cfg, facts, kept["stages"])
    print_missing(missing)
    check_disk(cfg, sum(disk for disk, _ in kept["stages"].values()))


def read_run(cfg: Config) -> Run:
    if not (cfg.wan and cfg.videos):
        raise UserError("bench.py plan needs --wan and --videos")
    cfg = replace(cfg, wan=locate.local(cfg.wan, *locate.NETWORKS))

    def flags(config, given, *fixed):  # given is split at spaces, as bagger.sh does
        return parse(config, "", [*fixed, *given.split()])

    prepared = flags(prepare.Config, cfg.prepare, "--videos", cfg.videos, "--wan", cfg.wan, "--out", "agg_0")
    trained = flags(train_df.Config, cfg.train, "--data", "agg_0")
    rolled = flags(rollout.Config, cfg.rollout, "--model", "model_0")
    trained = replace(trained, route=train_df.route_of(replace(trained, init=cfg.wan)))
    sampled = flags(sample.Config, cfg.sample, "--prompts", cfg.prompts, "--seconds", str(cfg.seconds))

    listed = sources.find_clips(cfg.videos, prepared.caption_key, prepared.root, prepared.where)
    clips = [source for source in listed if source.caption and source.path.is_file()]
    if not clips:
        raise UserError(f"{cfg.videos} lists {len(listed)} videos; none of them is there and has a caption")
    held_out = trained.held_out if rolled.held_out is None else rolled.held_out
    half = max(1, min(len(clips) // 2, len(clips) - held_out))
    tokenizer = t5.load_tokenizer(cfg.wan)
    subset = clips[::len(clips) // 1000 + 1]
    tokens = sum(len(t5.token_ids(tokenizer, source.caption)) for source in subset) / len(subset)

    geometry = data.geometry(cfg.wan, prepared.size, prepared.frames, prepared.fps)
    coder = vae.load(cfg.wan)
    latents = (coder.latent_count(geometry.frames), coder.z_dim, geometry.height // coder.space,
               geometry.width // coder.space)
    sizes = model.read_checkpoint(cfg.wan)[1]
    with torch.device("meta"):
        weights = sum(p.numel() for p in model.WanModel(sizes).parameters())
    sampled = sample.in_window(sample.settle(sampled, {}), latents[0])
    videos = [sample.latent_frames(row.get("seconds", sampled.seconds), geometry.fps, coder, 0)
              for _, row in sample.read_prompts(sampled, {}) for _ in range(sampled.samples)]
    return Run(
        cfg.wan, len(listed), clips, tokens, cfg.rounds, half if rolled.count is None else rolled.count,
        geometry, latents, sizes, weights, cfg.rounds + 1 + 2 * cfg.baselines, int(cfg.baselines), videos,
        prepared, trained, rolled, flags(aggregate.Config, cfg.aggregate, "--rollouts", "rollout_0"), sampled,
        flags(eval_drift.Config, cfg.eval, "videos_0"), measuring_device())


def measuring_device() -> str | None:
    return "cuda" if torch.cuda.is_available() else None


def measured(stage: str, facts: Run) -> tuple[float, float | None]:
    """(bytes on disk, seconds of one GPU or None)"""
    if facts.device:
        print(f"measuring {stage} ...", flush=True)
        torch.cuda.empty_cache()
        torch.compiler.reset()  # the stages together would exceed the limit on recompilation
    try:
        return STAGES[stage](facts)
    except torch.OutOfMemoryError:
        return STAGES[stage](facts._replace(device=None))


def clip_bytes(facts: Run) -> float:
    return (torch.Size(facts.latents).numel() * data.LATENT_DTYPE.itemsize
            + facts.tokens * facts.sizes.text_dim * data.TEXT_DTYPE.itemsize)


def plan_prepare(facts: Run):
    count = len(facts.clips)
    seconds = None
    if facts.device:
        encode, _ = time_vae(facts, facts.prepare)  # two threads read at the same time
        seconds = count * (max(encode, time_read(facts) / 2) + time_text(facts, facts.prepare))
    return count * clip_bytes(facts), seconds


def plan_train(facts: Run):
    """A model takes fp32 weights, and checkpoints of weights, two moments and perhaps averaged weights. A new
    checkpoint is written before the oldest is removed."""
    flags = facts.train
    models = facts.rounds + 1
    seconds = None
    checkpoint = 4 * (3 + (flags.ema > 0)) * facts.weights
    if facts.device:
        seconds = models * flags.steps * flags.batch * time_training(facts)
    return models * (4 * facts.weights + flags.keep * checkpoint) + checkpoint, seconds


def plan_rollout(facts: Run):
    count = facts.rounds * facts.rollouts
    frames = facts.latents[0]
    seconds = None
    if facts.device:
        seconds = count * time_generate(facts, facts.rollout, frames, frames, rollout.CHUNK, rollout.CHUNK)
    return count * clip_bytes(facts), seconds


def plan_aggregate(facts: Run):
    count = facts.rounds * facts.rollouts
    seconds = None
    if facts.device:
        text = time_text(facts, facts.aggregate) if facts.aggregate.rewrite else 0
        seconds = count * (sum(time_vae(facts, facts.aggregate)) + text)
    return count * clip_bytes(facts), seconds


def plan_sample(facts: Run):
    facts = as_sampled(facts)
    flags = facts.sample
    frames = facts.methods * sum(facts.videos)
    pixels = facts.geometry.width * facts.geometry.height
    seconds = None
    if facts.device:
        window = flags.window
        slide = window - flags.keep if flags.sink is None else sample.CHUNK
        first = time_generate(facts, flags, window, window, flags.keep)
        again = time_generate(facts, flags, window + slide, window, flags.keep) - first
        latents = sum(first * min(n / window, 1) + again * max(n - window, 0) / slide for n in facts.videos)
        decode = time_vae(facts, flags)[1] / facts.latents[0]
        seconds = (facts.methods + facts.guided) * latents + frames * decode
    return frames * 4 * pixels / 8, seconds  # h264 at crf 18 takes less than a bit a pixel


def plan_eval(facts: Run):
    """Takes little disk. A thread reads videos at the same time."""
    facts = as_sampled(facts)
    seconds = None
    if facts.device:
        frame = max(time_scores(facts), time_read(facts) / facts.geometry.frames)
        seconds = facts.methods * sum(facts.videos) * 4 * frame
    return 0, seconds


def as_sampled(facts: Run) -> Run:
    """The run at the size of the videos to make, which may differ from that of the clips."""
    geometry = data.geometry(facts.wan, facts.sample.size)
    space = facts.geometry.height // facts.latents[2]
    return facts._replace(geometry=geometry._replace(frames=facts.geometry.frames),
                          latents=(*facts.latents[:2], geometry.height // space, geometry.width // space))


STAGES = {"prepare": plan_prepare, "train": plan_train, "rollout": plan_rollout,
          "aggregate": plan_aggregate, "sample": plan_sample, "eval": plan_eval}


# measurements in seconds, with the functions that the stages call

def precision(facts: Run, flags) -> torch.dtype:
    return getattr(torch, common.for_device(flags, torch.device(facts.device)).dtype)


@torch.no_grad()
def time_vae(facts: Run, flags) -> list[float]:
    """Seconds to encode a clip, and to decode it."""
    coder = vae.load(facts.wan, facts.device, precision(facts, flags))
    g = facts.geometry
    video = torch.rand(1, g.frames, 3, g.height, g.width, device=facts.device) * 2 - 1
    z = coder.encode(video)
    return alternate(3, facts.device, lambda: coder.encode(video), lambda: coder.decode(z))


def time_text(facts: Run, flags) -> float:
    """Seconds to encode a caption, in a batch of 16."""
    encoder = t5.load(facts.wan, facts.device, precision(facts, flags))
    captions = [source.caption for source in facts.clips[:16]]
    return alternate(3, facts.device, lambda: encoder.encode(captions))[0] / len(captions)


def time_read(facts: Run) -> float:
    """Seconds to read a clip from the first readable video among 20."""
    width, height, frames, fps = facts.geometry
    for source in facts.clips[:20]:
        with contextlib.suppress(UserError):
            video = data.probe(source.path)
            return alternate(3, "cpu", lambda v=video: data.read_clip(v, frames, fps, (width, height)))[0]
    return 0.0


def time_training(facts: Run) -> float:
    """Seconds to train on a clip. A run shards weights and moments over all its GPUs; here one GPU trains as
    many blocks as half of its memory can hold, and the time is scaled by FLOPs."""
    sizes = facts.sizes
    micro = facts.train.micro
    if facts.device == "cuda":
        available = torch.cuda.mem_get_info()[0] / 2
        blocks = int(sizes.num_layers * available / (20 * facts.weights))
        sizes = replace(sizes, num_layers=max(1, min(blocks, sizes.num_layers)))
    with training(sizes, facts.latents, replace(facts.train, batch=2 * micro, device=facts.device)) as step:
        [seconds] = alternate(3, facts.device, step.run)
        whole, part = (train_df.clip_flops(step.flags, step.clips, c) for c in (facts.sizes, sizes))
    return seconds / (2 * micro) * whole / part


@torch.no_grad()
def time_generate(facts: Run, flags, frames: int, window: int, keep: int, begin: int = 0) -> float:
    """Seconds to generate the latents of a video that continues `begin` of them. All solver steps take the
    same time, so a few are measured."""
    net = model.load(facts.wan, facts.device, precision(facts, flags))
    net.route = facts.train.route if flags.route is None else flags.route or None
    if common.for_device(flags, torch.device(facts.device)).compile:
        net.compile_blocks()
    text = [torch.randn(8, net.config.text_dim, device=facts.device) for _ in range(flags.batch)]
    context = torch.randn(flags.batch, begin, *facts.latents[1:], device=facts.device) if begin else None

    def generate(steps):
        sampling = diffusion.Sampling(steps, guidance=flags.guidance, solver=flags.solver)
        list(diffusion.generate(net, text, 0 * text[0], sampling, shape=facts.latents[1:], frames=frames,
                                context=context, window=window, keep=keep, sink=getattr(flags, "sink", None)))
    two, four = alternate(3, facts.device, lambda: generate(2), lambda: generate(4))
    return (two + (flags.steps - 2) * (four - two) / 2) / flags.batch


def time_scores(facts: Run) -> float:
    """Seconds to score a frame, with the weight files that are there."""
    flags = facts.eval
    g = facts.geometry
    names = eval_drift.wanted(flags, [g])
    scorers, _ = metrics.open_scorers(names, facts.device, flags.weights, flags.stride, flags.batch)
    frames = torch.randint(256, (2 * flags.batch, 3, g.height, g.width), dtype=torch.uint8)

    def score():
        for scorer in scorers:
            scorer.start(g.fps)
            scorer.add(frames)
            scorer.finish()
    return alternate(3, facts.device, score)[0] / len(frames)


# printing

def show(cfg: Config, facts: Run, stages: dict):
    latents = "x".join(map(str, facts.latents))
    gpus = cfg.nodes * (int(cfg.nproc) if cfg.nproc.isdigit() else torch.cuda.device_count())
    print(f"{len(facts.clips):,} of {facts.listed:,} videos are there with a caption; each takes "
          f"{clip_bytes(facts) / 1e6:.2f} MB: latents of {latents}, {facts.tokens:.0f} tokens")
    print(f"{facts.rounds + 1} trainings of {facts.weights / 1e9:.2f} G weights, {facts.train.steps:,} steps "
          f"of {facts.train.batch} clips; {facts.rounds} rounds of {facts.rollouts:,} rollouts; "
          f"{facts.methods} x {len(facts.videos)} videos\n")
    disk, seconds = zip(*stages.values(), strict=True)
    print("| stage     | disk, GB | GPU hours | wall hours |\n"
          "|-----------|----------|-----------|------------|")
    rows = stages | {"all": (sum(disk), sum(s or 0 for s in seconds))}
    for stage, (stage_disk, stage_seconds) in rows.items():
        each, wall = (f"{stage_seconds / n / 3600:,.1f}" if stage_seconds else "-" for n in (1, gpus))
        print(f"| {stage:9} | {stage_disk / 1e9:8,.1f} | {each:>9} | {wall:>10} |")
    if facts.device:
        too_large = "; - does not fit into its memory" if None in seconds else ""
        print(f"\nWall hours: on {gpus} GPUs. Measured on one, without loading and communication{too_large}")
    else:
        print("\nHours: no GPU is here to measure on, and those of every stage need one")


def missing_weights(weights: str | None) -> dict[str, list[str]]:
    """{dimension of VBench: its missing files, where they were looked for and where to get them}"""
    missing = {name: vbench.find_files(name, weights)[1] for name in metrics.DIMENSIONS}
    return {name: files for name, files in missing.items() if files}


def print_missing(missing: dict[str, list[str]]):
    if missing:
        print("\nFor want of weights the report will lack these of VBench's dimensions:")
        for name, files in missing.items():
            print(f"  {name}: {'; '.join(files)}")
        print('EVAL="--weights DIR" names a folder to look in first. The run goes on without them. They may\n'
              "come later: scores are kept, and the same command, started again, adds what was missing.")


def check_disk(cfg: Config, need: float):
    out = Path(cfg.out).resolve()
    used = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    free = shutil.disk_usage(out).free
    last = out / f"model_{cfg.rounds}" / "config.json"
    print(f"\ndisk: {need / 1e9:,.1f} GB, of which {used / 1e9:,.1f} GB are there; {free / 1e9:,.1f} GB are "
          f"free in {out}")
    if need > free + used and not last.exists():  # once the last model is trained, little is left to write
        raise UserError(f"{out} is {(need - free - used) / 1e9:,.1f} GB too small; choose another OUT, or "
                        "fewer clips or ROUNDS")


if __name__ == "__main__":
    run(main, cfg)
