"""Stage 5: videos/ -> report/, how far long videos drift: the paper's tables, curves over time, film strips.

    python eval_drift.py videos/                                    one method, into report/
    python eval_drift.py DF=df/videos R3=r3/videos --out report     a row for each; any model's videos
    python eval_drift.py videos/ --weights vbench/                  with VBench's networks: Table 1
    python eval_drift.py videos/ --toy                              the toy world: is the sprite still there?
    python eval_drift.py videos/ --model model_1 --data agg_0       also probe the model for exposure bias
    torchrun --nproc-per-node 8 eval_drift.py ...                   videos spread over 8 GPUs

Without weights it reports colour, detail and motion, which need none. Every video's scores are kept in
report/scores: killed and started again it continues, and weights added later score only what is new.
Exit status 3: a video was skipped (the reason is listed; --allow-skips makes it 0).
"""

import functools
import itertools
import json
import math
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import common
import data
import diffusion
import metrics
import model
import report
import toy
import vae
from common import UserError, print0


@dataclass
class Config:
    videos: tuple[str, ...] = common.positional()  # a folder for each method; NAME=folder gives it a name
    out: str = "report"  # where the report goes
    weights: str | None = None  # folder of VBench's weight files, looked in before VBench's own cache
    vbench: tuple[str, ...] = ()  # result files of VBench itself; their scores take the place of ours
    real: str | None = None  # folder of real videos: adds the Frechet distance to them
    toy: bool = False  # the videos show the toy world: adds its sprite and background
    extra: bool = False  # adds local contrast and flicker
    stride: int = 4  # score every so many frames where no weights are needed; VBench takes all
    batch: int = 32  # frames a network takes at once, which changes no score
    allow_skips: bool = False  # exit with 0 although videos were skipped
    model: tuple[str, ...] = ()  # models to probe for exposure bias; needs --data
    data: str | None = None  # agg_k, for the probes
    # seed clips that training held out, for the probes (default: as many as the model was trained without)
    held_out: int | None = None
    clips: int = 16  # how many of them the probes take at most
    wan: str | None = None  # Wan directory, for the probes' VAE (default: what --data was made with)
    steps: int = 20  # of the solver, in the probes
    guidance: float = 6.0  # in the probe of recovery; the other is about the model without guidance
    shift: float = 8.0  # in the probes
    device: str | None = None  # cuda or cpu (default: a GPU if there is one)


VERSION = 2  # of the scores kept in scores/
FLOOR = 1e-3  # smaller means count as this: a ratio to a share of 0.1 %, or to stillness, says no more
DEFINITIONS = {
    "score": "the whole video's: the mean over its frames, or as VBench defines it",
    "first": "mean of the first 20 % of frames",
    "last": "mean of the last 20 % of frames",
    "drift": "first 20 % of frames minus all (the paper's; positive: it got worse)",
    "start_end": "|first 15 % of frames - last 15 %| (FramePack's start-end contrast)",
    "log_ratio": f"log(last / first), each at least {FLOOR:g}; shown as x1.42, where x1.00 is no drift",
    "abs_log_ratio": "|log_ratio|, in which drifts up and down do not cancel; shown as a factor",
    "motion_quality": "mean of motion smoothness x100 and dynamic degree x100 (the paper's Table 2)",
    "frame_quality": "mean of aesthetic quality x100 and imaging quality (the paper's Table 2)",
    "frechet": "Frechet distance to real frames, by fifths of the time, all videos of a method together, "
               "on the features of a fixed random convolutional network",
    "mean": "over prompts, each prompt's videos averaged first; those that continue another video, or "
            "another image, count as of another prompt",
    "sem": "standard error of that mean, of the probes' over clips; what is in parentheses",
    "paired": "mean difference between files of one name, or of one prompt and seed, over prompts as above, "
              "and its 95 % interval by Student's t: the interval is [mean, low, high]",
    "own_minus_real": "loss on the model's own chunk behind its own ones minus loss on the real chunk behind "
                      "real ones, at the same noise, without guidance, by UniPC. Where its videos are "
                      "distributed as real ones and --steps are enough it is 0, though 0 does not prove that "
                      "they are. Negative: its own are easier for it (simpler, or real ones are strange to "
                      "it); positive: harder (wilder). Of the first chunk behind a real one, which shows "
                      "misfit, and of the last, which shows drift too",
    "recovery": "a real context of 4 chunks is spoilt in pixels, then continued: chunks until the latents' "
                "mean and std, saturation and detail are all within 5..95 % of the data's",
}


def main(cfg: Config):
    ranks = common.start_ranks(cfg.device)
    if bool(cfg.model) != bool(cfg.data) or min(cfg.stride, cfg.batch, cfg.clips) < 1:
        raise UserError("--model and --data go together; --stride, --batch and --clips are at least 1")
    folders, out = name_methods(cfg.videos), Path(cfg.out)
    (out / "scores").mkdir(parents=True, exist_ok=True)
    if ranks.rank == 0:
        common.sweep(out)  # nobody writes before all have met in find_videos
    clips, skipped = find_videos(folders, cfg.toy, ranks)
    require(clips, skipped)
    print0(f"{len(clips)} videos in {', '.join(folders)}; {len(skipped)} skipped")
    real, unreal = find_videos({"real": Path(cfg.real)}, False, ranks, alike=False) if cfg.real else ([], {})
    names = wanted(cfg, clips)
    scorers, missing = metrics.open_scorers(names, ranks.device, cfg.weights, cfg.stride, cfg.batch)
    missing |= {name: "needs frames of at least 128x128" for name in metrics.DIMENSIONS if name not in names}
    for name, reason in missing.items():
        print0(f"no {name}: {reason}")
    shape = (clips[0].fps, (clips[0].width, clips[0].height))  # what real videos are brought to
    plain = ["toy"] * cfg.toy + ["frechet"] * bool(cfg.real)
    jobs = [Job(clip, score_file(out, clip, cfg.stride), scorers, plain) for clip in clips]
    jobs += [Job(clip, score_file(out, clip, cfg.stride, *shape), [], ["frechet"], *shape) for clip in real]
    skipped |= unreal | score_all(jobs, cfg.stride, ranks)
    clips, real = ([clip for clip in some if str(clip.path) not in skipped] for some in (clips, real))
    require(clips, skipped)
    probes = {path: probe_once(cfg, path, ranks) for path in cfg.model}
    if ranks.rank == 0:
        summary = summarise(cfg, clips, real, shape)
        report.write(out, summary | {"missing": missing, "skipped": skipped, "probes": probes}, clips)
    for path, reason in skipped.items():
        print0(f"skipped: {reason if path in reason else f'{path}: {reason}'}")
    return 3 if skipped and not cfg.allow_skips else None


# ----------------------------------------------------------------------------------------------------
# which videos there are

class Clip(NamedTuple):
    method: str
    name: str  # path within its folder
    path: Path
    fps: Fraction
    width: int
    height: int
    frames: int
    prompt: str
    begin: str | None  # the video or image that it continues
    seed: int | None
    key: str  # of its bytes


def require(clips, skipped):
    if not clips:
        raise UserError("no video can be scored: " + "; ".join(
            reason if path in reason else f"{path} {reason}" for path, reason in skipped.items()))


def wanted(cfg: Config, clips: list[Clip]) -> list[str]:
    """The metrics to show; RAFT and AMT cannot take frames below 128x128."""
    small = ("motion_smoothness", "dynamic_degree") * (min(min(c.width, c.height) for c in clips) < 128)
    names = [*metrics.FREE, *metrics.DIMENSIONS, *(metrics.OPTIONAL if cfg.extra else ())]
    return [name for name in names if name not in small]


def name_methods(given) -> dict[str, Path]:
    methods = {}
    for text in given:
        name, _, folder = text.rpartition("=") if not Path(text).exists() else ("", "", text)
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"no such folder of videos: {folder}")
        name = name or folder.resolve().name
        if name in methods:
            raise UserError(f"two folders are called {name}; tell them apart: A={methods[name]} B={folder}")
        methods[name] = folder
    return methods


def find_videos(folders: dict[str, Path], is_toy: bool, ranks, alike=True):
    """([Clip] in order, {path: why it is skipped}); the same on all ranks. alike: of a size, per folder."""
    listed = [(method, path, text) for method, folder in folders.items()
              for path, text in sorted(data.list_folder(folder), key=lambda found: str(found[0]))]
    skipped = {str(folder): "holds no videos" for method, folder in folders.items()
               if not any(row[0] == method for row in listed)}

    def look(method, path, text):
        video, tags = data.probe(path), data.read_tags(path)
        if video.frames < 3:
            raise UserError(f"{path} has {video.frames} frames; 3 are the least that can drift")
        if is_toy and (video.width, video.height) != (toy.SIZE, toy.SIZE):
            raise UserError(f"{path} is {video.width}x{video.height}; the toy world (--toy) is "
                            f"{toy.SIZE}x{toy.SIZE}")
        prompt = str(tags.get("prompt") or text or path.stem).strip()
        return Clip(method, path.relative_to(folders[method]).as_posix(), path, video.fps, video.width,
                    video.height, video.frames, prompt, tags.get("extend") or tags.get("image"),
                    tags.get("seed"), common.fingerprint(path))

    found = []
    for place, row in list(enumerate(listed))[ranks.rank::ranks.world]:
        try:
            found.append((place, look(*row)))
        except UserError as error:
            found.append((place, str(error)))
    clips = []
    for place, clip in sorted(gathered(found, ranks), key=lambda pair: pair[0]):
        if isinstance(clip, str):
            skipped[str(listed[place][1])] = clip
        else:
            clips.append(clip)
    kinds = defaultdict(Counter)
    for clip in clips:
        kinds[clip.method][kind(clip)] += 1
    for clip in clips if alike else ():  # within a method numbers must be comparable
        usual = kinds[clip.method].most_common(1)[0][0]
        if kind(clip) != usual:
            skipped[str(clip.path)] = f"{kind(clip)}, where most of {clip.method} are {usual}"
    return [clip for clip in clips if str(clip.path) not in skipped], skipped


def kind(clip: Clip) -> str:
    return f"{clip.width}x{clip.height} at {float(clip.fps):.5g} fps"


def gathered(part: list, ranks) -> list:
    """All ranks' lists in one."""
    parts = [None] * ranks.world
    dist.all_gather_object(parts, part)
    return list(itertools.chain.from_iterable(parts))


# ----------------------------------------------------------------------------------------------------
# scoring: each video is decoded once, in pieces, for all scorers

class Job(NamedTuple):
    clip: Clip
    file: Path
    scorers: list
    plain: list[str]  # what is kept besides: toy, frechet
    fps: Fraction | None = None  # to resample to
    size: tuple[int, int] | None = None


def score_file(out: Path, clip: Clip, stride: int, *shape) -> Path:
    """Named after what is in it: the same video elsewhere, or under another name, is not scored again."""
    settings = f"{common.seed_of(VERSION, stride, str(shape)) % 16**8:08x}"
    return out / "scores" / f"{clip.key}-{settings}.safetensors"


def score_all(jobs: list[Job], stride: int, ranks) -> dict[str, str]:
    """Makes every job's file, and returns the videos that turned out to be damaged, with the reason."""
    mine, errors = list({job.file: job for job in jobs}.values())[ranks.rank::ranks.world], []
    with common.progress(sum(job.clip.frames for job in mine), "frames", ranks) as bar:
        for job in mine:
            try:
                score(job, stride, ranks.device, bar)
            except UserError as error:
                errors.append((job.file, str(error)))
    errors = dict(gathered(errors, ranks))
    return {str(job.clip.path): errors[job.file] for job in jobs if job.file in errors}


def score(job: Job, stride: int, device, bar):
    tensors, totals = read_scores(job.file)
    scorers = [s for s in job.scorers if not set(s.names) <= tensors.keys()]
    plain = [name for name in job.plain if not any(key.partition(".")[0] == name for key in tensors)]
    if not scorers and not plain:
        bar.update(job.clip.frames)
        return
    parts, seen = defaultdict(list), 0
    for scorer in scorers:
        scorer.start(float(job.fps or job.clip.fps))
    for piece in pieces(job):
        for scorer in scorers:
            scorer.add(piece)
        some = piece[-seen % stride::stride]
        if "toy" in plain and len(some):
            for name, value in toy.fit(some).items():
                parts[f"toy.{name}"].append(value)
        if "frechet" in plain and len(some):
            parts["frechet"].append(metrics.frechet_features(some.to(device)).cpu())
        seen += len(piece)
        bar.update(len(piece))
    for scorer in scorers:
        for name, curve in scorer.finish().items():
            tensors[name] = torch.from_numpy(np.stack([curve.frame, curve.value]).astype(np.float64))
            totals[name] = float(curve.total)
    tensors |= {name: torch.cat(rows) for name, rows in parts.items()}
    common.save_tensors(job.file, tensors, totals=totals)


def pieces(job: Job, size: int = 32):
    """uint8 [n,3,H,W], decoded ahead by a thread."""
    frames = data.read_frames(data.probe(job.clip.path), job.fps, job.size)
    for _, piece in common.ahead(lambda _: list(islice(frames, size)), itertools.count(), workers=1):
        if not piece:
            return
        yield torch.stack(piece)


def read_scores(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    if not file.exists():
        return {}, {}
    stored, metadata = common.open_weights(file)
    return {name: tensor.read() for name, tensor in stored.items()}, metadata["totals"]


# ----------------------------------------------------------------------------------------------------
# from curves to numbers

def mean(values) -> float:
    """Of what there is: nan marks frames without a value."""
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def sem(values) -> float:
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    return float(values.std(ddof=1) / len(values)**0.5) if len(values) > 1 else math.nan


def prompt_of(video: dict) -> tuple:
    return video["prompt"], video["begin"]


def by_prompt(column: list[tuple]) -> np.ndarray:
    """[(prompt, value)] -> a mean for each prompt that has one. Videos of one prompt resemble each other, so
    that only prompts are independent of each other."""
    groups = defaultdict(list)
    for prompt, value in column:
        groups[prompt].append(value)
    means = np.array([mean(group) for group in groups.values()])
    return means[~np.isnan(means)]


def summaries(value: np.ndarray, total: float | None = None) -> dict[str, float]:
    """DEFINITIONS of one video's curve."""
    n20, n15 = max(1, int(0.2 * len(value))), max(1, int(0.15 * len(value)))
    first, last = mean(value[:n20]), mean(value[-n20:])
    ratio = math.log(np.maximum(last, FLOOR) / np.maximum(first, FLOOR))
    return {"score": mean(value) if total is None else total, "first": first, "last": last,
            "drift": first - mean(value), "start_end": abs(mean(value[:n15]) - mean(value[-n15:])),
            "log_ratio": ratio, "abs_log_ratio": abs(ratio)}


def read_curves(cfg: Config, clip: Clip, names: list[str]):
    """({metric: (frame, value)}, {metric: total}, features for the Frechet distance) of one video."""
    tensors, totals = read_scores(score_file(Path(cfg.out), clip, cfg.stride))
    curves = {name: tensors[name].numpy() for name in names if name in totals}
    if cfg.toy:
        reading = {name[4:]: tensor for name, tensor in tensors.items() if name.startswith("toy.")}
        for name, value in toy.judge(reading, clip.prompt, cfg.stride).items():
            if not value.isnan().all():  # the prompt may name no shape
                curves[name] = np.stack([cfg.stride * np.arange(len(value)), value.double().numpy()])
    return curves, totals, tensors.get("frechet")


def summarise(cfg: Config, clips: list[Clip], real: list[Clip], shape) -> dict:
    """Everything the report shows: videos, means over them, curves over time, pairs, distances."""
    videos, features, names = [], defaultdict(lambda: [[] for _ in range(5)]), wanted(cfg, clips)
    for clip in clips:
        curves, totals, frechet = read_curves(cfg, clip, names)
        videos.append({"method": clip.method, "name": clip.name, "prompt": clip.prompt, "begin": clip.begin,
                       "seed": clip.seed, "frames": clip.frames, "fps": float(clip.fps),
                       "size": f"{clip.width}x{clip.height}", "curves": curves,
                       "metrics": {name: summaries(c[1], totals.get(name)) for name, c in curves.items()}})
        if cfg.real:
            for window, rows in zip(features[clip.method], frechet.tensor_split(5), strict=True):
                window.append(rows)
    for file in cfg.vbench:
        merge_vbench(file, clips, videos)
    for known in (video["metrics"] for video in videos):
        for name, parts in metrics.QUALITIES.items():
            if all(p in known for p in parts):
                known[name] = {"score": mean([metrics.SCALE.get(p, 100) * known[p]["score"] for p in parts])}
    rows = {method: [v for v in videos if v["method"] == method] for method in dict.fromkeys(
        video["method"] for video in videos)}
    frechet = {}
    if cfg.real:
        stored = [read_scores(score_file(Path(cfg.out), clip, cfg.stride, *shape))[0] for clip in real]
        reference = torch.cat([tensors["frechet"] for tensors in stored])
        frechet = {method: [metrics.frechet_distance(reference, torch.cat(window))
                            for window in features[method]] for method in rows}
    explained = metrics.FREE | metrics.DIMENSIONS | metrics.OPTIONAL | toy.READINGS
    return {"version": VERSION, "definitions": DEFINITIONS, "settings": {
                k: v for k, v in asdict(cfg).items() if k not in ("out", "device", "allow_skips")},
            "metrics": {k: v for k, v in explained.items() if k in names or (cfg.toy and k in toy.READINGS)},
            "mean": {method: over_videos(own, mean) for method, own in rows.items()},
            "sem": {method: over_videos(own, sem) for method, own in rows.items()},
            "paired": [compare(rows[a], rows[b]) for a, b in itertools.combinations(rows, 2)],
            "frechet": frechet, "curves": {method: binned(own) for method, own in rows.items()},
            "videos": videos}


def over_videos(videos: list[dict], statistic) -> dict:
    columns = defaultdict(lambda: defaultdict(list))
    for video in videos:
        for name, row in video["metrics"].items():
            for what, value in row.items():
                columns[name][what].append((prompt_of(video), value))
    return {name: {what: statistic(by_prompt(v)) for what, v in column.items()}
            for name, column in columns.items()}


def merge_vbench(file: str, clips: list[Clip], videos: list[dict]):
    """Puts the scores of VBench's result file in place of ours, by folder and file name."""
    results, places = common.read_json(file), defaultdict(list)
    for place, clip in enumerate(clips):
        places[clip.path.resolve().parent.name, clip.path.name].append(place)
    for name, result in results.items():
        if name not in metrics.DIMENSIONS or not isinstance(result, list) or len(result) != 2:
            raise UserError(f"{file}: {name} is none of VBench's six custom-input dimensions")
        given, touched = {}, set()
        for row in result[1]:
            path = Path(row["video_path"]).resolve()
            likely = places[path.parent.name, path.name]
            likely = [place for place in likely if clips[place].path.resolve() == path] or likely
            if len(likely) > 1:
                raise UserError(f"{file}: {path} may be {' or '.join(str(clips[p].path) for p in likely)}; "
                                "rename a folder")
            given |= dict.fromkeys(likely, float(row["video_results"]))
            touched |= {clips[place].method for place in likely}
        if not given:
            raise UserError(f"{file}: {name} is about none of these videos; folder and file names must agree")
        for place, clip in enumerate(clips):  # a method's column is all VBench's, or all ours
            if clip.method in touched and place not in given:
                raise UserError(f"{file}: {name} lacks {clip.path}; score the whole folder with VBench")
            if place in given:
                videos[place]["metrics"].setdefault(name, {})["score"] = given[place]


def compare(rows_a: list[dict], rows_b: list[dict]) -> dict:
    """How method b differs from a on the videos that both made."""
    both = report.partners(rows_a, rows_b)
    gaps = defaultdict(lambda: defaultdict(list))
    for video, other in both:
        a, b = video["metrics"], other["metrics"]
        for name in a.keys() & b.keys():
            for what in a[name].keys() & b[name].keys():
                gaps[name][what].append((prompt_of(video), b[name][what] - a[name][what]))
    gaps = {name: {what: interval(by_prompt(column[what])) for what in DEFINITIONS if what in column}
            for name, column in sorted(gaps.items())}
    return {"a": rows_a[0]["method"], "b": rows_b[0]["method"], "pairs": len(both),
            "prompts": len({prompt_of(video) for video, _ in both}), "b_minus_a": gaps}


def interval(gap: np.ndarray) -> dict | None:
    """The mean of independent differences and its 95 % interval."""
    if len(gap) < 2:
        return None
    middle, reach = mean(gap), t_quantile(len(gap) - 1) * sem(gap)
    return {"interval": [middle, middle - reach, middle + reach], "prompts": len(gap)}


@functools.cache
def t_quantile(freedom: int) -> float:
    """The 97.5 % point of Student's t; if t is freedom**0.5 tan(u), u's density is cos(u)**(freedom - 1)."""
    u = np.linspace(0, math.pi / 2, 100_001)
    share = np.cumsum(np.cos((u[1:] + u[:-1]) / 2)**(freedom - 1))
    return freedom**0.5 * math.tan(np.interp(0.95 * share[-1], share, u[1:]))


def binned(rows: list[dict]) -> dict[str, np.ndarray]:
    """{metric: [3, bins]}: seconds, mean over prompts, its standard error; bins of 2 s, but at least 10."""
    seconds = max(row["frames"] / row["fps"] for row in rows)
    count = max(10, round(seconds / 2))
    edges, bins = np.linspace(0, seconds, count + 1)[1:-1], defaultdict(lambda: [[] for _ in range(count)])
    for row in rows:
        for name, (frame, value) in row["curves"].items():
            place = np.digitize(frame / row["fps"], edges)
            for i, column in enumerate(bins[name]):
                column.append((prompt_of(row), mean(value[place == i])))
    middle = (np.arange(count) + 0.5) * seconds / count
    return {name: np.array([middle, *([f(by_prompt(column)) for column in columns] for f in (mean, sem))])
            for name, columns in bins.items()}


# ----------------------------------------------------------------------------------------------------
# exposure bias, seen from inside: probes that need the model

LEVELS = (100, 300, 500, 700, 900)
CONTEXT, CHUNK, AHEAD = 12, 3, 9  # latent frames of context and of a chunk; chunks to continue


def saturate(video):
    grey = (video * torch.tensor([0.299, 0.587, 0.114], device=video.device).view(3, 1, 1)).sum(-3, True)
    return (grey + 2 * (video - grey)).clamp(-1, 1)


def blur(video):
    small = F.avg_pool2d(video.flatten(0, 1), 4)
    return F.interpolate(small, video.shape[-2:], mode="bilinear").view_as(video)


def add_grain(video):
    grain = torch.randn(video.shape, generator=common.rng("grain")).to(video.device)
    return (video + 0.2 * grain).clamp(-1, 1)


SPOILT = {"untouched": lambda video: video, "saturated": saturate, "blurred": blur, "noisy": add_grain}
STATISTICS = ("mean", "std", "saturation", "detail")


def probe_once(cfg: Config, path: str, ranks) -> dict:
    """probe_model's results, which are kept beside the scores."""
    store = data.Clips(cfg.data)
    chosen = unseen_clips(cfg, path, store)
    what = (VERSION, common.fingerprint(*model.find_weights(path)), common.fingerprint(store.index),
            store.meta(), cfg.wan, chosen, cfg.steps, cfg.guidance, cfg.shift)
    file = Path(cfg.out, "scores", f"probes-{common.seed_of(*what):x}.json")
    dist.barrier()
    if not file.exists():
        found = probe_model(cfg, path, store, chosen, ranks)
        if ranks.rank == 0:
            common.write_text(file, json.dumps(found) + "\n")
    dist.barrier()
    return common.read_json(file)


def unseen_clips(cfg: Config, path: str, store: data.Clips) -> list[int]:
    """Places of the seed clips to probe with: those it was trained on would flatter the model."""
    trained = model.settings(path).get("held_out", data.HELD_OUT)
    count = trained if cfg.held_out is None else cfg.held_out
    chosen = data.held_out(store, count)[:cfg.clips]
    if not chosen:
        raise UserError(f"{cfg.data}: the probes need seed clips that {path} was not trained on, and none "
                        "are held out; train with --held-out, or give --data of other videos and --held-out")
    if store.meta()["latents"][0] < CONTEXT + CHUNK:
        raise UserError(f"{cfg.data}: the probes need clips of at least {CONTEXT + CHUNK} latent frames")
    return chosen


def probe_model(cfg: Config, path: str, store: data.Clips, chosen: list[int], ranks) -> dict:
    """How unlike real videos the model's own are, by its loss, and how soon it gets over a spoilt context."""
    coder = vae.load(cfg.wan or store.meta()["wan"], ranks.device)
    net = model.load(path, ranks.device)
    null = data.read_text_embedding(Path(cfg.data, "empty.safetensors")).float().to(ranks.device)
    results = []
    with common.progress(len(chosen[ranks.rank::ranks.world]), "probes", ranks) as bar:
        for i in chosen[ranks.rank::ranks.world]:
            clip = store.load(i)
            x, text = (clip[k].float().to(ranks.device)[None] for k in ("latents", "text"))
            own = (net, x, text, null, clip["id"], cfg)
            results.append((i, own_minus_real(*own), *recovery(coder, *own)))
            bar.update()
    _, gaps, real, spoilt = zip(*sorted(gathered(results, ranks)), strict=True)
    spoilt = np.array(spoilt)  # [clips, kinds, chunks, statistics]
    low, high = np.quantile(np.concatenate(real), (0.05, 0.95), axis=0)
    back = ((spoilt >= low) & (spoilt <= high)).all(-1)  # [clips, kinds, chunks]
    took = np.where(back.any(-1), back.argmax(-1) + 1, AHEAD + 1)
    by_chunk = zip(("first", "last"), np.array(gaps).transpose(1, 2, 0), strict=True)  # [levels, clips] each
    return {"clips": len(gaps), "levels": LEVELS,
            "own_minus_real": {chunk: {"mean": [*map(mean, rows)], "sem": [*map(sem, rows)]}
                               for chunk, rows in by_chunk},
            "range": dict(zip(STATISTICS, np.stack([low, high], 1).tolist(), strict=True)),
            "recovery": {name: {"chunks": float(took[:, k].mean()), "sem": sem(took[:, k]),
                                "within": back[:, k].mean(0).tolist()} for k, name in enumerate(SPOILT)}}


def sampling(cfg: Config, x) -> dict:
    return {"shape": tuple(x.shape[2:]), "chunk": CHUNK, "steps": cfg.steps, "shift": cfg.shift,
            "guidance": cfg.guidance}


@torch.no_grad()
def own_minus_real(net, x, text, null, id: str, cfg: Config) -> list[list[float]]:
    """Loss on the model's own continuation of x's first chunk minus loss on x itself, of the first and the
    last chunk after it, at LEVELS. Each is seen behind what truly came before it: if own videos are
    distributed as real ones, so are the losses. Guidance or a coarse solver would change the former."""
    x = x[:, :7 * CHUNK]  # what fits into one window
    own = diffusion.generate(net, [text[0]], null, ids=[id], context=x[:, :CHUNK], frames=x.shape[1],
                             **sampling(cfg, x) | {"guidance": 1.0, "solver": "unipc"})
    both = torch.cat([own, x])
    noise = torch.randn(x.shape, generator=common.rng("gap", id)).to(x.device)
    gaps = []
    for end in (2 * CHUNK, x.shape[1]):
        videos, t, gap = both[:, :end], torch.zeros(2, end, device=x.device), []
        for level in LEVELS:
            t[:, -CHUNK:] = level
            v = net(diffusion.add_noise(videos, noise[:, :end], t), t, text.expand(2, -1, -1), chunk=CHUNK)
            off = (v - diffusion.velocity(videos, noise[:, :end]))[:, -CHUNK:]
            own_loss, real_loss = off.square().mean((1, 2, 3, 4)).tolist()
            gap.append(own_loss - real_loss)
        gaps.append(gap)
    return gaps


@torch.no_grad()
def recovery(coder, net, x, text, null, id: str, cfg: Config) -> tuple[list, list]:
    """STATISTICS of the real clip's chunks, and of the chunks continuing its first 4 when SPOILT."""
    video = coder.decode(x)
    context = video[:, :coder.frame_count(CONTEXT)]
    spoilt = torch.cat([coder.encode(spoil(context)) for spoil in SPOILT.values()])
    chunks = []
    diffusion.generate(net, [text[0]] * len(SPOILT), null, ids=[id] * len(SPOILT), context=spoilt,
                       frames=CONTEXT + AHEAD * CHUNK, vae=coder, **sampling(cfg, x),
                       on_chunk=lambda first, z, v: chunks.append(statistics(z, v)))
    ends = [coder.frame_count(f) for f in range(0, x.shape[1] + 1, CHUNK)]
    real = [statistics(z, video[:, a:b])[0]
            for z, a, b in zip(x.split(CHUNK, 1), ends[:-1], ends[1:], strict=True)]
    return real, np.stack(chunks[1:], 1).tolist()  # without the context: [kinds, chunks, statistics]


def statistics(latents, video) -> list[list[float]]:
    drift = diffusion.drift_statistics(latents)
    [scorer] = metrics.open_scorers(["saturation", "detail"], stride=1)[0]
    rows = []
    for i, frames in enumerate(data.to_uint8(video).cpu()):
        scorer.start(16)
        scorer.add(frames)
        curves = scorer.finish()
        rows.append([*(drift[name][i].item() for name in STATISTICS[:2]),
                     *(curves[name].total for name in STATISTICS[2:])])
    return rows


if __name__ == "__main__":
    common.run(main, Config, __doc__)
