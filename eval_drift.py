"""Stage 5: videos/ -> report/: how far long videos drift, in the paper's tables, curves, film strips.

    python eval_drift.py videos/                                    one method, into report/
    python eval_drift.py DF=df/videos R3=r3/videos --out report     methods to compare, by any models
    python eval_drift.py videos/ --weights vbench/                  with VBench's networks: Table 1
    python eval_drift.py videos/ --toy                              toy videos: is the sprite still there?
    python eval_drift.py videos/ --model model_1 --data agg_0       also probe the model for exposure bias
    torchrun --nproc-per-node 8 eval_drift.py ...                   videos spread over 8 GPUs

Without weight files it reports colour, detail and motion, which need none. Every video's scores are kept in
report/scores: a killed run continues where it stopped, and weights added later compute only what is new.
Exit status 3: a video was skipped, for the reason that is printed (0 with --allow-skips).
"""

import functools
import itertools
import math
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import common
import data
import metrics
import probe
import report
import toy
from common import UserError, print0
from metrics import mean, sem


@dataclass
class Config:
    # folders of videos, one for each method to compare; NAME=folder sets the method's name in the report
    videos: tuple[str, ...] = common.positional()
    out: str = "report"  # folder for the report and the scores of each video
    weights: str | None = None  # folder of VBench's weight files, searched before VBench's own cache folders
    # result files written by VBench itself (*_eval_results.json); their scores replace those computed here
    vbench: tuple[str, ...] = ()
    real: str | None = None  # folder of real videos; adds each method's Frechet distance to them
    toy: bool = False  # the videos show toy.py's world; adds whether its sprite and background last
    extra: bool = False  # add local contrast and flicker
    # score every n-th frame by the metrics that need no weights; VBench's networks see every frame
    stride: int = 4
    batch: int = 32  # frames that a network computes at once; changes speed and memory, not the scores
    allow_skips: bool = False  # exit with status 0 even if videos were skipped
    model: tuple[str, ...] = ()  # folders of models to probe for exposure bias; needs --data
    data: str | None = None  # folder of clips (agg_k) whose held-out clips the probes use
    # seed clips in --data that were held out of training, to probe with (default: as recorded with the model)
    held_out: int | None = None
    clips: int = 16  # number of held-out clips to probe each model with, at most
    wan: str | None = None  # Wan directory of the probes' VAE (default: the one that --data was encoded with)
    steps: int = 20  # solver steps for each chunk in the probes
    guidance: float = 6.0  # guidance scale in the recovery probe; the loss probe works without guidance
    shift: float = 8.0  # shift of the solver's noise levels in the probes
    device: str | None = None  # cuda or cpu (default: cuda if available)


VERSION = 2  # of the files in scores/
FLOOR = 1e-3  # of means in a ratio: smaller ones, of rare pixels or still frames, would make it meaningless
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
    folders = name_methods(cfg.videos)
    out = Path(cfg.out)
    (out / "scores").mkdir(parents=True, exist_ok=True)
    if ranks.rank == 0:
        common.sweep(out)  # no rank writes before find_videos, which waits for all ranks
    clips, skipped = find_videos(folders, cfg.toy, ranks)
    require(clips, skipped)
    print0(f"{len(clips)} videos in {', '.join(folders)}; {len(skipped)} skipped")
    real, real_skipped = [], {}
    if cfg.real:
        real, real_skipped = find_videos({"real": Path(cfg.real)}, False, ranks, same_kind=False)
    names = wanted(cfg, clips)
    scorers, missing = metrics.open_scorers(names, ranks.device, cfg.weights, cfg.stride, cfg.batch)
    missing |= {name: "needs frames of at least 128x128" for name in metrics.DIMENSIONS if name not in names}
    for name, reason in missing.items():
        print0(f"no {name}: {reason}")
    shape = (clips[0].fps, (clips[0].width, clips[0].height))  # to which real videos are resampled
    features = ["toy"] * cfg.toy + ["frechet"] * bool(cfg.real)
    jobs = [Job(clip, score_file(out, clip, cfg.stride), scorers, features) for clip in clips]
    jobs += [Job(clip, score_file(out, clip, cfg.stride, *shape), [], ["frechet"], *shape) for clip in real]
    skipped |= real_skipped | score_all(jobs, cfg.stride, ranks)
    clips, real = ([c for c in group if str(c.path) not in skipped] for group in (clips, real))
    require(clips, skipped)
    settings = probe.Settings(cfg.data, cfg.wan, cfg.held_out, cfg.clips, cfg.steps, cfg.guidance, cfg.shift)
    probes = {path: probe.probe_once(path, settings, out / "scores", ranks) for path in cfg.model}
    if ranks.rank == 0:
        summary = summarise(cfg, clips, real, shape)
        report.write(out, summary | {"missing": missing, "skipped": skipped, "probes": probes}, clips)
    for path, reason in skipped.items():
        print0(f"skipped: {reason if path in reason else f'{path}: {reason}'}")
    return 3 if skipped and not cfg.allow_skips else None


# ----------------------------------------------------------------------------------------------------
# the videos to score

class Clip(NamedTuple):
    method: str
    name: str  # path within the method's folder
    path: Path
    fps: Fraction
    width: int
    height: int
    frames: int
    prompt: str
    begin: str | None  # the video or image that it continues
    seed: int | None
    key: str  # fingerprint of the file


def require(clips: list[Clip], skipped: dict[str, str]):
    if not clips:
        raise UserError("no video can be scored: " + "; ".join(
            reason if path in reason else f"{path} {reason}" for path, reason in skipped.items()))


def wanted(cfg: Config, clips: list[Clip]) -> list[str]:
    """The metrics to report; RAFT and AMT cannot take frames below 128x128."""
    small = ("motion_smoothness", "dynamic_degree") * (min(min(c.width, c.height) for c in clips) < 128)
    names = [*metrics.FREE, *metrics.DIMENSIONS, *(metrics.OPTIONAL if cfg.extra else ())]
    return [name for name in names if name not in small]


def name_methods(folders: tuple[str, ...]) -> dict[str, Path]:
    methods = {}
    for text in folders:
        name, _, folder = text.rpartition("=") if not Path(text).exists() else ("", "", text)
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"no such folder of videos: {folder}")
        name = name or folder.resolve().name
        if name in methods:
            raise UserError(f"two folders are called {name}; tell them apart: A={methods[name]} B={folder}")
        methods[name] = folder
    return methods


def find_videos(folders: dict[str, Path], is_toy: bool, ranks, same_kind=True):
    """([Clip] in order, {path: why it is skipped}), the same on all ranks. same_kind: a method's videos must
    agree in size and frame rate."""
    listed = [(method, path, text) for method, folder in folders.items()
              for path, text in sorted(data.list_folder(folder), key=lambda pair: str(pair[0]))]
    skipped = {str(folder): "holds no videos" for method, folder in folders.items()
               if not any(row[0] == method for row in listed)}

    def read_clip(method, path, text):
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

    results = []  # (index, a Clip or why it is skipped)
    for i, row in list(enumerate(listed))[ranks.rank::ranks.world]:
        try:
            results.append((i, read_clip(*row)))
        except UserError as error:
            results.append((i, str(error)))
    clips = []
    for i, clip in sorted(common.gathered(results, ranks), key=lambda pair: pair[0]):
        if isinstance(clip, str):
            skipped[str(listed[i][1])] = clip
        else:
            clips.append(clip)
    kinds = defaultdict(Counter)
    for clip in clips:
        kinds[clip.method][kind(clip)] += 1
    for clip in clips if same_kind else ():  # scores of other sizes or rates could not be averaged
        usual = kinds[clip.method].most_common(1)[0][0]
        if kind(clip) != usual:
            skipped[str(clip.path)] = f"{kind(clip)}, where most of {clip.method} are {usual}"
    return [clip for clip in clips if str(clip.path) not in skipped], skipped


def kind(clip: Clip) -> str:
    return f"{clip.width}x{clip.height} at {float(clip.fps):.5g} fps"


# ----------------------------------------------------------------------------------------------------
# scoring: each video is decoded once, in pieces that go to all scorers

class Job(NamedTuple):
    clip: Clip
    file: Path
    scorers: list
    features: list[str]  # stored too: toy (toy.fit's readings), frechet
    fps: Fraction | None = None  # to resample the video to
    size: tuple[int, int] | None = None


def score_file(out: Path, clip: Clip, stride: int, *shape) -> Path:
    """Named after the file's bytes and the settings: a video that moves or is renamed is not scored again."""
    settings = f"{common.seed_of(VERSION, stride, str(shape)) % 16**8:08x}"
    return out / "scores" / f"{clip.key}-{settings}.safetensors"


def score_all(jobs: list[Job], stride: int, ranks) -> dict[str, str]:
    """Makes every job's file. Returns {path: what is wrong} of videos that turned out to be damaged."""
    mine = list({job.file: job for job in jobs}.values())[ranks.rank::ranks.world]
    errors = []
    with common.progress(sum(job.clip.frames for job in mine), "frames", ranks) as bar:
        for job in mine:
            try:
                score(job, stride, ranks.device, bar)
            except UserError as error:
                errors.append((job.file, str(error)))
    errors = dict(common.gathered(errors, ranks))
    return {str(job.clip.path): errors[job.file] for job in jobs if job.file in errors}


def score(job: Job, stride: int, device, bar):
    tensors, totals = read_scores(job.file)
    scorers = [s for s in job.scorers if not set(s.names) <= tensors.keys()]
    features = [name for name in job.features if not any(key.partition(".")[0] == name for key in tensors)]
    if not scorers and not features:
        bar.update(job.clip.frames)
        return
    parts = defaultdict(list)
    seen = 0
    for scorer in scorers:
        scorer.start(float(job.fps or job.clip.fps))
    for piece in pieces(job):
        for scorer in scorers:
            scorer.add(piece)
        sampled = piece[-seen % stride::stride]
        if "toy" in features and len(sampled):
            for name, value in toy.fit(sampled).items():
                parts[f"toy.{name}"].append(value)
        if "frechet" in features and len(sampled):
            parts["frechet"].append(metrics.frechet_features(sampled.to(device)).cpu())
        seen += len(piece)
        bar.update(len(piece))
    for scorer in scorers:
        for name, curve in scorer.finish().items():
            tensors[name] = torch.from_numpy(np.stack([curve.frame, curve.value]).astype(np.float64))
            totals[name] = float(curve.total)
    tensors |= {name: torch.cat(rows) for name, rows in parts.items()}
    common.save_tensors(job.file, tensors, totals=totals)


def pieces(job: Job, size: int = 32):
    """uint8 [n,3,H,W] until the video ends, decoded ahead by a thread."""
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
# statistics: from curves to the numbers of the report

def prompt_of(video: dict) -> tuple:
    return video["prompt"], video["begin"]


def by_prompt(column: list[tuple]) -> np.ndarray:
    """[(prompt, value)] -> the mean of each prompt, but for prompts without values. Videos of one prompt
    resemble each other: only prompts are independent samples."""
    groups = defaultdict(list)
    for prompt, value in column:
        groups[prompt].append(value)
    means = np.array([mean(group) for group in groups.values()])
    return means[~np.isnan(means)]


def summaries(value: np.ndarray, total: float | None = None) -> dict[str, float]:
    """Of one video's curve, as DEFINITIONS has it; drift is that of the paper's Table 1."""
    n20, n15 = max(1, int(0.2 * len(value))), max(1, int(0.15 * len(value)))
    first, last = mean(value[:n20]), mean(value[-n20:])
    ratio = math.log(np.maximum(last, FLOOR) / np.maximum(first, FLOOR))
    return {"score": mean(value) if total is None else total, "first": first, "last": last,
            "drift": first - mean(value), "start_end": abs(mean(value[:n15]) - mean(value[-n15:])),
            "log_ratio": ratio, "abs_log_ratio": abs(ratio)}


def read_curves(cfg: Config, clip: Clip, names: list[str]):
    """({metric: (frame, value)}, {metric: total}, features for the Frechet distance or None) of a video."""
    tensors, totals = read_scores(score_file(Path(cfg.out), clip, cfg.stride))
    curves = {name: tensors[name].numpy() for name in names if name in totals}
    if cfg.toy:
        reading = {name[4:]: tensor for name, tensor in tensors.items() if name.startswith("toy.")}
        for name, value in toy.judge(reading, clip.prompt, cfg.stride).items():
            if not value.isnan().all():  # the prompt may name no shape
                curves[name] = np.stack([cfg.stride * np.arange(len(value)), value.double().numpy()])
    return curves, totals, tensors.get("frechet")


def summarise(cfg: Config, clips: list[Clip], real: list[Clip], shape) -> dict:
    """All that the report shows: videos, means over them, curves over time, paired differences, distances."""
    names = wanted(cfg, clips)
    videos = []
    fifths = defaultdict(lambda: [[] for _ in range(5)])  # {method: Frechet features by fifths of the time}
    for clip in clips:
        curves, totals, frechet = read_curves(cfg, clip, names)
        videos.append({"method": clip.method, "name": clip.name, "prompt": clip.prompt, "begin": clip.begin,
                       "seed": clip.seed, "frames": clip.frames, "fps": float(clip.fps),
                       "size": f"{clip.width}x{clip.height}", "curves": curves,
                       "metrics": {name: summaries(c[1], totals.get(name)) for name, c in curves.items()}})
        if cfg.real:
            for fifth, rows in zip(fifths[clip.method], frechet.tensor_split(5), strict=True):
                fifth.append(rows)
    for file in cfg.vbench:
        merge_vbench(file, clips, videos)
    for scores in (video["metrics"] for video in videos):
        for name, parts in metrics.QUALITIES.items():
            if all(p in scores for p in parts):
                points = [metrics.SCALE.get(p, 100) * scores[p]["score"] for p in parts]
                scores[name] = {"score": mean(points)}
    rows = {method: [v for v in videos if v["method"] == method] for method in dict.fromkeys(
        video["method"] for video in videos)}
    frechet = {}
    if cfg.real:
        stored = [read_scores(score_file(Path(cfg.out), clip, cfg.stride, *shape))[0] for clip in real]
        reference = torch.cat([tensors["frechet"] for tensors in stored])
        frechet = {method: [metrics.frechet_distance(reference, torch.cat(fifth))
                            for fifth in fifths[method]] for method in rows}
    explained = metrics.FREE | metrics.DIMENSIONS | metrics.OPTIONAL | toy.READINGS
    return {"version": VERSION, "definitions": DEFINITIONS, "settings": {
                k: v for k, v in asdict(cfg).items() if k not in ("out", "device", "allow_skips")},
            "metrics": {k: v for k, v in explained.items() if k in names or (cfg.toy and k in toy.READINGS)},
            "mean": {method: over_videos(group, mean) for method, group in rows.items()},
            "sem": {method: over_videos(group, sem) for method, group in rows.items()},
            "paired": [compare(rows[a], rows[b]) for a, b in itertools.combinations(rows, 2)],
            "frechet": frechet, "curves": {method: binned(group) for method, group in rows.items()},
            "videos": videos}


def over_videos(videos: list[dict], statistic) -> dict:
    """{metric: {definition: the statistic of its means by prompt}}"""
    columns = defaultdict(lambda: defaultdict(list))
    for video in videos:
        for name, row in video["metrics"].items():
            for what, value in row.items():
                columns[name][what].append((prompt_of(video), value))
    return {name: {what: statistic(by_prompt(v)) for what, v in column.items()}
            for name, column in columns.items()}


def merge_vbench(file: str, clips: list[Clip], videos: list[dict]):
    """Puts the scores in VBench's result file in place of those computed here, by folder and file name."""
    results = common.read_json(file)
    by_name = defaultdict(list)
    for i, clip in enumerate(clips):
        by_name[clip.path.resolve().parent.name, clip.path.name].append(i)
    for name, result in results.items():
        if name not in metrics.DIMENSIONS or not isinstance(result, list) or len(result) != 2:
            raise UserError(f"{file}: {name} is none of VBench's six custom-input dimensions")
        scores = {}  # {index of a clip: its score}
        for row in result[1]:
            path = Path(row["video_path"]).resolve()
            matches = by_name[path.parent.name, path.name]
            matches = [i for i in matches if clips[i].path.resolve() == path] or matches
            if len(matches) > 1:
                raise UserError(f"{file}: {path} may be {' or '.join(str(clips[i].path) for i in matches)}; "
                                "rename a folder")
            scores |= dict.fromkeys(matches, float(row["video_results"]))
        if not scores:
            raise UserError(f"{file}: {name} is about none of these videos; folder and file names must agree")
        replaced = {clips[i].method for i in scores}
        for i, clip in enumerate(clips):  # a method's column is all VBench's, or all computed here
            if clip.method in replaced and i not in scores:
                raise UserError(f"{file}: {name} lacks {clip.path}; score the whole folder with VBench")
            if i in scores:
                videos[i]["metrics"].setdefault(name, {})["score"] = scores[i]


def compare(rows_a: list[dict], rows_b: list[dict]) -> dict:
    """How method b differs from a on the videos that both made."""
    pairs = report.partners(rows_a, rows_b)
    gaps = defaultdict(lambda: defaultdict(list))
    for video, other in pairs:
        a, b = video["metrics"], other["metrics"]
        for name in a.keys() & b.keys():
            for what in a[name].keys() & b[name].keys():
                gaps[name][what].append((prompt_of(video), b[name][what] - a[name][what]))
    gaps = {name: {what: interval(by_prompt(column[what])) for what in DEFINITIONS if what in column}
            for name, column in sorted(gaps.items())}
    return {"a": rows_a[0]["method"], "b": rows_b[0]["method"], "pairs": len(pairs),
            "prompts": len({prompt_of(video) for video, _ in pairs}), "b_minus_a": gaps}


def interval(gap: np.ndarray) -> dict | None:
    """The mean of independent differences and its 95 % interval."""
    if len(gap) < 2:
        return None
    middle, half_width = mean(gap), t_quantile(len(gap) - 1) * sem(gap)
    return {"interval": [middle, middle - half_width, middle + half_width], "prompts": len(gap)}


@functools.cache
def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; if t = freedom**0.5 tan(u), u has density cos(u)**(freedom - 1)."""
    u = np.linspace(0, math.pi / 2, 100_001)
    share = np.cumsum(np.cos((u[1:] + u[:-1]) / 2)**(freedom - 1))
    return freedom**0.5 * math.tan(np.interp(0.95 * share[-1], share, u[1:]))


def binned(rows: list[dict]) -> dict[str, np.ndarray]:
    """{metric: [3, bins]}: seconds, mean over prompts, its standard error; at least 10 bins, of about 2 s."""
    seconds = max(row["frames"] / row["fps"] for row in rows)
    count = max(10, round(seconds / 2))
    edges = np.linspace(0, seconds, count + 1)[1:-1]
    bins = defaultdict(lambda: [[] for _ in range(count)])
    for row in rows:
        for name, (frame, value) in row["curves"].items():
            bin_of = np.digitize(frame / row["fps"], edges)
            for i, column in enumerate(bins[name]):
                column.append((prompt_of(row), mean(value[bin_of == i])))
    middle = (np.arange(count) + 0.5) * seconds / count
    return {name: np.array([middle, *([f(by_prompt(column)) for column in columns] for f in (mean, sem))])
            for name, columns in bins.items()}


if __name__ == "__main__":
    common.run(main, Config, __doc__)
