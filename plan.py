"""The plan of a run of bagger.sh: memory, time and disk of every stage, by `python bench.py plan`.

No GPU and no weights are needed: the stages' own code runs on fake tensors, and predict.py keeps account.
What is assumed of a GPU is printed with what follows from it.
"""

import itertools
import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch

import aggregate
import common
import data
import diffusion
import eval_drift
import files
import locate
import metrics
import model
import predict
import prepare
import records
import rollout
import sample
import sources
import t5
import train_df
import vae
import vbench
from common import UserError
from flags import parse
from predict import Prediction

SIZES = {"1.3B": model.Config(),
         "14B": model.Config(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)}
CLIPS = 55000  # the paper's; and a guess at the tokens of a caption
TOKENS = 128


class Run(NamedTuple):
    """A run of bagger.sh: the flags of its stages, and the sizes that follow from them."""
    listed: int  # number of videos
    count: int  # those that exist and have a caption
    tokens: float  # mean number of tokens in a caption
    rounds: int
    rollouts: int  # per round
    geometry: data.Geometry
    latents: tuple[int, ...]
    sizes: model.Config
    coder: dict  # what the VAE is made with
    encoder: dict  # and the text encoder
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
    gpu: str
    gpus: int  # of all machines
    nodes: int


class Stage(NamedTuple):
    """One line of the plan."""
    stage: str
    unit: str
    count: float
    disk: float  # bytes
    peak: dict[str, float]  # bytes of a GPU by what they hold, and all
    seconds: dict[str, float]  # of a GPU for each unit: compute, memory, network, all
    together: int = 1  # GPUs that work on a unit at the same time


def main(cfg):
    """Predictions are kept in --out; free disk space is looked at every time."""
    facts = read_run(cfg)
    if not cfg.wan:
        return show(facts, predicted(facts))
    file = Path(cfg.out, "plan.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    missing = missing_weights(facts.eval.weights)
    inputs = asdict(cfg) | {
        "sizes": asdict(facts.sizes), "unscored": list(missing), "torch": torch.__version__}
    for name in ("count", "tokens", "latents", "coder", "encoder", "videos", "gpu", "gpus"):
        inputs[name] = getattr(facts, name)
    inputs = json.loads(json.dumps(inputs))  # as it will be read back, with lists for tuples
    kept = records.read(file) if file.exists() else {}
    if kept.get("inputs") != inputs:
        kept = {"inputs": inputs, "stages": [stage._asdict() for stage in predicted(facts)]}
        files.write_text(file, files.as_json(kept, indent=1) + "\n")
    stages = [Stage(**stage) for stage in kept["stages"]]
    show(facts, stages)
    print_missing(missing)
    check_disk(cfg, sum(stage.disk for stage in stages))


def read_run(cfg) -> Run:
    if cfg.wan:
        cfg = replace(cfg, wan=locate.local(cfg.wan, *locate.NETWORKS))

    def flags(config, given, *fixed):  # given is split at spaces, as bagger.sh does
        return parse(config, "", [*fixed, *given.split()])

    prepared = flags(prepare.Config, cfg.prepare, "--videos", cfg.videos, "--wan", cfg.wan, "--out", "agg_0")
    lora = f" --lora-rank {cfg.lora_rank}" if cfg.lora_rank else ""
    trained = flags(train_df.Config, cfg.train + lora, "--data", "agg_0")
    rolled = flags(rollout.Config, cfg.rollout, "--model", "model_0")
    sampled = flags(sample.Config, cfg.sample, "--prompts", cfg.prompts, "--seconds", str(cfg.seconds))
    if cfg.wan:
        sizes, coder = model.read_checkpoint(cfg.wan)[1], vae.read(cfg.wan)[1]
        encoder = t5.sizes_of(t5.official_names(locate.read(t5.find_weights(cfg.wan), "t5")[0]))
        trained = replace(trained, route=train_df.route_of(replace(trained, init=cfg.wan)))
    else:
        sizes, coder, encoder = SIZES[cfg.size], {}, {}
    listed, count, tokens = read_videos(cfg, prepared) if cfg.videos else (CLIPS, CLIPS, TOKENS)
    held_out = trained.held_out if rolled.held_out is None else rolled.held_out
    half = max(1, min(count // 2, count - held_out))

    geometry = data.geometry(cfg.wan, prepared.size, prepared.frames, prepared.fps)
    with torch.device("meta"):
        weights = sum(p.numel() for p in model.WanModel(sizes).parameters())
        frames = vae.WanVAE(**coder)
    latents = (frames.latent_count(geometry.frames), frames.z_dim, geometry.height // frames.space,
               geometry.width // frames.space)
    sampled = sample.in_window(sample.settle(sampled, {}), latents[0])
    videos = [sample.latent_frames(row.get("seconds", sampled.seconds), geometry.fps, frames, 0)
              for _, row in sample.read_prompts(sampled, {}) for _ in range(sampled.samples)]
    here = int(cfg.nproc) if cfg.nproc.isdigit() else torch.cuda.device_count() or 8
    return Run(
        listed, count, tokens, cfg.rounds, half if rolled.count is None else rolled.count, geometry, latents,
        sizes, coder, encoder, weights, cfg.rounds + 1 + 2 * cfg.baselines, int(cfg.baselines), videos,
        prepared, trained, rolled, flags(aggregate.Config, cfg.aggregate, "--rollouts", "rollout_0"), sampled,
        flags(eval_drift.Config, cfg.eval, "videos_0"), cfg.gpu or gpu_here(),
        cfg.nodes * (cfg.gpus or here), cfg.nodes)


def read_videos(cfg, prepared) -> tuple[int, int, float]:
    """(videos listed, those that exist and have a caption, mean number of tokens of these)"""
    listed = sources.find_clips(cfg.videos, prepared.caption_key, prepared.root, prepared.where)
    clips = [source for source in listed if source.caption and source.path.is_file()]
    if not clips:
        raise UserError(f"{cfg.videos} lists {len(listed)} videos; none of them is there and has a caption")
    tokenizer = t5.load_tokenizer(cfg.wan) if cfg.wan else None
    subset = clips[::len(clips) // 1000 + 1]
    tokens = [len(t5.token_ids(tokenizer, clip.caption)) if tokenizer else TOKENS for clip in subset]
    return len(listed), len(clips), sum(tokens) / len(tokens)


def gpu_here() -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((known for known in predict.GPUS if known.upper() in name.upper()), "h100")


# ----------------------------------------------------------------------------------------------------
# the stages: disk by the formats, memory and time by their own code on fake tensors

def predicted(facts: Run) -> list[Stage]:
    return [stage(facts) for stage in (plan_prepare, plan_train, plan_rollout, plan_aggregate, plan_sample,
                                       plan_eval)]


def clip_bytes(facts: Run) -> float:
    return (torch.Size(facts.latents).numel() * data.LATENT_DTYPE.itemsize
            + facts.tokens * facts.sizes.text_dim * data.TEXT_DTYPE.itemsize)


def line(facts: Run, stage, unit, count, disk, prediction: Prediction) -> Stage:
    spent = predict.seconds(prediction, predict.GPUS[facts.gpu], facts.nodes)
    return Stage(stage, unit, count, disk, prediction.peak, spent)


def plan_prepare(facts: Run) -> Stage:
    spent = predict.together(text(facts, facts.prepare), vae_work(facts, facts.prepare, encode))
    return line(facts, "prepare", "clip", facts.count, facts.count * clip_bytes(facts), spent)


def plan_train(facts: Run) -> Stage:
    """A model takes fp32 weights, and checkpoints of weights, two moments and perhaps averaged weights; of a
    LoRA all that is small. A new checkpoint is written before the oldest is removed."""
    flags = common.for_device(facts.train, predict.fake_gpu())
    flags = replace(flags, shard=facts.gpus > 1 and flags.shard is not False)
    models = facts.rounds + 1
    trained = lora_weights(facts) if flags.lora_rank else facts.weights
    checkpoint = 4 * (3 + (flags.ema > 0)) * trained
    disk = models * (4 * trained + flags.keep * checkpoint) + checkpoint
    spent = training(flags, facts.sizes, facts.latents, facts.gpus)
    if flags.preview_every:
        peak = max(spent.peak, previews(facts, flags), key=lambda peak: peak["all"])
        spent = spent._replace(peak=peak)
    return line(facts, "train", "step", models * flags.steps, disk, spent)._replace(together=facts.gpus)


def lora_weights(facts: Run) -> int:
    c, rank = facts.sizes, facts.train.lora_rank
    return c.num_layers * rank * (8 * 2 * c.dim + 2 * (c.dim + c.ffn_dim))


def plan_rollout(facts: Run) -> Stage:
    count, frames = facts.rounds * facts.rollouts, facts.latents[0]
    spent = generated(facts, facts.rollout, frames, frames, rollout.CHUNK, begin=rollout.CHUNK)
    return line(facts, "rollout", "rollout", count, count * clip_bytes(facts), spent)


def plan_aggregate(facts: Run) -> Stage:
    count = facts.rounds * facts.rollouts
    spent = vae_work(facts, facts.aggregate, reverse)
    if facts.aggregate.rewrite:
        spent = predict.together(text(facts, facts.aggregate), spent)
    return line(facts, "aggregate", "clip", count, count * clip_bytes(facts), spent)


def plan_sample(facts: Run) -> Stage:
    """A video takes its first window, and as many slides as it is longer; each shows the VAE a frame anew.
    Memory is that of the method that needs most, while the VAE is at work."""
    facts = as_sampled(facts)
    flags = facts.sample
    window = flags.window
    slide = window - flags.keep if flags.sink is None else sample.CHUNK
    first, longer = (generated(facts, flags, n, window, flags.keep) for n in (window, window + slide))
    shown, entered = vae_work(facts, flags, decode), vae_work(facts, flags, encode_a_frame)
    held = first.peak
    if facts.guided:
        held = generated(facts, replace(flags, steps=1), window, window, flags.keep, history=1.2).peak
    peak = {kind: held[kind] + shown.peak[kind] for kind in predict.KINDS}
    peak["temporaries"] = max(held["temporaries"], shown.peak["temporaries"])
    peak["all"] = sum(peak.values())
    windows = sum(min(n / window, 1) for n in facts.videos) / len(facts.videos)
    slides = sum(max(n - window, 0) / slide for n in facts.videos) / len(facts.videos)
    share = (facts.methods + facts.guided) / facts.methods  # the guided one takes twice the time
    latents = sum(facts.videos) / len(facts.videos) / facts.latents[0]
    parts = ((share * (windows - slides), first), (share * slides, longer), (latents, shown),
             (slides, entered))
    spent = Prediction(peak, [(often * times, work) for often, part in parts for times, work in part.work])
    pixels = facts.geometry.width * facts.geometry.height
    disk = facts.methods * sum(facts.videos) * 4 * pixels / 8  # h264 at crf 18: less than a bit a pixel
    return line(facts, "sample", "video", facts.methods * len(facts.videos), disk, spent)


class Scoring(NamedTuple):
    """What a network of VBench takes: for a window of 832x480, FLOPs in fp32 and bytes moved; bytes held."""
    flops: float
    moved: float
    weights: float
    temporaries: float


SCORING = {  # with 32 frames or 4 pairs at once; the tests find the same by fake tensors
    "subject_consistency": Scoring(61.8e9, 0.507e9, 0.343e9, 0.502e9),
    "background_consistency": Scoring(8.82e9, 0.136e9, 0.351e9, 0.225e9),
    "motion_smoothness": Scoring(98.5e9, 7.66e9, 0.012e9, 2.433e9),
    "dynamic_degree": Scoring(856e9, 22.1e9, 0.021e9, 1.383e9),
    "aesthetic_quality": Scoring(162e9, 1.528e9, 1.216e9, 0.611e9),
    "imaging_quality": Scoring(20.7e9, 0.813e9, 0.109e9, 1.378e9)}


def plan_eval(facts: Run) -> Stage:
    """Takes little disk. Time is that of VBench's networks, if all their weights are there."""
    facts = as_sampled(facts)
    scale = facts.geometry.width * facts.geometry.height / (832 * 480)
    work = [(scale / metrics.VBENCH[name][1](facts.geometry.fps)[1], [predict.Work("fp32", s.flops, s.moved)])
            for name, s in SCORING.items()]
    peak = dict.fromkeys(predict.KINDS, 0.0) | {
        "weights": sum(s.weights for s in SCORING.values()),
        "temporaries": scale * facts.eval.batch / 32 * max(s.temporaries for s in SCORING.values())}
    spent = Prediction(peak | {"all": sum(peak.values())}, work)
    return line(facts, "eval", "frame", facts.methods * sum(facts.videos) * 4, 0, spent)


def as_sampled(facts: Run) -> Run:
    """The run at the size of the videos to make, which may differ from that of the clips."""
    width, height = map(int, (facts.sample.size or "{}x{}".format(*facts.geometry[:2])).split("x"))
    space = facts.geometry.height // facts.latents[2]
    return facts._replace(geometry=facts.geometry._replace(width=width, height=height),
                          latents=(*facts.latents[:2], height // space, width // space))


# ----------------------------------------------------------------------------------------------------
# pieces of work

def dtype_of(flags) -> torch.dtype:
    return getattr(torch, flags.dtype or "bfloat16")


@torch.no_grad()
def vae_work(facts: Run, flags, work) -> Prediction:
    with predict.faked() as device:
        coder = predict.network(lambda: vae.WanVAE(**facts.coder), device, dtype_of(flags))
        latents = torch.zeros(flags.batch, *facts.latents, dtype=data.LATENT_DTYPE)
        with predict.Tracker(device, weights=coder.parameters()) as tracker:
            work(coder, latents, facts.geometry)
    return Prediction(tracker.peak(), [(1 / flags.batch, tracker.work)])


def encode(coder, latents, geometry):
    device = coder.conv2.weight.device
    pixels = torch.zeros(len(latents), geometry.frames, 3, geometry.height, geometry.width, dtype=torch.uint8)
    coder.encode(data.to_float(pixels.to(device)))


def encode_a_frame(coder, latents, geometry):
    device = coder.conv2.weight.device
    coder.encode(torch.zeros(len(latents), 1, 3, geometry.height, geometry.width, device=device))


def decode(coder, latents, geometry):
    """As a stream, which keeps frames from chunk to chunk."""
    state = {}
    for chunk in latents.split(sample.CHUNK, 1):
        coder.decode(chunk, state)


def show_all(coder, latents, geometry):
    coder.decode(latents)


def reverse(coder, latents, geometry):
    aggregate.reverse(latents, coder)


@torch.no_grad()
def text(facts: Run, flags) -> Prediction:
    """A caption, as one of as many as the encoder takes at once."""
    length = max(1, round(facts.tokens))
    count = max(1, t5.BATCH_TOKENS // length)
    sizes = {"layers": 24} | facts.encoder

    def measure(layers):
        with predict.faked() as device:
            part = sizes | {"layers": layers}
            encoder = predict.network(lambda: t5.Encoder(**part), device, dtype_of(flags))
            with predict.Tracker(device, weights=encoder.parameters()) as tracker:
                encoder(torch.zeros(count, length, dtype=torch.int64).to(device))
        return tracker.prediction()

    peak, work = predict.at_depth(measure, sizes["layers"])
    return Prediction(peak, [(times / count, part) for times, part in work])


@torch.no_grad()
def generated(facts: Run, flags, frames, window, keep, begin=0, history=0.0) -> Prediction:
    """A batch of videos of so many latent frames."""
    dtype = dtype_of(flags)
    shape = facts.latents[1:]
    rolls = getattr(flags, "sink", None)

    def measure(layers, steps):
        sizes = replace(facts.sizes, num_layers=layers)
        sampling = diffusion.Sampling(steps, guidance=flags.guidance, solver=flags.solver, history=history)
        with predict.faked() as device:
            net = predict.network(lambda: model.WanModel(sizes, dtype, dtype), device)
            net.route = facts.train.route if flags.route is None else flags.route or None
            with predict.Tracker(device, flags.compile is not False, net.parameters()) as tracker:
                label_cache(net, tracker)
                rows = [torch.zeros(max(1, round(facts.tokens)), sizes.text_dim)] * flags.batch
                context = torch.zeros(flags.batch, begin, *shape) if begin else None
                list(diffusion.generate(net, rows, rows[0], sampling, shape=shape, frames=frames, sink=rolls,
                                        context=context, window=window, keep=keep))
        return tracker.prediction()

    peak, work = predict.along(lambda steps: predict.at_depth(
        lambda layers: measure(layers, steps), facts.sizes.num_layers), flags.steps, 2)
    return Prediction(peak, [(times / flags.batch, part) for times, part in work])


def label_cache(net, tracker):
    """What new_cache makes is known as a cache from then on."""
    make = net.new_cache

    def new_cache(*given):
        cache = make(*given)
        tracker.label("cache", [cache.k, cache.v, cache.text_k, cache.text_v])
        return cache
    net.new_cache = new_cache


@torch.no_grad()
def previews(facts: Run, flags) -> dict[str, float]:
    """The most memory while train_df.py makes previews, beside its shards and moments: with a cache, and then
    while the VAE shows them."""
    frames, *shape = facts.latents

    def measure(layers):
        with predict.faked() as device, predict.one_of(facts.gpus):
            ranks = common.Ranks(0, facts.gpus, device)
            sizes = replace(facts.sizes, num_layers=layers)
            net = predict.network(lambda: model.WanModel(sizes, *train_df.formats(flags)), device)
            net = train_df.set_up(flags, net.requires_grad_(), ranks)
            state = train_df.new_state(flags, net, (), ranks)
            with predict.Tracker(device, True, net.parameters()) as tracker:
                tracker.label("moments", moments(state))
                label_cache(net, tracker)
                rows = [torch.zeros(max(1, round(facts.tokens)), sizes.text_dim)]
                chunk = None if flags.mode == "full" else train_df.CHUNK
                sampling = diffusion.Sampling(1, guidance=flags.guidance)
                list(diffusion.generate(net, rows, rows[0], sampling, shape=shape, frames=frames, chunk=chunk,
                                        window=frames, keep=train_df.CHUNK))
        return tracker.prediction()

    made = predict.at_depth(measure, facts.sizes.num_layers).peak
    shown = vae_work(facts, replace(flags, batch=1), show_all).peak
    making = made | {"weights": made["weights"] + shown["weights"]}
    showing = shown | {"weights": making["weights"], "moments": made["moments"]}
    return max((peak | {"all": sum(peak[kind] for kind in predict.KINDS)} for peak in (making, showing)),
               key=lambda peak: peak["all"])


# ----------------------------------------------------------------------------------------------------
# printing

def show(facts: Run, stages: list[Stage]):
    gpu = predict.GPUS[facts.gpu]
    print(f"{facts.count:,} of {facts.listed:,} videos are there with a caption; each takes "
          f"{clip_bytes(facts) / 1e6:.2f} MB: latents of {'x'.join(map(str, facts.latents))}, "
          f"{facts.tokens:.0f} tokens")
    print(f"{facts.rounds + 1} trainings of {facts.weights / 1e9:.2f} G weights, {facts.train.steps:,} steps "
          f"of {facts.train.batch} clips; {facts.rounds} rounds of {facts.rollouts:,} rollouts; "
          f"{facts.methods} x {len(facts.videos)} videos\n"
          f"Predicted for {facts.gpus} x {facts.gpu} on {facts.nodes} machine{'s' * (facts.nodes > 1)}:\n")
    print("| stage | GB of a GPU, at most | seconds each (compute / memory / network) | how many | GPU hours "
          "| wall hours | disk, GB |\n|---|---|---|---|---|---|---|")
    total = 0.0
    for s in stages:
        hours = s.count * s.seconds["all"] * s.together / 3600
        total += hours
        each, *parts = (f"{s.seconds[kind]:,.0f}" if s.seconds[kind] >= 100 else f"{s.seconds[kind]:.3g}"
                        for kind in ("all", "compute", "memory", "network"))
        print(f"| {s.stage} | {predict.as_text(s.peak)} | {each} a {s.unit} ({' / '.join(parts)}) | "
              f"{s.count:,.0f} | {hours:,.0f} | {hours / facts.gpus:,.0f} | {s.disk / 1e9:,.1f} |")
    disk = sum(s.disk for s in stages)
    print(f"| all | | | | {total:,.0f} | {total / facts.gpus:,.0f} | {disk / 1e9:,.1f} |")
    for s in stages:
        if s.peak["all"] > gpu.memory - 1e9:
            print(f"\n{s.stage} does not fit into {gpu.memory / 1e9:.0f} GB, of which 1 is the driver's")
    tera = ", ".join(f"{name} {rate / 1e12:.0f}" for name, rate in (
        ("products", gpu.matmul), ("attention", gpu.attention), ("convolutions", gpu.conv),
        ("products in fp32", gpu.fp32)))
    giga = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in (
        ("memory", gpu.bandwidth), ("to GPUs of the same machine", gpu.link), ("of another", gpu.net)))
    print(f"\nAssumed of {facts.gpu}: TFLOP/s of {tera}; GB/s of {giga}.\nThe network runs beside the rest; "
          "chains of elementwise operations are compiled; videos are read and written in time. Not counted:\n"
          "starting, loading, held-out losses, previews, checkpoints, and how an allocator fragments.")


def missing_weights(weights: str | None) -> dict[str, list[str]]:
    """{dimension of VBench: its missing files, where they were looked for and where to get them}"""
    missing = {name: vbench.find_files(name, weights)[1] for name in metrics.DIMENSIONS}
    return {name: paths for name, paths in missing.items() if paths}


def print_missing(missing: dict[str, list[str]]):
    if missing:
        print("\nFor want of weights the report will lack these of VBench's dimensions:")
        for name, paths in missing.items():
            print(f"  {name}: {'; '.join(paths)}")
        print('EVAL="--weights DIR" names a folder to look in first. The run goes on without them. They may\n'
              "come later: scores are kept, and the same command, started again, adds what was missing.")


def check_disk(cfg, need: float):
    out = Path(cfg.out).resolve()
    used = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    free = shutil.disk_usage(out).free
    last = out / f"model_{cfg.rounds}" / "config.json"
    print(f"\ndisk: {need / 1e9:,.1f} GB, of which {used / 1e9:,.1f} GB are there; {free / 1e9:,.1f} GB are "
          f"free in {out}")
    if need > free + used and not last.exists():  # once the last model is trained, little is left to write
        raise UserError(f"{out} is {(need - free - used) / 1e9:,.1f} GB too small; choose another OUT, or "
                        "fewer clips or ROUNDS")


# ----------------------------------------------------------------------------------------------------
# training, which train_df.py foretells as well

def training_in_words(*given) -> str:
    return predict.as_text(training(*given).peak)


def training(cfg, config, shape, world: int, device=None) -> Prediction:
    """What training on this many GPUs takes of one, or of the CPU if device says so. A step is run on fake
    tensors, with two micro-batches: what the first leaves is there in the second, and others are alike."""
    count = math.ceil(cfg.batch // world / cfg.micro)
    shown = min(count, 2)

    def measure(layers):
        with predict.faked(device) as place, predict.one_of(world):
            ranks = common.Ranks(0, world, place)
            net = predict.network(lambda: model.WanModel(
                replace(config, num_layers=layers), *train_df.formats(cfg)), place)
            batch = fake_batch(cfg, config, shape)
            net = train_df.set_up(cfg, net.requires_grad_(), ranks)
            state = train_df.new_state(cfg, net, batch.sizes, ranks)
            with predict.Tracker(place, fused=cfg.compile, weights=net.parameters()) as tracker:
                tracker.label("moments", moments(state))
                step = replace(cfg, batch=shown * cfg.micro * world)
                train_df.train_step(step, state, itertools.repeat((0, batch)), 0, ranks)
            return tracker.prediction()

    peak, work = predict.at_depth(measure, config.num_layers)
    return Prediction(peak, [
        (weight * (count / shown if kind else 1), [w for w in part if (w.kind != "optimizer") == kind])
        for weight, part in work for kind in (True, False)])


def moments(state) -> list[torch.Tensor]:
    held = [state.optimizer.state[p] for p in state.weights.values()]
    return state.ema + [moment[key] for moment in held for key in ("exp_avg", "exp_avg_sq")]


def fake_batch(cfg, config, shape) -> train_df.Batch:
    """A micro-batch as Samples makes them."""
    clips, frames = cfg.micro, shape[0]
    sizes = (frames,) if cfg.mode == "full" else (train_df.CHUNK,) * (frames // train_df.CHUNK)
    x = torch.zeros(clips, *shape)
    t = torch.zeros(clips, frames)
    text = torch.zeros(clips, config.text_len, config.text_dim)
    chunk = torch.zeros(frames, dtype=torch.int64)
    resampling = (t[:, 0], x) if cfg.mode == "rf" else ()
    return train_df.Batch(x, x, t, t, t, text, chunk, sizes, [], *resampling)
