"""Stage 4: model_k/ + prompts -> videos/, as long as you like.

    python sample.py --model model_1 --prompt "a red disc moves left" --seconds 50
    python sample.py --model model_1 --prompts prompts.txt --samples 2      a prompt a line; or a .jsonl
    python sample.py --model model_1 --prompt "a cat sleeps | 20: it wakes up" --seconds 50
    python sample.py --model model_1 --prompt "a cat" --extend clip.mp4 --seconds 10
    python sample.py --model model_1 --prompt "a cat" --image first.png
    python sample.py --like videos/0000-a-cat.mp4 --out again               what made it is in its tags
    torchrun --nproc-per-node 8 sample.py ...                               prompts spread over 8 GPUs

A line of a .jsonl: {"prompt": "..."} or {"prompt": ["...", "..."], "times": [0, 20]}, and, if they are to
differ, "seed", "seconds", "name" and "extend" (a path from the .jsonl's folder). Killed and started again it
makes the videos that are missing.
"""

import contextlib
import dataclasses
import json
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

import torch
import torch.distributed as dist

import common
import data
import diffusion
import model
import t5
import vae
from common import UserError, print0

CHUNK = 3


@dataclass
class Config:
    model: str | None = None  # model_k, a Wan directory, or a file of weights
    # Wan directory: its VAE, text encoder and tokenizer (default: what the model's config.json says)
    wan: str | None = None
    # what to show; "a | b | c" changes it on the way, at even intervals, and "a | 10: b | 25.5: c" from those
    # seconds on (to be exact: where the window slides next)
    prompt: str | None = None
    prompts: str | None = None  # instead: a .txt with a prompt a line, or a .jsonl
    out: str = "videos"  # where the videos go
    like: str | None = None  # a video to make again, all as in its tags but for the flags given beside it
    extend: str | None = None  # a video to continue: its last frames begin the new one
    # latent frames of it that the model sees at first, fewer if it is shorter; 12 are 45 frames of video
    # (default: as --keep)
    context: int | None = None
    image: str | None = None  # a png or jpg that becomes the first frame
    seconds: float = 5.0  # of each video, what it continues included; rounded up to whole chunks
    size: str | None = None  # WIDTHxHEIGHT (default: what --wan says, or 832x480)
    seed: int = 0  # noise is a function of (seed, the prompt's place, chunk)
    samples: int = 1  # videos of each prompt, with seeds seed, seed + 1, ...
    batch: int = 1  # videos made at once, which changes them by rounding alone
    steps: int = 20  # of the solver, for each chunk
    guidance: float = 6.0  # towards the prompt; 1 is none, and twice as fast
    shift: float = 8.0  # of the noise levels, as in training
    solver: Literal[*diffusion.SOLVERS] = "euler"  # of the flow
    negative: str = ""  # the prompt that guidance leads away from
    context_noise: float = 0.0  # the noise level finished frames are shown at (sigma_test), 0..1
    history_guidance: float = 0.0  # its weight, 1.2 in the paper; 0 is none
    history_level: float = 0.8  # the noise level of its partly hidden history, 0..1
    window: int = 21  # latent frames the model sees at once
    keep: int = 12  # how many of them begin the next window
    reentry: Literal["first", "as-is", "all"] = "first"  # which of those pass through the VAE again
    crf: int = 18  # h264 quality: less is better
    preset: str = "medium"  # h264 speed
    log_drift: bool = False  # write the latents' mean, spread and outliers by chunk to NAME.jsonl
    compile: bool | None = None  # the transformer's blocks (default: on a GPU)
    # of the networks (default: bfloat16 on a GPU, float32 on a CPU)
    dtype: Literal["float32", "bfloat16"] | None = None
    device: str | None = None  # cuda or cpu (default: a GPU if there is one)


# the flags that make a video what it is: its tags hold them, and --like takes them from there
RECIPE = {f.name for f in dataclasses.fields(Config)} - {
    "prompt", "prompts", "out", "like", "samples", "batch", "log_drift", "compile", "device"}


class Video(NamedTuple):
    path: Path
    begin: int  # latent frames it continues
    frames: int  # latent, those included
    starts: list[int]  # the latent frame from which each of its prompts holds
    tags: dict  # its whole recipe


def main(cfg: Config):
    ranks = common.start_ranks(cfg.device)
    before = read_recipe(cfg.like) if cfg.like else {}
    cfg = complete(cfg, before, ranks)
    limits = model.read_checkpoint(cfg.model)[1]  # what is no model is refused before anything is loaded
    rows, dtype = read_prompts(cfg, before), getattr(torch, cfg.dtype)
    coder = vae.load(cfg.wan, ranks.device, dtype)
    videos = plan(cfg, rows, coder)
    if before and before["fingerprint"] != videos[0].tags["fingerprint"]:
        print0(f"warning: {cfg.model} is not the model that made {cfg.like}: the video will differ")
    todo = common.my_share(batches(videos, cfg.batch), ranks, finished)
    print0(f"{len(videos)} videos of {cfg.size}; {sum(map(len, todo))} to make"
           + f" on this rank, the first of {ranks.world}" * (ranks.world > 1))
    if ranks.rank == 0:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        common.sweep(cfg.out)
    dist.barrier()
    if not todo:
        return
    # one large network at a time: the text encoder alone is 11 GB
    encoded = encode_prompts(cfg, todo, limits, ranks.device, dtype)
    net = model.load(cfg.model, ranks.device, dtype)
    if cfg.compile:
        net.compile_blocks()
    frames = sum(video.tags["frames"] for batch in todo for video in batch)
    with common.progress(frames, "frames", ranks) as bar:
        for batch, texts in zip(todo, encoded, strict=True):
            make(cfg, batch, net, coder, texts, ranks.device, bar)


# ----------------------------------------------------------------------------------------------------
# flags and prompts

def read_recipe(like: str) -> dict:
    tags = data.read_tags(like)
    if not tags.keys() >= {"model", "wan", "prompts", "times", "name", "id", "fingerprint"}:
        raise UserError(f"{like} does not say how it was made; videos of sample.py do, unless edited since")
    return tags


def complete(cfg: Config, before: dict, ranks) -> Config:
    """What --like says in place of flags not given; what follows from others; paths that hold anywhere."""
    cfg = dataclasses.replace(cfg, **{k: before[k] for k in RECIPE & before.keys() - given(cfg)})
    if cfg.model is None or not Path(cfg.model).exists():
        problem = f"--model {cfg.model} does not exist" if cfg.model else "no model"
        raise UserError(f"{problem}; give --model DIR, which train_df.py makes, or a download of Wan2.1:\n"
                        "hf download Wan-AI/Wan2.1-T2V-1.3B --local-dir DIR")
    if min(cfg.batch, cfg.samples, cfg.steps) < 1:
        raise UserError(f"--batch {cfg.batch} --samples {cfg.samples} --steps {cfg.steps}: 1 is the least")
    if not (0 <= cfg.context_noise <= 1 and 0 <= cfg.history_level <= 1):
        raise UserError(f"--context-noise {cfg.context_noise:g} --history-level {cfg.history_level:g}: noise "
                        "levels are from 0 to 1")
    if cfg.image and cfg.extend:
        raise UserError("--image and --extend are both given; a video begins with one or the other")
    trained = model.settings(cfg.model)
    if not cfg.wan and "wan" not in trained:
        raise UserError(f"{cfg.model} names no Wan directory for VAE and text encoder; give --wan DIR")
    if cfg.image and not trained.get("image_first"):
        print0(f"warning: --image needs a model trained with --image-first; {cfg.model} does not say it was")
    files = {k: str(Path(v).resolve()) for k in ("model", "wan", "extend", "image") if (v := getattr(cfg, k))}
    files = {"wan": trained.get("wan")} | files
    geometry, gpu = data.geometry(files["wan"], cfg.size), ranks.device.type == "cuda"
    dtype = cfg.dtype or ("bfloat16" if gpu else "float32")
    return dataclasses.replace(cfg, **files, dtype=dtype, size=f"{geometry.width}x{geometry.height}",
                               compile=gpu if cfg.compile is None else cfg.compile,
                               context=cfg.keep if cfg.context is None else cfg.context)


def given(cfg: Config) -> set[str]:
    """The flags on the command line, be they at their defaults; in Python, those that are not."""
    changed = {f.name for f in dataclasses.fields(cfg) if getattr(cfg, f.name) != f.default}
    return changed | set(getattr(cfg, "given", ()))


def read_prompts(cfg: Config, before: dict) -> list[tuple[str, dict]]:
    """(where it stands, {"prompt": ..., ...}) for every prompt."""
    if cfg.prompt is not None and cfg.prompts:
        raise UserError("--prompt and --prompts are both given; choose one")
    if cfg.prompt is not None:
        return [("--prompt", {"prompt": cfg.prompt, "id": before.get("id", 0)})]
    if not cfg.prompts and before:
        return [(cfg.like, {"prompt": before["prompts"]} | {k: before[k] for k in ("times", "name", "id")})]
    if not cfg.prompts:
        raise UserError('no prompt: give --prompt "a red disc moves left", or --prompts FILE')
    file = Path(cfg.prompts)
    if not file.is_file() or file.suffix not in (".txt", ".jsonl"):
        raise UserError(f"--prompts {file}: {'is no .txt or .jsonl' if file.is_file() else 'no such file'}")
    read, rows = read_row if file.suffix == ".jsonl" else lambda line, _: {"prompt": line.strip()}, []
    for number, line in enumerate(data.read_utf8(file).split("\n"), 1):
        if line.strip():
            rows.append((f"{file}:{number}", read(line, f"{file}:{number}") | {"id": len(rows)}))
    if not rows:
        raise UserError(f"{file} holds no prompts")
    return rows


ROW = {"prompt": (str, list), "times": list, "seed": int, "seconds": (int, float), "name": str, "extend": str}


def read_row(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(row, dict) or "prompt" not in row:
        raise UserError(f'{where}: not {{"prompt": ...}} but {line.strip()[:40]}')
    for key, value in row.items():
        if not isinstance(value, ROW.get(key, ())):
            raise UserError(f"{where}: {key} = {json.dumps(value)[:40]}; a line may hold prompt (a text or a "
                            "list), times (a list), seed, seconds, name and extend (a path)")
    if "extend" in row:
        row["extend"] = str(Path(where.rpartition(":")[0]).resolve().parent / row["extend"])
    return row


def texts_and_times(row: dict, seconds: float, where: str) -> tuple[list[str], list[float]]:
    """The texts of a video and the second from which each holds."""
    texts, times = row["prompt"], row.get("times")
    if isinstance(texts, str) and "|" in texts:
        # a leading number and a colon are a time, but 10:30 is a clock's
        parts = [re.fullmatch(r"(?:(\d+(?:\.\d+)?)\s*:(?!\d))?(.*)", part.strip(), re.DOTALL).groups()
                 for part in texts.split("|")]
        texts = [text.strip() for _, text in parts]
        if any(second for second, _ in parts[1:]):
            times = [float(parts[0][0] or 0), *(float(second) for second, _ in parts[1:] if second)]
    elif isinstance(texts, str):
        texts = [texts.strip()]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"{where}: an empty prompt")
    times = [i * seconds / len(texts) for i in range(len(texts))] if times is None else times
    rising = all(isinstance(t, int | float) for t in times) and all(a < b for a, b in pairwise(times))
    if len(times) != len(texts) or times[0] != 0 or not rising:
        raise UserError(f"{where}: {len(texts)} prompts need the second from which each holds, first 0 and "
                        f"then rising, not {times}")
    return texts, times


# ----------------------------------------------------------------------------------------------------
# what to make

def count_context(cfg: Config, extend: str | None, coder) -> int:
    """How many latent frames a video begins with: an image, the end of a clip, or none."""
    width, height, _, fps = data.geometry(cfg.wan, cfg.size)
    if cfg.image:
        return len(data.read_image(cfg.image, (width, height)))
    if not extend:
        return 0
    there = data.count_crops(data.probe(extend), 1, fps)
    # whole chunks: 45 frames, or else 33, 21, 9
    for latents in range(max(cfg.context // CHUNK, 1) * CHUNK, 0, -CHUNK):
        if (count := coder.frame_count(latents)) <= there:
            return latents
    raise UserError(f"{extend} is too short to continue: it has {there} frames at {fps} fps, {count} are the "
                    "least")


def read_context(cfg: Config, video: Video, coder) -> torch.Tensor:
    """What a video begins with, uint8 [T,3,H,W]."""
    width, height, _, fps = data.geometry(cfg.wan, cfg.size)
    if cfg.image:
        return data.read_image(cfg.image, (width, height))
    count = coder.frame_count(video.begin)
    return data.read_clip(data.probe(video.tags["extend"]), count, fps, (width, height), start=-count)


def plan(cfg: Config, rows, coder) -> list[Video]:
    """Every video asked for."""
    width, height, _, fps = data.geometry(cfg.wan, cfg.size)
    if height % (2 * coder.space) or width % (2 * coder.space):
        raise UserError(f"size {cfg.size}: width and height must be multiples of {2 * coder.space}")
    videos = {}
    same = {k: getattr(cfg, k) for k in sorted(RECIPE)} | {  # in one order, so that files are the same
        "fps": fps, "fingerprint": common.fingerprint(*model.find_weights(cfg.model)),
        "command": shlex.join(sys.argv)}
    for where, row in rows:
        seconds = row.get("seconds", cfg.seconds)
        if not 0 < seconds < math.inf:
            raise UserError(f"{where}: {seconds:g} s is no length for a video")
        extend = row.get("extend", cfg.extend)
        if cfg.image and extend:
            raise UserError(f"{where}: extend, and --image: a video begins with one or the other")
        begin = count_context(cfg, extend, coder)
        frames = latent_frames(seconds, fps, coder, begin)
        if frames <= begin:
            raise UserError(f"{where}: {seconds:g} s must be more than the "
                            f"{coder.frame_count(begin)} frames that the video begins with")
        diffusion.check_plan(begin, frames, CHUNK, cfg.window, cfg.keep)
        texts, times = texts_and_times(row, seconds, where)
        starts = [coder.latent_count(round(t * fps)) for t in times]
        check_slides(cfg, starts, begin, frames, lambda f: coder.frame_count(f) / fps, where)
        name = row.get("name") or f"{row['id']:04d}-{slug(' '.join(texts))}".strip("-")
        first = row.get("seed", cfg.seed)
        for seed in range(first, first + cfg.samples):
            file = name + f"-seed{seed}" * (seed != 0 or cfg.samples > 1) + ".mp4"
            if Path(file).name != file or file in videos:
                raise UserError(f"{where}: the name {file} is taken, or is no file's; choose another")
            videos[file] = Video(Path(cfg.out, file), begin, frames, starts, same | {
                "extend": extend, "prompt": " | ".join(texts), "prompts": texts, "times": times, "seed": seed,
                "id": row["id"], "name": name, "seconds": seconds, "frames": coder.frame_count(frames)})
    return list(videos.values())


def latent_frames(seconds, fps, coder, begin) -> int:
    """Whole chunks, behind the single frame of an image if there is one, that cover so many seconds."""
    image = begin % CHUNK
    covering = coder.latent_count(round(seconds * fps) + coder.time - 1)
    return image + math.ceil((covering - image) / CHUNK) * CHUNK


def check_slides(cfg, starts, begin, frames, seconds, where):
    """Refuses a prompt that would never be shown: the text changes only where the window slides."""
    first = begin + (cfg.window - begin) // CHUNK * CHUNK
    slides = range(first, frames, (cfg.window - cfg.keep) // CHUNK * CHUNK)
    shown = [next((slide for slide in (0, *slides) if slide >= start), None) for start in starts]
    if None in shown or len(set(shown)) < len(shown):
        places = ", ".join(f"{seconds(slide):.2f}" for slide in slides)
        raise UserError(f"{where}: not all {len(starts)} prompts would be shown: the text changes where the "
                        f"window slides, {f'at {places} s' if slides else 'never here'}.\n"
                        "Change the times, --seconds or --window")


def slug(text: str) -> str:
    return re.sub(r"[\W_]+", "-", text.lower())[:40].strip("-")


def finished(video: Video) -> bool:
    """Is it there? Then it must have been made in the same way."""
    if not video.path.exists():
        return False
    before = data.read_tags(video.path)
    for key, value in video.tags.items():
        if key != "command" and before.get(key) != value:
            raise UserError(f"{video.path} was made with {key} = {before.get(key)}, not {value}; choose "
                            "another --out, or remove it")
    return True


# ----------------------------------------------------------------------------------------------------
# making it

def encode_prompts(cfg: Config, todo, limits, device, dtype) -> list[dict[str, torch.Tensor]]:
    """For each batch its texts' embeddings, which do not depend on which other batches are left to do."""
    encoder, encoded = t5.load(cfg.wan, device, dtype), []
    for batch in todo:
        prompts = [cfg.negative] + [text for video in batch for text in video.tags["prompts"]]
        encoded.append(dict(zip(prompts, encoder.encode(prompts), strict=True)))
        for prompt, rows in encoded[-1].items():
            if len(rows) > limits.text_len or rows.shape[1] != limits.text_dim:
                raise UserError(f"{prompt[:40]!r} is {len(rows)} tokens of width {rows.shape[1]} to {cfg.wan}"
                                f";\n{cfg.model} takes at most {limits.text_len} of width {limits.text_dim}")
    return encoded


def batches(videos, size: int) -> list[list[Video]]:
    """Only videos that begin alike and change their text at the same frames can be made together."""
    groups = defaultdict(list)
    for video in videos:
        groups[video.begin, video.frames, *video.starts].append(video)
    return [batch for group in groups.values() for batch in common.batched(group, size)]


def make(cfg: Config, videos, net, coder, texts, device, bar):
    """Generates videos together; each chunk is decoded and goes to the files as soon as it is done."""
    began, drift, frames = time.monotonic(), [], videos[0].tags["frames"]
    schedule = [(start, [texts[video.tags["prompts"][i]] for video in videos])
                for i, start in enumerate(videos[0].starts)]
    width, height = map(int, cfg.size.split("x"))
    given = torch.stack([read_context(cfg, video, coder) for video in videos]) if videos[0].begin else None
    film = diffusion.Film(coder, cfg.keep, cfg.reentry)
    chunks = diffusion.generate(
        net, schedule, texts[cfg.negative], sampling(cfg), frames=videos[0].frames,
        shape=(coder.z_dim, height // coder.space, width // coder.space),
        ids=[(video.tags["seed"], video.tags["id"]) for video in videos],  # so that a batch may mix seeds
        context=None if given is None else torch.cat(
            [coder.encode(data.to_float(pixels[None].to(device))) for pixels in given]),
        chunk=CHUNK, window=cfg.window, keep=cfg.keep, reenter=film.reenter)
    with contextlib.ExitStack() as stack:
        files = [None if finished(video) else stack.enter_context(
            data.writing(video.path, video.tags["fps"], video.tags, cfg.crf, cfg.preset)) for video in videos]
        for first, latents in chunks:
            pieces = film.show(latents)
            if first == 0 and given is not None:  # as it was given, not as the VAE shows it
                pieces = given
            for write, piece in zip(files, data.to_uint8(pieces), strict=True):
                if write:
                    write(piece)
            drift.append((first, diffusion.drift_statistics(latents)))  # numbers only at the end: no waiting
            bar.update(pieces.shape[0] * pieces.shape[1])
    if cfg.log_drift:
        for i, video in enumerate(videos):
            common.write_text(video.path.with_suffix(".jsonl"), data.as_lines(
                {"frame": first} | {k: v[i].item() for k, v in stats.items()} for first, stats in drift))
    rate = len(videos) * frames / (time.monotonic() - began)
    for video in videos:
        bar.write(f"{video.path}: {frames} frames ({frames / video.tags['fps']:.2f} s), {rate:.2f} frames/s")


def sampling(cfg: Config) -> diffusion.Sampling:
    return diffusion.Sampling(cfg.steps, cfg.shift, cfg.guidance, cfg.solver, cfg.context_noise,
                              cfg.history_guidance, cfg.history_level)


if __name__ == "__main__":
    common.run(main, Config, __doc__)
