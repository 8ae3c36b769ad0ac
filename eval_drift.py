"""Stage 5: videos/ -> report/: how far long videos drift, in the paper's tables, curves, film strips.

    python eval_drift.py videos/                                    one method, into report/
    python eval_drift.py DF=df/videos R3=r3/videos --out report     methods to compare, by any models
    python eval_drift.py videos/ --weights vbench/                  with VBench's networks: Table 1
    python eval_drift.py videos/ --toy                              toy videos, against the exact truth
    python eval_drift.py videos/ --model model_1 --data agg_0       also probe the model for exposure bias
    torchrun --nproc-per-node 8 eval_drift.py ...                   videos spread over 8 GPUs

Without weight files it reports colour, detail and motion, which need none. Every video's scores are kept in
report/scores: a killed run continues where it stopped, and weights added later compute only what is new.
--toy adds two methods of its own, which show what a measure is worth: a still picture, and the truth.
Exit status 3: a video was skipped, for the reason that is printed (0 with --allow-skips).
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

from flags import Count, Device, Positive, Whole, in_range, parse, positional


@dataclass
class Config:
    # folders of videos, one for each method to compare; NAME=folder sets the method's name in the report
    videos: tuple[str, ...] = positional()
    out: str = "report"  # folder for the report and the scores of each video
    weights: str | None = None  # folder of VBench's weight files, searched before VBench's own cache folders
    # result files written by VBench itself (*_eval_results.json); their scores replace those computed here
    vbench: tuple[str, ...] = ()
    real: str | None = None  # folder of real videos; adds each method's Frechet distance to them
    # the videos show toy.py's world: judge them by the exact truth, beside a still picture and the truth
    toy: bool = False
    extra: bool = False  # add local contrast and flicker
    # score every n-th frame by the metrics that need no weights; VBench's networks see every frame
    stride: Count = 4
    batch: Count = 32  # frames that a network computes at once; changes speed and memory, not the scores
    allow_skips: bool = False  # exit with status 0 even if videos were skipped
    model: tuple[str, ...] = ()  # folders of models to probe for exposure bias; needs --data
    data: str | None = None  # folder of clips (agg_k) whose held-out clips the probes use
    # seed clips in --data that were held out of training, to probe with (default: as recorded with the model)
    held_out: Whole | None = None
    clips: Count = 16  # number of held-out clips to probe each model with, at most
    wan: str | None = None  # Wan directory of the probes' VAE (default: the one that --data was encoded with)
    steps: Count = 20  # solver steps for each chunk in the probes
    guidance: float = 6.0  # guidance scale in the recovery probe; the loss probe works without guidance
    shift: Positive = 8.0  # shift of the solver's noise levels in the probes
    device: Device | None = None  # cuda or cpu (default: cuda if available)

    __post_init__ = in_range


if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    cfg = parse(Config, __doc__)

import numpy as np
import torch

import common
import data
import locate
import metrics
import probe
import readings
import records
import report
import toy
from common import UserError, print0
from files import DiskError
from metrics import mean, sem

VERSION = 3  # of the files in scores/
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
    "frechet": "Frechet distance to real videos, by fifths of the time, all videos of a method together, on "
               "the features by a fixed random convolutional network of windows of 4 frames over 0.75 s",
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
    "frozen": "a control: the last given frame of each video, repeated",
    "truth": "a control: the exact continuation, encoded and decoded by the toy's VAE; a measure marked † "
             "rates frozen better than this, and so rewards stillness",
    "median": "of the videos' survival; > where more than half of them survive to their end",
    "recovery": "a real context of 4 chunks is spoilt in pixels, then continued: chunks until the latents' "
                "mean and std, saturation and detail are all within 5..95 % of the data's",
}


def main(cfg: Config):
    ranks = common.start_ranks(cfg.device)
    if bool(cfg.model) != bool(cfg.data):
        raise UserError("--model and --data go together")
    folders = name_methods(cfg.videos)
    if cfg.toy and folders.keys() & set(report.CONTROLS):
        raise UserError("with --toy, frozen and truth are the controls' names; give NAME=folder")
    out = Path(cfg.out)
    common.own(cfg.out, "a report", ranks)
    (out / "scores").mkdir(exist_ok=True)
    clips, skipped = find_videos(folders, cfg.toy, ranks)
    require(clips, skipped)
    print0(f"{len(clips)} videos in {', '.join(folders)}; {len(skipped)} skipped")
    if cfg.toy:
        clips = with_controls(out, clips, ranks)
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
    nets = {path: locate.local(path, "transformer") for path in cfg.model}
    probes = {path: probe.probe_once(net, settings, out / "scores", ranks) for path, net in nets.items()}
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
    origin: readings.Origin | None = None  # of a toy video whose world is known
    truth: "Clip | None" = None  # the control that shows how that world goes on


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
              for path, text, _ in sorted(data.list_folder(folder), key=lambda row: str(row[0]))]
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
                    tags.get("seed"), common.fingerprint(path), readings.origin_of(tags) if is_toy else None)

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
# the controls of a toy's report: what a perfect model would have made, and a still picture

def with_controls(out: Path, clips: list[Clip], ranks) -> list[Clip]:
    """The clips, each with its truth, then both controls of all whose world is known. Made once; ranks share
    the work."""
    wanted = {}  # {a control's name: the first clip that needs it}
    needs = set()
    for clip in clips:
        need = clip.origin, clip.frames, clip.begin, clip.prompt, clip.seed
        if clip.origin and need not in needs:
            needs.add(need)
            name = clip.name if clip.name not in wanted else f"{clip.method} {clip.name}".replace("/", " ")
            wanted[name] = clip
    folders = {method: out / "controls" / method for method in report.CONTROLS}
    for name, clip in list(wanted.items())[ranks.rank::ranks.world]:
        write_controls(folders, name, clip)
    common.gathered([], ranks)  # all are written
    unknown = sum(not clip.origin for clip in clips)
    if unknown:
        print0(f"of {unknown} videos the tags do not say which world they show: judged without the truth")
    if not wanted:
        return clips
    found, _ = find_videos(folders, True, ranks)
    controls = [clip for clip in found if clip.name in wanted]
    truths = {(clip.origin, clip.frames): clip for clip in controls if clip.method == "truth"}
    return [clip._replace(truth=truths.get((clip.origin, clip.frames))) for clip in clips + controls]


def write_controls(folders: dict[str, Path], name: str, clip: Clip):
    """The controls for one video, unless they are there. They begin with the frames that it was given."""
    seed, number, first, given = clip.origin
    tags = {"prompt": clip.prompt, "seed": clip.seed, "frames": clip.frames, "of": clip.origin}
    tags |= {"extend": clip.begin, "context": (given + 3) // 4} if clip.begin else {"world": [seed, number]}
    tags = json.loads(json.dumps(tags))  # as they are read back
    if all((folder / name).exists() and data.read_tags(folder / name) == tags for folder in folders.values()):
        return
    if clip.begin:
        begin = data.read_clip(data.probe(clip.begin), given, toy.FPS, start=-given)
    else:
        begin = data.to_uint8(toy.render(toy.draw_world(seed, number), given, first))
    rest = {"frozen": begin[-1:].expand(max(0, clip.frames - given), -1, -1, -1),
            "truth": readings.true_frames(clip.origin, clip.frames)[given:]}
    for method, folder in folders.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        video = torch.cat([begin, rest[method]])[:clip.frames]
        data.write_video(folder / name, [video], toy.FPS, tags)


# ----------------------------------------------------------------------------------------------------
# scoring: each video is decoded once, in pieces that go to all scorers

class Job(NamedTuple):
    clip: Clip
    file: Path
    scorers: list
    features: list[str]  # stored too: toy (what readings.fit reads, and the PSNR to the truth), frechet
    fps: Fraction | None = None  # to resample the video to
    size: tuple[int, int] | None = None


def score_file(out: Path, clip: Clip, stride: int, *shape) -> Path:
    """Named after the file's bytes and the settings: a video that moves or is renamed is not scored again."""
    truth = clip.truth.key if clip.truth else None
    settings = f"{common.seed_of(VERSION, stride, str(shape), truth) % 16**8:08x}"
    return out / "scores" / f"{clip.key}-{settings}.safetensors"


def score_all(jobs: list[Job], stride: int, ranks) -> dict[str, str]:
    """Makes every job's file. Returns {path: what is wrong} of videos that turned out to be damaged."""
    mine = list({job.file: job for job in jobs}.values())[ranks.rank::ranks.world]
    errors = []
    with common.progress(sum(job.clip.frames for job in mine), "frames", ranks) as bar:
        for job in mine:
            try:
                score(job, stride, ranks.device, bar)
            except DiskError:  # is not the video's
                raise
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
    if "frechet" in features:
        pixels = math.prod(job.size or (job.clip.width, job.clip.height))
        scorers = [*scorers, metrics.frechet_scorer(device, stride, pixels)]
    truth = data.read_frames(data.probe(job.clip.truth.path)) if job.clip.truth else None
    for scorer in scorers:
        scorer.start(float(job.fps or job.clip.fps))
    for piece in pieces(job):
        for scorer in scorers:
            scorer.add(piece)
        sampled = slice(-seen % stride, None, stride)
        true = list(islice(truth, len(piece))) if truth else None
        if "toy" in features and len(piece[sampled]):
            for name, value in readings.fit(piece[sampled]).items():
                parts[f"toy.{name}"].append(value)
            if truth:
                parts["toy.psnr"].append(readings.psnr(piece[sampled], torch.stack(true)[sampled]))
        seen += len(piece)
        bar.update(len(piece))
    for name, curve in ((name, curve) for scorer in scorers for name, curve in scorer.finish().items()):
        if name == "frechet":
            tensors[name] = curve
            continue
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
        judged, seconds = judge(cfg, clip, read_readings(tensors))
        totals |= {"survival": seconds} if clip.truth else {}
        for name in readings.READINGS:
            if name in judged and not judged[name].isnan().all():  # the prompt may name no shape
                value = judged[name].double().numpy()
                curves[name] = np.stack([cfg.stride * np.arange(len(value)), value])
    return curves, totals, tensors.get("frechet")


def read_readings(tensors: dict) -> dict[str, torch.Tensor]:
    return {name[4:]: tensor for name, tensor in tensors.items() if name.startswith("toy.")}


def judge(cfg: Config, clip: Clip, reading: dict) -> tuple[dict, float]:
    """(READINGS of each frame, seconds that the video survives), by the truth if that is known."""
    if not clip.truth:
        return readings.judge(reading, clip.prompt, cfg.stride), math.nan
    true, _ = read_scores(score_file(Path(cfg.out), clip.truth._replace(truth=clip.truth), cfg.stride))
    truth = readings.truth_of(clip.origin, read_readings(true))
    judged = readings.judge(reading, clip.prompt, cfg.stride, truth)
    seconds = readings.survival(judged["right"], clip.frames / toy.FPS, cfg.stride)
    time = torch.arange(len(judged["right"])) * cfg.stride / toy.FPS
    return judged | {"psnr": reading["psnr"], "survival": time < seconds}, seconds


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
    explained = metrics.FREE | metrics.DIMENSIONS | metrics.OPTIONAL | readings.READINGS
    shown = set(names) | {name for video in videos for name in video["curves"]}
    return {"version": VERSION, "definitions": DEFINITIONS, "settings": {
                k: v for k, v in asdict(cfg).items() if k not in ("out", "device", "allow_skips")},
            "metrics": {k: v for k, v in explained.items() if k in shown},
            "mean": {method: over_videos(group, mean) for method, group in rows.items()},
            "sem": {method: over_videos(group, sem) for method, group in rows.items()},
            "median": {method: median_survival(group) for method, group in rows.items()},
            "paired": [compare(rows[a], rows[b]) for a, b in itertools.combinations(rows, 2)],
            "frechet": distances(cfg, real, shape, fifths),
            "curves": {method: binned(group) for method, group in rows.items()},
            "videos": videos}


def distances(cfg: Config, real: list[Clip], shape, fifths: dict) -> dict[str, list[float]]:
    """{method: its Frechet distance to the real videos in each fifth}; empty if there are too few windows."""
    if not cfg.real:
        return {}
    stored = [read_scores(score_file(Path(cfg.out), clip, cfg.stride, *shape))[0] for clip in real]
    try:
        reference = torch.cat([tensors["frechet"] for tensors in stored])
        return {method: [metrics.frechet_distance(reference, torch.cat(fifth)) for fifth in parts]
                for method, parts in fifths.items()}
    except UserError as error:
        print0(f"no distance to real videos: {error}")
        return {}


def median_survival(videos: list[dict]) -> dict | None:
    """Of a method's videos; at_least: more than half of them survive to their end."""
    known = [video for video in videos if "survival" in video["metrics"]]
    if not known:
        return None
    seconds = np.array([video["metrics"]["survival"]["score"] for video in known])
    ends = np.array([video["frames"] / video["fps"] for video in known])
    return {"seconds": float(np.median(seconds)), "at_least": bool((seconds >= ends).mean() > 0.5),
            "end": float(ends.max()), "videos": len(known)}


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
    results = records.read(file)
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
    common.run(main, cfg)
