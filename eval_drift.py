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

import base64
import functools
import html
import itertools
import json
import math
import re
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
    clips: int = 16  # how many of its real clips the probes use
    wan: str | None = None  # Wan directory, for the probes' VAE (default: what --data was made with)
    steps: int = 20  # of the solver, in the probes
    guidance: float = 6.0  # in the probes
    shift: float = 8.0  # in the probes
    device: str | None = None  # cuda or cpu (default: a GPU if there is one)


VERSION = 1  # of the scores kept in scores/
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
    "sem": "standard error of the mean over videos; what is in parentheses",
    "paired": "mean difference between files of one name, or of one prompt and seed, and the 95 % interval "
              "of 2000 bootstrap resamples of the pairs",
    "loss_gap": "loss on the real chunk 4 behind the model's own chunks 1-3 minus behind the real ones, at "
                "the same noise",
    "recovery": "a real context of 4 chunks is spoilt in pixels, then continued: chunks until the latents' "
                "mean and std, saturation and detail are all within 5..95 % of the data's",
}


def main(cfg: Config):
    ranks = common.start_ranks(cfg.device)
    if bool(cfg.model) != bool(cfg.data) or min(cfg.stride, cfg.batch, cfg.clips) < 1:
        raise UserError("--model and --data go together; --stride, --batch and --clips are at least 1")
    folders, out = name_methods(cfg.videos), Path(cfg.out)
    (out / "scores").mkdir(parents=True, exist_ok=True)
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
    probes = {path: probe_model(cfg, path, ranks) for path in cfg.model}
    if ranks.rank == 0:
        report = {"missing": missing, "skipped": skipped, "probes": probes}
        write_report(cfg, summarise(cfg, clips, real, shape) | report, clips)
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
                    video.height, video.frames, prompt, tags.get("seed"), common.fingerprint(path))

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
        if "toy" in plain:
            for name, value in toy.fit(piece).items():
                parts[f"toy.{name}"].append(value)
        if "frechet" in plain and len(some := piece[-seen % stride::stride]):
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
        for name, value in toy.judge(reading, clip.prompt).items():
            if not value.isnan().all():  # the prompt may name no shape
                curves[name] = np.stack([np.arange(len(value)), value.double().numpy()])
    return curves, totals, tensors.get("frechet")


def summarise(cfg: Config, clips: list[Clip], real: list[Clip], shape) -> dict:
    """Everything the report shows: videos, means over them, curves over time, pairs, distances."""
    videos, features, names = [], defaultdict(lambda: [[] for _ in range(5)]), wanted(cfg, clips)
    for clip in clips:
        curves, totals, frechet = read_curves(cfg, clip, names)
        videos.append({"method": clip.method, "name": clip.name, "prompt": clip.prompt, "seed": clip.seed,
                       "frames": clip.frames, "fps": float(clip.fps), "size": f"{clip.width}x{clip.height}",
                       "curves": curves,
                       "metrics": {name: summaries(c[1], totals.get(name)) for name, c in curves.items()}})
        if cfg.real:
            for window, rows in zip(features[clip.method], frechet.tensor_split(5), strict=True):
                window.append(rows)
    for file in cfg.vbench:
        merge_vbench(file, clips, videos)
    for known in (video["metrics"] for video in videos):
        for name, parts in QUALITIES.items():
            if all(part in known for part in parts):
                known[name] = {"score": mean([SCALE.get(part, 100) * known[part]["score"] for part in parts])}
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


SCALE = {"imaging_quality": 1, "motion_quality": 1, "frame_quality": 1}  # to 0..100; of the others, 100
QUALITIES = {"motion_quality": ("motion_smoothness", "dynamic_degree"),
             "frame_quality": ("aesthetic_quality", "imaging_quality")}


def over_videos(videos: list[dict], statistic) -> dict:
    columns = defaultdict(lambda: defaultdict(list))
    for video in videos:
        for name, row in video["metrics"].items():
            for what, value in row.items():
                columns[name][what].append(value)
    return {name: {what: statistic(v) for what, v in column.items()} for name, column in columns.items()}


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


def partners(rows_a: list[dict], rows_b: list[dict]) -> list[tuple[dict, dict]]:
    """The videos that two methods made of the same prompt and seed: files of one name, or with such tags."""
    by_name, by_tags = {video["name"]: video for video in rows_b}, defaultdict(list)
    for video in rows_b:
        by_tags[video["prompt"], video["seed"]].append(video)
    found = []
    for a in rows_a:
        tagged = by_tags[a["prompt"], a["seed"]] if a["seed"] is not None else []
        b = by_name.get(a["name"]) or (tagged[0] if len(tagged) == 1 else None)
        found += [(a, b)] if b else []
    return found


def compare(rows_a: list[dict], rows_b: list[dict]) -> dict:
    """How method b differs from a on the videos that both made."""
    both = [(a["metrics"], b["metrics"]) for a, b in partners(rows_a, rows_b)]
    gaps = defaultdict(lambda: defaultdict(list))
    for a, b in both:
        for name in a.keys() & b.keys():
            for what in a[name].keys() & b[name].keys():
                gaps[name][what].append(b[name][what] - a[name][what])
    gaps = {name: {what: bootstrap(np.array(column[what])) for what in DEFINITIONS if what in column}
            for name, column in sorted(gaps.items())}
    return {"a": rows_a[0]["method"], "b": rows_b[0]["method"], "pairs": len(both), "b_minus_a": gaps}


def bootstrap(gap: np.ndarray) -> list[float] | None:
    """[mean, low, high]: the 95 % interval of the mean."""
    gap = gap[~np.isnan(gap)]
    if len(gap) < 2:
        return None
    return [float(gap.mean()), *np.quantile(gap[resamples(len(gap))].mean(1), (0.025, 0.975)).tolist()]


@functools.cache
def resamples(n: int) -> np.ndarray:
    return np.random.default_rng(common.seed_of("bootstrap")).integers(0, n, (2000, n))


def binned(rows: list[dict]) -> dict[str, np.ndarray]:
    """{metric: [3, bins]}: seconds, mean over videos, its standard error; bins of 2 s, but at least 10."""
    seconds = max(row["frames"] / row["fps"] for row in rows)
    count = max(10, round(seconds / 2))
    edges, bins = np.linspace(0, seconds, count + 1)[1:-1], defaultdict(list)
    for row in rows:
        for name, (frame, value) in row["curves"].items():
            place = np.digitize(frame / row["fps"], edges)
            bins[name].append([mean(value[place == i]) for i in range(count)])
    middle = (np.arange(count) + 0.5) * seconds / count
    return {name: np.array([middle, *([f(column) for column in np.array(videos).T] for f in (mean, sem))])
            for name, videos in bins.items()}


# ----------------------------------------------------------------------------------------------------
# tables

class Table(NamedTuple):
    title: str
    note: str
    heads: list[str]
    rows: list[list[str]]  # the best of a column in **


def tables(report: dict) -> list[Table]:
    methods, toy_shown = list(report["mean"]), "sprite" in report["metrics"]
    free = [name for name in metrics.FREE | metrics.OPTIONAL if name in report["metrics"]]

    def column(name, what, key, text):
        """A method's row each; key: the least is the best."""
        rows = [[report[kind][m].get(name, {}) for kind in ("mean", "sem")] for m in methods]
        keys = [key(row.get(what, math.nan)) for row, _ in rows]
        cells = ["-" if math.isnan(k) else text(*row) for k, row in zip(keys, rows, strict=True)]
        best = min((k for k in keys if not math.isnan(k)), default=None) if len(methods) > 1 else None
        return [f"**{cell}**" if k == best else cell for k, cell in zip(keys, cells, strict=True)]

    def points(name, what="score"):
        scale, sign = SCALE.get(name, 100), -1 if what == "score" else 1
        return column(name, what, lambda v: sign * v,
                      lambda row, error: with_error(scale * row[what], scale * error[what]))

    def factor(name, what):
        return column(name, what, abs, lambda row, error: "x" + with_error(
            math.exp(row[what]), 100 * math.expm1(error[what]), ".2f", ".0f", "%"))

    def change(name, off):  # off: in grey levels, the less the better; else a share
        return column(name, "last", lambda v: v if off else -v, lambda row, error: (
            f"{row['first'] * (off or 100):.0f} -> "
            + with_error(row["last"] * (off or 100), error["last"] * (off or 100), ".0f", ".0f")))

    def table(title, note, columns):
        rows = zip(methods, *columns.values(), strict=True)
        return Table(title, note, ["Method", *columns], list(map(list, rows)))

    heads = ("Subject", "Bg. Cons.", "Smooth.", "Dynamic", "Aesthetic", "Imaging")
    found = [table("Quality and drift", "Global metrics: higher is better. Drifting metrics d, first 20 % "
                   "minus average: lower is better. x100, as in the paper's Table 1; (standard error).",
                   dict(zip(heads, map(points, metrics.DIMENSIONS), strict=True))
                   | {f"d {name}": points(f"{name.lower()}_quality", "drift") for name in heads[4:]})]
    if any(name in row for name in QUALITIES for row in report["mean"].values()):
        found.append(table("Motion and frame quality", "The paper's Table 2; higher is better.", {
            "Motion quality": points("motion_quality"), "Frame quality": points("frame_quality")}))
    found += [table("Change without weights", "Last 20 % over first 20 %: x1.00 is no drift.",
                    {name: factor(name, "log_ratio") for name in free}),
              table("Distance from no change", "The same, with up and down not cancelling between videos.",
                    {name: factor(name, "abs_log_ratio") for name in free})]
    if toy_shown:
        found.append(table("The toy world", "First 20 % -> last 20 %: per cent of moments with the sprite, "
                           "with the told shape and direction; grey levels off the first chunk.",
                           {name: change(name, name in ("colour", "background")) for name in toy.READINGS}))
    if report["frechet"]:
        rows = [[method, *(f"{v:.1f}" for v in row)] for method, row in report["frechet"].items()]
        found.append(Table("Frechet distance to real frames", "By fifths of the videos; lower is better.",
                           ["Method", *(f"{i}-{i + 20} %" for i in range(0, 100, 20))], rows))
    if len(methods) > 1:
        shown = [(f"d {name}", f"{name.lower()}_quality", "drift") for name in heads[4:]]
        shown += [(f"log ratio of {name}", name, "log_ratio") for name in free]
        shown += [(f"{name}, last 20 %", name, "last") for name in toy.READINGS if toy_shown]
        found.append(paired_table([c for c in report["paired"] if c["a"] == methods[0]], shown))
    return found + probe_tables(report["probes"])


def with_error(value: float, error: float, digits=".2f", error_digits=".2f", unit="") -> str:
    digits = digits if abs(value) < 100 else ".0f"
    return f"{value:{digits}}" + ("" if math.isnan(error) else f" ({error:{error_digits}}{unit})")


def paired_table(comparisons: list[dict], shown) -> Table:
    rows = []
    for head, name, what in shown:
        gaps, scale = [c["b_minus_a"].get(name, {}).get(what) for c in comparisons], 1
        if what == "drift":
            scale = SCALE.get(name, 100)
        cells = ["{:+.2f} [{:.2f}, {:.2f}]".format(*(scale * v for v in gap)) if gap else "-" for gap in gaps]
        rows.append([head, *(f"**{cell}**" if gap and gap[1] * gap[2] > 0 else cell
                             for gap, cell in zip(gaps, cells, strict=True))])
    return Table(f"Differences from {comparisons[0]['a']} on the same prompts",
                 "Mean over pairs [95 % bootstrap interval], bold where it excludes 0.",
                 ["", *(f"{c['b']} ({c['pairs']} pairs)" for c in comparisons)],
                 [row for row in rows if set(row[1:]) != {"-"}])


def as_markdown(found: list[Table]) -> str:
    lines = []
    for table in found:
        cells = [table.heads, *table.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        padded = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
        rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
        lines += [f"### {table.title}", "", table.note, "", padded[0], rule, *padded[1:], ""]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------
# pictures

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
WIDTH, HEIGHT, ACROSS = 250, 170, 4  # of a panel; panels in a row


def draw_curves(curves: dict) -> str:
    """An SVG of small multiples: a panel for each metric, a line with its standard error for each method."""
    names = list(dict.fromkeys(name for lines in curves.values() for name in lines))
    high = 34 + HEIGHT * math.ceil(len(names) / ACROSS)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH * ACROSS} {high}" '
             'font-family="Helvetica, Arial, sans-serif" font-size="10" fill="#333">']
    x = 46
    colors = dict(zip(curves, itertools.cycle(COLORS), strict=False))
    for method, color in colors.items():
        parts.append(f'<rect x="{x}" y="10" width="18" height="4" fill="{color}"/>'
                     f'<text x="{x + 24}" y="16" font-size="12">{html.escape(method)}</text>')
        x += 48 + 7 * len(method)
    for i, name in enumerate(names):
        lines = {m: rows[name] for m, rows in curves.items() if name in rows}
        parts.append(f'<g transform="translate({i % ACROSS * WIDTH} {34 + i // ACROSS * HEIGHT})">'
                     + draw_panel(name.replace("_", " "), lines, colors) + "</g>")
    return "\n".join(parts) + "\n</svg>\n"


def draw_panel(title: str, lines: dict, colors: dict) -> str:
    left, right, top, bottom = 46, WIDTH - 12, 22, HEIGHT - 30
    table = np.concatenate(list(lines.values()), 1)
    error = np.nan_to_num(table[2])
    low, high = np.nanmin(table[1] - error), np.nanmax(table[1] + error)
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low, high, end = low - pad, high + pad, table[0].max() + table[0].min()  # bins' middles -> the end

    def at(t, v):
        x, y = left + (right - left) * t / end, bottom - (bottom - top) * (v - low) / (high - low)
        return f"{x:.1f},{y:.1f}"

    parts = [f'<text x="{left}" y="{top - 8}" font-size="12" font-weight="bold">{html.escape(title)}</text>']
    for value in ticks(low, high):
        y = at(0, value).split(",")[1]
        parts.append(f'<path d="M{left},{y}H{right}" stroke="#e4e4e4"/>'
                     f'<text x="{left - 5}" y="{float(y) + 3.5:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in ticks(0, end):
        x = at(value, low).split(",")[0]
        parts.append(f'<path d="M{x},{bottom}v3" stroke="#888"/>'
                     f'<text x="{x}" y="{bottom + 14}" text-anchor="middle">{value:g} s</text>')
    parts.append(f'<path d="M{left},{bottom}H{right}" stroke="#888"/>')
    for method, (t, value, error) in lines.items():
        t, value, error = (row[~np.isnan(value)] for row in (t, value, np.nan_to_num(error)))
        over, line, under = ([at(*p) for p in zip(t, v, strict=True)]
                             for v in (value + error, value, value - error))
        band, line, color = " ".join(over + under[::-1]), " ".join(line), colors[method]
        parts.append(f'<path d="M{band}Z" fill="{color}" fill-opacity="0.18"/>'
                     f'<path d="M{line}" fill="none" stroke="{color}" stroke-width="1.8"/>')
    return "".join(parts)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About that many round numbers from low to high."""
    rough = (high - low) / count
    step = 10 ** math.floor(math.log10(rough))
    step *= next(m for m in (1, 2, 5, 10) if m * step >= rough)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def film_strips(report: dict, clips: list[Clip], out: Path) -> list:
    """[(prompt, seconds, [(method, png)])]: frames across time, of each method that made the same video."""
    rows, strips, pictures = defaultdict(list), [], []
    for video, clip in zip(report["videos"], clips, strict=True):
        rows[clip.method].append(video | {"clip": clip})
    base = next(iter(rows))
    same = {method: {a["name"]: b for a, b in partners(rows[base], own)} for method, own in rows.items()}
    groups = [[same[method][video["name"]] for method in rows if video["name"] in same[method]]
              for video in rows[base]]
    groups = sorted(groups, key=len, reverse=True)[:PROMPTS]
    groups += [[rows[method][0]] for method in rows if not same[method]]  # other prompts altogether
    for group in groups:
        strip = []
        for video in group:
            frames = across_time(video["clip"])
            data.film_strip(out / "row.png", [frames])
            strip.append((video["method"], (out / "row.png").read_bytes()))
            pictures.append(frames)
        pictures.append(torch.full((1, 3, 6, 1), 255, dtype=torch.uint8))  # space before the next prompt
        strips.append((group[0]["prompt"], group[0]["frames"] / group[0]["fps"], strip))
    (out / "row.png").unlink()
    data.film_strip(out / "filmstrips.png", pictures[:-1])
    return strips


PROMPTS, FRAMES, ROW = 4, 8, 80  # of a film strip: prompts at most, frames in a row, a row's height


def across_time(clip: Clip) -> torch.Tensor:
    """uint8 [FRAMES,3,ROW,W], the first frame to the last."""
    video = data.probe(clip.path)
    rate, size = (FRAMES - 1) / (video.duration - 1 / video.fps), (round(clip.width * ROW / clip.height), ROW)
    return torch.stack(list(islice(data.read_frames(video, rate, size), FRAMES)))


def sparklines(curves: dict) -> str:
    """A line of blocks for each metric and method; a metric's methods share one scale."""
    lines, widest = [], max(map(len, curves))
    for name in dict.fromkeys(name for rows in curves.values() for name in rows):
        shown = {method: rows[name][1] for method, rows in curves.items() if name in rows}
        together = np.concatenate(list(shown.values()))
        low, high = np.nanmin(together), np.nanmax(together)
        for method, values in shown.items():
            levels = (values - low) / ((high - low) or 1)
            blocks = "".join(" " if math.isnan(v) else chr(0x2581 + int(7.999 * v)) for v in levels)
            there = values[~np.isnan(values)]
            lines.append(f"{name:22} {method:{widest}} {blocks} {there[0]:.4g} -> {there[-1]:.4g}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------
# the report

STYLE = """
body { font: 15px/1.5 Georgia, serif; color: #222; max-width: 1100px; margin: 3em auto; padding: 0 1em }
h1 { font-size: 1.7em } h2 { font-size: 1.2em; margin: 2.2em 0 .3em } p { margin: .3em 0 }
table { border-collapse: collapse; border-top: 2px solid; border-bottom: 2px solid; margin: .6em 0;
        font: 13px/1.4 Helvetica, Arial, sans-serif; display: block; overflow-x: auto; width: fit-content }
th, td { padding: .25em .9em .25em .2em; text-align: left; white-space: nowrap }
th { border-bottom: 1px solid } small, .note, dd { color: #777 }
.strip { display: grid; grid-template-columns: max-content auto; gap: 0 1em; align-items: center }
.strip img { max-width: 100%; display: block }
dt { float: left; clear: left; width: 11em; font-weight: bold }
dd { margin-left: 12em; overflow-wrap: anywhere }
"""


def write_report(cfg: Config, report: dict, clips: list[Clip]):
    out, found, curves = Path(cfg.out), tables(report), report["curves"]
    rows = [f"{method},{name},{t:.3f},{value:.6g},{error:.6g}" for method, lines in curves.items()
            for name, table in lines.items() for t, value, error in table.T]
    common.write_text(out / "curves.csv", "\n".join(["method,metric,t_seconds,mean,sem", *rows, ""]))
    with common.replacing(out / "curves.npz") as temporary, open(temporary, "wb") as f:
        np.savez_compressed(f, **{f"{v['method']}/{v['name']}/{name}": curve for v in report["videos"]
                                  for name, curve in v["curves"].items()})
    plain = without_nan({k: v for k, v in report.items() if k != "curves"})
    for video in plain["videos"]:
        del video["curves"]
    common.write_text(out / "summary.json", json.dumps(plain, indent=1, ensure_ascii=False) + "\n")
    common.write_text(out / "table.md", as_markdown(found))
    common.write_text(out / "curves.svg", draw_curves(curves))
    common.write_text(out / "report.html", as_html(report, found, film_strips(report, clips, out)))
    print(as_markdown(found), sparklines(curves), "", sep="\n")
    print(f"{out / 'report.html'} holds all of it, with curves and film strips")


def without_nan(value):
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def as_html(report: dict, found: list[Table], strips) -> str:
    """One page that needs no other file."""
    text = html.escape

    def cell(content, tag="td"):
        content = re.sub(r"(\(.*?\)|\[.*?\])", r"<small>\1</small>", text(content))
        return f"<{tag}>" + re.sub(r"\*\*(.*)\*\*", r"<b>\1</b>", content) + f"</{tag}>"

    parts = []
    for table in found:
        lines = [[cell(head, "th") for head in table.heads], *([cell(c) for c in row] for row in table.rows)]
        parts.append(f'<h2>{text(table.title)}</h2><p class="note">{text(table.note)}</p><table><tr>'
                     + "</tr><tr>".join(map("".join, lines)) + "</tr></table>")
    parts += ['<h2>Over time</h2><p class="note">Mean over videos; the band is its standard error.</p>',
              draw_curves(report["curves"]), "<h2>Film strips</h2>"]
    for prompt, seconds, pictures in strips:
        rows = "".join(f'<span>{text(method)}</span><img alt="frames of {text(method)}" src="data:image/png;'
                       f'base64,{base64.b64encode(png).decode()}">' for method, png in pictures)
        parts.append(f'<p>{text(prompt)} <span class="note">(0 to {seconds:.1f} s)</span></p>'
                     f'<div class="strip">{rows}</div>')
    for title in ("skipped", "missing", "metrics", "definitions", "settings"):
        rows = "".join(f"<dt>{text(k)}</dt><dd>{text(str(v))}</dd>" for k, v in report[title].items())
        parts.append(f"<h2>{title.capitalize()}</h2><dl>{rows}</dl>" * bool(rows))
    counts = Counter(video["method"] for video in report["videos"])
    counts = ", ".join(f"{method} ({count} videos)" for method, count in counts.items())
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Drift</title>'
            f"<style>{STYLE}</style></head><body><h1>Drift</h1><p>{text(counts)}</p>"
            + "\n".join(parts) + "</body></html>\n")


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


def probe_model(cfg: Config, path: str, ranks) -> dict:
    """How much worse the model is behind its own chunks, and how soon it gets over a spoilt context."""
    store = data.Clips(cfg.data)
    chosen = [i for i, sort in enumerate(store.kinds) if sort == "seed"][:cfg.clips]
    if not chosen or store.meta()["latents"][0] < CONTEXT + CHUNK:
        raise UserError(f"{cfg.data}: the probes need seed clips of at least {CONTEXT + CHUNK} latent frames")
    coder = vae.load(cfg.wan or store.meta()["wan"], ranks.device)
    net = model.load(path, ranks.device)
    null = data.read_text_embedding(Path(cfg.data, "empty.safetensors")).float().to(ranks.device)
    results = []
    with common.progress(len(chosen[ranks.rank::ranks.world]), "probes", ranks) as bar:
        for i in chosen[ranks.rank::ranks.world]:
            clip = store.load(i)
            x, text = (clip[k].float().to(ranks.device)[None] for k in ("latents", "text"))
            own = (net, x, text, null, clip["id"], cfg)
            results.append((i, loss_gap(*own), *recovery(coder, *own)))
            bar.update()
    _, gaps, real, spoilt = zip(*sorted(gathered(results, ranks)), strict=True)
    gaps, spoilt = np.array(gaps), np.array(spoilt)  # [clips, levels], [clips, kinds, chunks, statistics]
    low, high = np.quantile(np.concatenate(real), (0.05, 0.95), axis=0)
    back = ((spoilt >= low) & (spoilt <= high)).all(-1)  # [clips, kinds, chunks]
    took = np.where(back.any(-1), back.argmax(-1) + 1, AHEAD + 1)
    return {"clips": len(gaps), "levels": LEVELS, "loss_gap": gaps.mean(0).tolist(),
            "loss_gap_sem": [sem(column) for column in gaps.T],
            "range": dict(zip(STATISTICS, np.stack([low, high], 1).tolist(), strict=True)),
            "recovery": {name: {"chunks": float(took[:, k].mean()), "sem": sem(took[:, k]),
                                "within": back[:, k].mean(0).tolist()} for k, name in enumerate(SPOILT)}}


def sampling(cfg: Config, x) -> dict:
    return {"shape": tuple(x.shape[2:]), "chunk": CHUNK, "steps": cfg.steps, "shift": cfg.shift,
            "guidance": cfg.guidance}


@torch.no_grad()
def loss_gap(net, x, text, null, id: str, cfg: Config) -> list[float]:
    """At each level, the loss of x's chunk 4, behind own chunks 1-3 minus behind the real ones."""
    own = diffusion.generate(net, [text[0]], null, ids=[id], context=x[:, :CHUNK], frames=CONTEXT,
                             **sampling(cfg, x))
    target = x[:, CONTEXT:CONTEXT + CHUNK]
    noise = torch.randn(target.shape, generator=common.rng("gap", id)).to(x.device)
    gaps = []
    for level in LEVELS:
        t = torch.full((2, CONTEXT + CHUNK), float(level), device=x.device)
        t[:, :CONTEXT] = 0
        noisy = diffusion.add_noise(target, noise, t[:1, CONTEXT:])
        inputs = torch.cat([torch.cat([context, noisy], 1) for context in (own, x[:, :CONTEXT])])
        v = net(inputs, t, text.expand(2, -1, -1), chunk=CHUNK)[:, CONTEXT:]
        own_loss, real_loss = (v - diffusion.velocity(target, noise)).square().mean((1, 2, 3, 4)).tolist()
        gaps.append(own_loss - real_loss)
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


def probe_tables(probes: dict) -> list[Table]:
    if not probes:
        return []
    gaps, back = [], []
    for path, probe in probes.items():
        pairs = zip(probe["loss_gap"], probe["loss_gap_sem"], strict=True)
        gaps.append([path, *(with_error(*both, ".4f", ".4f") for both in pairs)])
        back.append([path, *(with_error(row["chunks"], row["sem"], ".1f", ".1f")
                             for row in probe["recovery"].values())])
    return [Table("Loss gap", "Loss behind own context minus behind real context, by noise level t; 0 is no "
                  "exposure bias.", ["Model", *(f"t = {t}" for t in LEVELS)], gaps),
            Table("Recovery", f"Chunks until a spoilt context is overcome; {AHEAD + 1}: not within "
                  f"{AHEAD}. Untouched: the same for a real context.", ["Model", *SPOILT], back)]


if __name__ == "__main__":
    common.run(main, Config, __doc__)
