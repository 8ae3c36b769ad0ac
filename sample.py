"""Stage 4: model_k/ + prompts -> videos/, of any length.

    python sample.py --model model_1 --prompt "a red disc moves left" --seconds 50
    python sample.py --model model_1 --prompts prompts.txt --samples 2
    python sample.py --model model_1 --prompt "a cat sleeps | 20: it wakes up" --seconds 50
    python sample.py --model model_1 --prompt "a cat" --extend clip.mp4 --seconds 10
    python sample.py --model model_1 --prompt "a cat" --image first.png
    python sample.py --model Wan2.1-T2V-1.3B --prompt "a cat"               all frames at once, as trained
    python sample.py --model self_forcing_dmd.pt --wan Wan2.1-T2V-1.3B --prompt "a cat" --solver renoise
    python sample.py --like videos/0000-a-cat.mp4 --out again               repeats a video from its tags
    torchrun --nproc-per-node 8 sample.py ...                               shares the videos among 8 GPUs

A line of a .jsonl: {"prompt": "..."} or {"prompt": ["...", "..."], "times": [0, 20]}, with "seed", "seconds",
"name" and "extend" (a path relative to the .jsonl) where they differ from the flags. Killed and started again
it makes the videos that are missing.
"""

import contextlib
import dataclasses
import math
import re
import shlex
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

from flags import Count, Device, Dtype, Positive, Seconds, Share, Size, Solver, Whole, in_range, parse

CHUNK = 3  # latent frames
KEEP = 12  # latent frames that begin the next window


@dataclass
class Config:
    model: str | None = None  # Folder of the model (model_k), a Wan directory, or a file of weights
    lora: tuple[str, ...] = ()  # LoRA files to merge into the model: FILE, or FILE:STRENGTH
    # Wan directory with the VAE, text encoder and tokenizer (default: named in the model's config.json, or
    # the model's own folder)
    wan: str | None = None
    # What to show. "a | b | c" changes the prompt at even intervals, "a | 10: b | 25.5: c" at these seconds
    # (precisely, where the window slides next; with --sink, at the next chunk)
    prompt: str | None = None
    prompts: str | None = None  # File of prompts: a .txt with one per line, or a .jsonl (see above)
    out: str = "videos"  # Folder for the videos
    like: str | None = None  # Video of sample.py to repeat: its tags replace all flags that are not given
    extend: str | None = None  # Video to continue: its last frames begin the new video
    # Latent frames of --extend to begin with, fewer if it is shorter; 12 are 45 frames of video (default: as
    # --keep)
    context: Whole | None = None
    image: str | None = None  # Image (png or jpg) to begin with, for models trained with --image-first
    seconds: Seconds = 5.0  # Length of each video, with what it continues; rounded up to whole chunks
    # Size of the videos, WIDTHxHEIGHT (default: from the Wan directory, or 832x480)
    size: Size | None = None
    seed: int = 0  # Seed of the noise
    samples: Count = 1  # Videos per prompt, with the seeds --seed, --seed + 1, ...
    batch: Count = 1  # Videos generated at once; changes them by rounding only
    steps: Count = 20  # Solver steps per chunk; with --solver renoise 4, unless given
    # Guidance scale towards the prompt; 1 is no guidance, and twice as fast; with --solver renoise 1, unless
    # given
    guidance: float = 6.0
    # Shift of the noise levels towards pure noise, as in training; with --solver renoise 5, unless given
    shift: Positive = 8.0
    # ODE solver. unipc steps at the noise levels of Wan2.1's and Self-Forcing's own code, unipc-diffusers at
    # those of diffusers. renoise is for models distilled to a few steps, such as Self-Forcing's and
    # CausVid's, which their files do not tell
    solver: Solver = "euler"
    # Noise levels t of the steps with --solver renoise, in place of --steps and --shift: 1000,757,522 for
    # CausVid's 3-step model (its 4-step model takes --shift 8)
    levels: str | None = None
    # Make the video chunk by chunk, each behind those before it (default: as the model was trained)
    causal: bool | None = None
    # Make all frames at once, no more than --window, as the published Wan2.1 does (default: as the model was
    # trained)
    bidirectional: bool | None = None
    negative: str = ""  # Negative prompt, which guidance leads away from
    context_noise: Share = 0.0  # Noise level at which the model sees finished frames (sigma_test), 0 to 1
    history_guidance: float = 0.0  # Weight of history guidance, 1.2 in the paper; 0: none
    history_level: Share = 0.8  # Noise level of the partly hidden frames in history guidance, 0 to 1
    # Latent frames that the model sees at once (default: as many as the clips that it was trained on have)
    window: Count | None = None
    # Latent frames at the end of a window that begin the next one (default: 12, or what a smaller window can
    # keep)
    keep: Whole | None = None
    # Which of the --keep frames are decoded and encoded anew for the next window: the first, as if it were an
    # image, none (as-is), or all
    reentry: Literal["first", "as-is", "all"] = "first"
    # Chunks at the start that stay in view for ever, while the rest of the window rolls on chunk by chunk.
    # Nothing is computed or encoded anew then: --keep and --reentry do not apply. 0: the whole window rolls;
    # -1: the window slides (default: it slides, or as --like says)
    sink: int | None = None
    # Past chunks that each token attends to, those that suit it best; 0: all (default: as the model was
    # trained, or as --like says)
    route: Whole | None = None
    crf: Whole = 18  # Quality of the h264 video; lower is better
    preset: str = "medium"  # Speed of the h264 encoder
    log_drift: bool = False  # Write mean, deviation and outliers of each chunk's latents to NAME.jsonl
    compile: bool | None = None  # Compile the transformer blocks (default: on a GPU)
    # Number format of the networks (default: bfloat16 on a GPU, else float32)
    dtype: Dtype | None = None
    device: Device | None = None  # cuda or cpu (default: cuda if available)

    __post_init__ = in_range


if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    cfg = parse(Config, __doc__)

import torch

import common
import data
import diffusion
import flags
import locate
import lora
import model
import t5
import vae
from common import UserError, print0
from files import is_name, write_text
from prompts import read_prompts, texts_and_times

# the flags that determine a video; its tags hold them, and --like reads them from there
RECIPE = {f.name for f in dataclasses.fields(Config)} - {
    "prompt", "prompts", "out", "like", "samples", "batch", "bidirectional", "log_drift", "compile", "device"}


class Job(NamedTuple):
    """A video to make."""
    path: Path
    begin: int  # latent frames that it continues
    frames: int  # latent frames in all
    starts: list[int]  # latent frame from which each of its prompts applies
    tags: dict  # its whole recipe


def main(cfg: Config):
    ranks = common.start_ranks(cfg.device)
    before = read_recipe(cfg.like) if cfg.like else {}
    cfg = settle(cfg, before)
    cfg = dataclasses.replace(cfg, model=locate_model(cfg))
    limits = model.read_checkpoint(cfg.model, cfg.lora)[1]  # refuses what is no model before loading anything
    cfg = complete(cfg, ranks)
    dtype = getattr(torch, cfg.dtype)
    rows = read_prompts(cfg, before)
    coder = vae.load(cfg.wan, ranks.device, dtype)
    cfg = in_window(cfg, trained_window(cfg, coder))
    jobs = plan(cfg, rows, coder)
    if before and before["fingerprint"] != jobs[0].tags["fingerprint"]:
        print0(f"warning: {cfg.model} is not the model that made {cfg.like}: the video will differ")
    todo = common.my_share(batches(jobs, cfg.batch), ranks, finished)
    print0(f"{len(jobs)} videos of {cfg.size}; {sum(map(len, todo))} to make" + common.share_of(ranks))
    common.own(cfg.out, "videos", ranks)
    if not todo:
        return
    # one large network at a time: the text encoder alone takes 11 GB
    encoded = encode_prompts(cfg, todo, limits, ranks.device, dtype)
    net = model.load(cfg.model, ranks.device, dtype, loras=cfg.lora)
    if cfg.route is not None:
        net.route = cfg.route or None
    if cfg.compile:
        net.compile_blocks()
    with common.progress(sum(job.tags["frames"] for batch in todo for job in batch), "frames", ranks) as bar:
        for batch, texts in zip(todo, encoded, strict=True):
            make(cfg, batch, net, coder, texts, bar)


# ----------------------------------------------------------------------------------------------------
# flags

def read_recipe(like: str) -> dict:
    tags = data.read_tags(like)
    if not tags.keys() >= {"model", "wan", "prompts", "times", "name", "id", "fingerprint"}:
        raise UserError(f"{like} does not say how it was made; videos of sample.py do, unless edited since")
    return tags


def locate_model(cfg: Config) -> str:
    path = locate.local(cfg.model, "transformer") if cfg.model else None
    if path is None or not Path(path).exists():
        problem = f"--model {cfg.model} does not exist" if cfg.model else "no model"
        raise UserError(f"{problem}; give --model DIR, made by train_df.py or a download of Wan2.1:\n"
                        "hf download Wan-AI/Wan2.1-T2V-1.3B --local-dir DIR")
    return path


def complete(cfg: Config, ranks) -> Config:
    """Checks flags, and fills in those that are not given and depend on others or on the model."""
    read_levels(cfg)
    trained = model.settings(cfg.model)
    wan = locate.local(cfg.wan or trained.get("wan") or locate.wan_for(cfg.model) or "", "vae", "t5")
    if not wan:
        raise UserError(f"{cfg.model} names no Wan directory for VAE and text encoder; give --wan DIR")
    cfg = dataclasses.replace(cfg, causal=is_causal(cfg))
    warn_of_untrained(cfg, trained)
    paths = {"model": cfg.model, "wan": wan, "extend": cfg.extend, "image": cfg.image}
    paths = {name: str(Path(path).resolve()) for name, path in paths.items() if path}
    width, height, *_ = data.geometry(wan, cfg.size)
    loras = tuple(f"{file.resolve()}:{strength}" for file, strength in map(lora.split, cfg.lora))
    return dataclasses.replace(common.for_device(cfg, ranks.device), **paths, lora=loras,
                               size=f"{width}x{height}")


def trained_window(cfg: Config, coder) -> int:
    """The latent frames of the clips that a model was trained on: train_df.py records them. Other models are
    taken to know the clips that their Wan directory is for."""
    recorded = model.settings(cfg.model).get("window")
    return recorded or coder.latent_count(data.geometry(cfg.wan).frames)


def in_window(cfg: Config, trained: int) -> Config:
    """Fills in --window, as long as the model was trained on, and what depends on it."""
    window = trained if cfg.window is None else cfg.window
    keep = max(0, min(KEEP, window // CHUNK * CHUNK - CHUNK)) if cfg.keep is None else cfg.keep
    return dataclasses.replace(cfg, window=window, keep=keep,
                               context=keep if cfg.context is None else cfg.context)


def settle(cfg: Config, before: dict) -> Config:
    """The flags that are given, then the recipe of --like, then what distilled models were made for."""
    settled = given(cfg)
    if cfg.bidirectional is not None:
        if cfg.causal is not None:
            raise UserError("--causal and --bidirectional are both given; choose one")
        cfg = dataclasses.replace(cfg, causal=not cfg.bidirectional)
        settled.add("causal")
    recipe = {k: before[k] for k in RECIPE & before.keys() - settled}
    usual = diffusion.DISTILLED if recipe.get("solver", cfg.solver) == "renoise" else {}
    cfg = dataclasses.replace(cfg, **{k: v for k, v in (usual | recipe).items() if k not in settled})
    return dataclasses.replace(cfg, sink=None if cfg.sink == -1 else cfg.sink, lora=tuple(cfg.lora or ()))


def read_levels(cfg: Config) -> tuple[float, ...]:
    if cfg.levels is None:
        return ()
    try:
        levels = [float(t) for t in cfg.levels.split(",")]
    except ValueError:
        levels = [math.nan]
    falling = all(a > b for a, b in pairwise((*levels, 0)))  # not if one is nan
    if cfg.solver != "renoise" or not falling or levels[0] > 1000:
        raise UserError(f"--levels {cfg.levels} --solver {cfg.solver}: give numbers that fall from 1000 on, "
                        "such as 1000,757,522, with --solver renoise")
    return tuple(levels)


def is_causal(cfg: Config) -> bool:
    """Chunk by chunk, or else all frames at once: by the flags, or as the model was trained. Says so where
    that is not plain, and refuses flags that need a past."""
    trained = model.trained_causally(cfg.model)
    causal = trained is not False if cfg.causal is None else cfg.causal
    if trained is None and cfg.causal is None:
        print0(f"{cfg.model} does not say how it was trained: it is sampled chunk by chunk (--bidirectional: "
               "all frames at once; --solver renoise: if distilled to a few steps)")
    elif trained is False and cfg.causal is None:
        print0(f"{cfg.model} was never trained chunk by chunk: all frames are made at once (or use --causal)")
    elif trained is False and causal:
        print0(f"warning: {cfg.model} was never trained to make videos chunk by chunk")
    elif trained and not causal:
        print0(f"warning: {cfg.model} was never trained to make all frames at once")
    past = {"image": cfg.image, "extend": cfg.extend, "sink": cfg.sink is not None, "route": cfg.route,
            "context-noise": cfg.context_noise, "history-guidance": cfg.history_guidance}
    if not causal and any(past.values()):
        used = ", ".join(f"--{name}" for name, value in past.items() if value)
        raise UserError(f"{used}: there is no past where all frames are made at once; give --causal")
    return causal


def warn_of_untrained(cfg: Config, trained: dict):
    """Says where a model is asked for what its training, as its config.json tells, did not show it."""
    mode = trained.get("mode")
    if cfg.image and not trained.get("image_first"):
        print0(f"warning: --image needs a model trained with --image-first; {cfg.model} does not say it was")
    if mode not in (None, "df", "full") and (cfg.context_noise or cfg.history_guidance):
        print0(f"warning: {cfg.model} was trained with --mode {mode} and has never seen a noisy past, which "
               "--context-noise and --history-guidance show it")


def given(cfg: Config) -> set[str]:
    """The flags on the command line, even at their defaults; in Python, those that are not at theirs."""
    changed = {f.name for f in dataclasses.fields(cfg) if getattr(cfg, f.name) != f.default}
    return changed | set(getattr(cfg, "given", ()))


# ----------------------------------------------------------------------------------------------------
# planning: which videos to make

def plan(cfg: Config, rows, coder) -> list[Job]:
    """A job for each prompt and seed."""
    width, height, _, fps = data.geometry(cfg.wan, cfg.size)
    if height % (2 * coder.space) or width % (2 * coder.space):
        raise UserError(f"size {cfg.size}: width and height must be multiples of {2 * coder.space}")
    files = model.find_weights(cfg.model) + [file for file, _ in map(lora.split, cfg.lora)]
    recipe = {name: getattr(cfg, name) for name in sorted(RECIPE)} | {  # sorted: the order of a set varies
        "fps": fps, "lora": list(cfg.lora) or None, "fingerprint": common.fingerprint(*files),
        "command": shlex.join(sys.argv)}
    jobs = {}
    for where, row in rows:
        extend = row.get("extend", cfg.extend)
        if cfg.image and extend:
            raise UserError(f"{where}: --image and --extend are both given; a video begins with only one")
        begin = count_context(cfg, extend, coder, fps)
        seconds = row.get("seconds", cfg.seconds)
        if begin and not cfg.causal:
            raise UserError(f"{where}: all frames are made at once, and continue no video; give --causal")
        frames = count_frames(cfg, seconds, begin, coder, fps, where)
        texts, times = texts_and_times(row, seconds, where)
        starts = [coder.latent_count(round(t * fps)) for t in times]
        check_starts(cfg, starts, begin, frames, coder, fps, where)
        slug = re.sub(r"[\W_]+", "-", " ".join(texts).lower())[:40].strip("-")
        name = row.get("name") or f"{row['id']:04d}-{slug}".strip("-")
        first = row.get("seed", cfg.seed)
        for seed in range(first, first + cfg.samples):
            file = f"{name}-seed{seed}.mp4" if seed != 0 or cfg.samples > 1 else f"{name}.mp4"
            if not is_name(file) or file in jobs:
                raise UserError(f"{where}: the name {file[:80]} is taken, or no file name; choose another")
            jobs[file] = Job(Path(cfg.out, file), begin, frames, starts, recipe | {
                "extend": extend, "prompt": " | ".join(texts), "prompts": texts, "times": times, "seed": seed,
                "id": row["id"], "name": name, "seconds": seconds, "frames": coder.frame_count(frames)})
    return list(jobs.values())


def count_context(cfg: Config, extend: str | None, coder, fps) -> int:
    """Latent frames that a video begins with: an image, the end of another video, or none."""
    if cfg.image:
        return len(data.read_image(cfg.image))
    if not extend:
        return 0
    available = data.count_crops(data.probe(extend), 1, fps)
    # whole chunks of at most --context latent frames: 45 frames of video, or else 33, 21, 9
    for latents in range(max(cfg.context // CHUNK, 1) * CHUNK, 0, -CHUNK):
        if (count := coder.frame_count(latents)) <= available:
            return latents
    raise UserError(f"{extend} is too short to continue: it has {available} frames at {fps} fps, {count} are "
                    "the least")


def count_frames(cfg: Config, seconds, begin, coder, fps, where) -> int:
    """Latent frames of a video."""
    if not 0 < seconds <= flags.LONGEST:
        raise UserError(f"{where}: {seconds:g} s is no length for a video; {flags.LONGEST} are the most")
    frames = latent_frames(seconds, fps, coder, begin, CHUNK if cfg.causal else 1)
    if not cfg.causal and frames > cfg.window:
        longest = coder.frame_count(cfg.window) / fps
        raise UserError(f"{where}: {seconds:g} s are more than a window of {cfg.window} latent frames, "
                        f"{longest:.2f} s, and all frames are made at once; change --seconds or --window, or "
                        "give --causal")
    if frames <= begin:
        raise UserError(f"{where}: {seconds:g} s must be more than the {coder.frame_count(begin)} frames "
                        "that the video begins with")
    diffusion.check_plan(begin, frames, CHUNK if cfg.causal else None, cfg.window, cfg.keep, cfg.sink)
    return frames


def latent_frames(seconds, fps, coder, begin, chunk=CHUNK) -> int:
    """The least number of whole chunks that cover so many seconds, after the one frame of an image if any."""
    image = begin % chunk
    covering = coder.latent_count(round(seconds * fps) + coder.time - 1)
    return image + math.ceil((covering - image) / chunk) * chunk


def check_starts(cfg, starts, begin, frames, coder, fps, where):
    """Refuses prompts that would never be shown, since the text changes only where the window slides or, with
    a sink, where a chunk begins."""
    if cfg.sink is None:
        first = begin + (cfg.window - begin) // CHUNK * CHUNK
        slides = range(first, frames, (cfg.window - cfg.keep) // CHUNK * CHUNK) if cfg.causal else ()
        changes = (0, *slides)
        places = ", ".join(f"{coder.frame_count(slide) / fps:.2f}" for slide in slides)
        when = f"the window slides, {f'at {places} s' if slides else 'never here'}"
    else:
        changes = range(begin, frames, CHUNK)
        when = f"a chunk begins, every {CHUNK * coder.time / fps:.2f} s"
    shown = [next((change for change in changes if change >= start), None) for start in starts]
    if None in shown or len(set(shown)) < len(shown):
        raise UserError(f"{where}: not all {len(starts)} prompts would be shown: the text changes where "
                        f"{when}.\nChange the times, --seconds or --window")


def batches(jobs, size: int) -> list[list[Job]]:
    """Batches of videos that begin alike and change their text at the same frames; others do not fit."""
    groups = defaultdict(list)
    for job in jobs:
        groups[job.begin, job.frames, *job.starts].append(job)
    return [batch for group in groups.values() for batch in common.batched(group, size)]


def finished(job: Job) -> bool:
    """Whether the video exists. Refuses one that was made differently."""
    if not job.path.exists():
        return False
    before = data.read_tags(job.path)
    for key, value in job.tags.items():
        if key != "command" and before.get(key) != value:
            raise UserError(f"{job.path} was made with {key} = {before.get(key)}, not {value}; choose "
                            "another --out, or remove it")
    return True


# ----------------------------------------------------------------------------------------------------
# making videos

def encode_prompts(cfg: Config, todo, limits, device, dtype) -> list[dict[str, torch.Tensor]]:
    """The embeddings of each batch's texts, encoded by batch so that it does not matter which are done."""
    encoder = t5.load(cfg.wan, device, dtype)
    encoded = []
    for batch in todo:
        prompts = [cfg.negative] + [text for job in batch for text in job.tags["prompts"]]
        encoded.append(dict(zip(prompts, encoder.encode(prompts), strict=True)))
        for prompt, rows in encoded[-1].items():
            if len(rows) > limits.text_len or rows.shape[1] != limits.text_dim:
                raise UserError(f"{prompt[:40]!r} is {len(rows)} tokens of width {rows.shape[1]} to {cfg.wan}"
                                f";\n{cfg.model} takes at most {limits.text_len} of width {limits.text_dim}")
    return encoded


def make(cfg: Config, jobs, net, coder, texts, bar):
    """Makes a batch of videos. Each chunk is decoded and written as soon as it is generated."""
    start = time.monotonic()
    context = torch.stack([read_context(job, coder) for job in jobs]) if jobs[0].begin else None
    film = diffusion.Film(coder, cfg.keep, cfg.reentry if cfg.causal and cfg.sink is None else "as-is")
    drift = []
    with contextlib.ExitStack() as files:
        writers = [None if finished(job) else files.enter_context(
            data.writing(job.path, job.tags["fps"], job.tags, cfg.crf, cfg.preset)) for job in jobs]
        for first, latents in generate(cfg, jobs, net, coder, texts, context, film):
            videos = film.show(latents)
            if first == 0 and context is not None:
                videos = context  # as it was given, not as the VAE decodes it
            for write, frames in zip(writers, data.to_uint8(videos), strict=True):
                if write:
                    write(frames)
            drift.append((first, diffusion.drift_statistics(latents)))  # tensors: no waiting for the GPU here
            bar.update(videos.shape[0] * videos.shape[1])
    if cfg.log_drift:
        for i, job in enumerate(jobs):
            write_text(job.path.with_suffix(".jsonl"), data.as_lines(
                {"frame": first} | {k: v[i].item() for k, v in stats.items()} for first, stats in drift))
    frames = jobs[0].tags["frames"]
    rate = len(jobs) * frames / (time.monotonic() - start)
    for job in jobs:
        bar.write(f"{job.path}: {frames} frames ({frames / job.tags['fps']:.2f} s), {rate:.2f} frames/s")


def read_context(job: Job, coder) -> torch.Tensor:
    """The frames that a video begins with, uint8 [T,3,H,W]."""
    width, height, _, fps = data.geometry(job.tags["wan"], job.tags["size"])
    if job.tags["image"]:
        return data.read_image(job.tags["image"], (width, height))
    count = coder.frame_count(job.begin)
    return data.read_clip(data.probe(job.tags["extend"]), count, fps, (width, height), start=-count)


def generate(cfg: Config, jobs, net, coder, texts, context, film):
    """Yields the latents of a batch of videos, chunk by chunk."""
    width, height, *_ = data.geometry(cfg.wan, cfg.size)
    schedule = [(start, [texts[job.tags["prompts"][i]] for job in jobs])
                for i, start in enumerate(jobs[0].starts)]
    if context is not None:
        context = torch.cat([coder.encode(data.to_float(frames[None])) for frames in context])
    return diffusion.generate(
        net, schedule, texts[cfg.negative], sampling(cfg), frames=jobs[0].frames,
        shape=(coder.z_dim, height // coder.space, width // coder.space), context=context,
        ids=[(job.tags["seed"], job.tags["id"]) for job in jobs],  # so that a batch may mix seeds
        chunk=CHUNK if cfg.causal else None, window=cfg.window, keep=cfg.keep, reenter=film.reenter,
        sink=cfg.sink)


def sampling(cfg: Config) -> diffusion.Sampling:
    return diffusion.Sampling(cfg.steps, cfg.shift, cfg.guidance, cfg.solver, cfg.context_noise,
                              cfg.history_guidance, cfg.history_level, read_levels(cfg))


if __name__ == "__main__":
    common.run(main, cfg)
