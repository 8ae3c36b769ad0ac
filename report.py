"""The report of eval_drift.py: findings, tables, curves, film strips, and one page that plays the videos."""

import base64
import csv
import html
import io
import itertools
import math
import re
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import data
import files
import metrics
import readings

CONTROLS = ("frozen", "truth")  # the methods that eval_drift.py adds for a toy; they are never called best


def write(out: Path, report: dict, clips: list):
    """report: all that eval_drift.py knows; clips: its videos, for the film strips."""
    tables = make_tables(report)
    report |= {"findings": findings(report)}
    curves = report["curves"]
    rows = [(method, name, f"{t:.3f}", f"{value:.6g}", f"{error:.6g}") for method, lines in curves.items()
            for name, table in lines.items() for t, value, error in table.T]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("method", "metric", "t_seconds", "mean", "sem"), *rows])
    files.write_text(out / "curves.csv", text.getvalue())
    with files.replacing(out / "curves.npz") as temporary, open(temporary, "wb") as f:
        np.savez_compressed(f, **{files.plain(f"{v['method']}/{v['name']}/{name}"): curve
                                  for v in report["videos"] for name, curve in v["curves"].items()})
    plain = without_nan({k: v for k, v in report.items() if k != "curves"})
    for video in plain["videos"]:
        del video["curves"]
    files.write_text(out / "summary.json", files.as_json(plain, indent=1) + "\n")
    lines = "".join(f"{line}\n\n" for line in report["findings"])
    files.write_text(out / "table.md", lines + as_markdown(tables))
    files.write_text(out / "curves.svg", draw_curves(curves))
    files.write_text(out / "report.html", as_html(report, tables, film_strips(report, clips, out)))
    print(as_markdown(tables), sparklines(curves), "", sep="\n")
    print(f"{out / 'report.html'} holds all of it, with curves, film strips and videos to play")
    print(*report["findings"], sep="\n")


def partners(rows_a: list[dict], rows_b: list[dict]) -> list[tuple[dict, dict]]:
    """The videos that two methods made of one prompt and seed: files of one name, or tagged so."""
    by_name = {video["name"]: video for video in rows_b}
    by_tags = defaultdict(list)
    for video in rows_b:
        by_tags[video["prompt"], video["seed"]].append(video)
    pairs = []
    for a in rows_a:
        tagged = by_tags[a["prompt"], a["seed"]] if a["seed"] is not None else []
        b = by_name.get(a["name"]) or (tagged[0] if len(tagged) == 1 else None)
        pairs += [(a, b)] if b else []
    return pairs


def without_nan(value):
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


# ----------------------------------------------------------------------------------------------------
# findings: what a toy's numbers say, in words. The first given method is the reference, the last the claim

def findings(report: dict) -> list[str]:
    given = [method for method in report["mean"] if method not in CONTROLS]
    known = [method for method in dict.fromkeys((given[-1], given[0])) if report["median"][method]]
    if not known or not all(report["median"].get(control) for control in CONTROLS):
        return []
    shown = (*known, *CONTROLS)
    medians = {method: survived(report["median"][method]) for method in shown}
    lines = [f"Sprites are right for {listed(medians)} (medians)."]
    lines += [compared(report, known[0], other) for other in (*known[1:], "frozen")]
    if report["frechet"]:
        last = {method: f"{report['frechet'][method][4]:.1f}" for method in shown}
        lines.append(f"In the last fifth the Frechet distance to real windows of frames is {listed(last)}.")
    told = {method: report["mean"][method].get("direction", {}).get("last", math.nan) for method in shown}
    if not math.isnan(told["truth"]):
        told = {method: f"{100 * share:.0f} %" for method, share in told.items()}
        lines.append(f"In the last fifth sprites move as told in {listed(told)} of moments.")
    speeds = {method: report["mean"][method]["speed"]["last"] for method in shown}
    if speeds["truth"] > 0:
        shares = {m: f"{100 * v / speeds['truth']:.0f} %" for m, v in speeds.items() if m != "truth"}
        lines.append(f"In the last fifth pixels move at {listed(shares)} of the truth's speed.")
    return lines


def listed(values: dict[str, str]) -> str:
    return ", ".join(f"{value} ({NAMES.get(method, method)})" for method, value in values.items())


NAMES = {"frozen": "a still picture", "truth": "the truth"}


def survived(median: dict) -> str:
    return f"> {median['end']:.1f} s" if median["at_least"] else f"{median['seconds']:.1f} s"


def compared(report, claim: str, other: str) -> str:
    """Whether one method's sprites are right for longer than another's: no more than the interval shows."""
    pairs = {(c["a"], c["b"]): c["b_minus_a"].get("survival", {}).get("score") for c in report["paired"]}
    gap, sign = pairs.get((other, claim)), 1
    if (other, claim) not in pairs:
        gap, sign = pairs.get((claim, other)), -1
    name = NAMES.get(other, other)
    if not gap or gap["prompts"] < FEWEST:
        return f"Too few prompts are common to {claim} and {name} to compare them."
    low, middle, high = sorted(sign * v for v in gap["interval"])
    verdict = "longer than" if low > 0 else "shorter than" if high < 0 else "neither longer nor shorter than"
    doubt = "" if low > 0 or high < 0 else ", as far as this shows"
    return (f"{claim}'s are right for {verdict} {name}'s{doubt}: {middle:+.1f} s on average over "
            f"{gap['prompts']} prompts (95 % interval {low:+.1f} to {high:+.1f}).")


# ----------------------------------------------------------------------------------------------------
# tables

class Table(NamedTuple):
    title: str
    note: str
    heads: list[str]
    rows: list[list[str]]  # the best of a column in **
    lack: str = "no video has a value for it"  # stands in place of a table of nothing but dashes

    def is_blank(self) -> bool:
        return all(cell == "-" for row in self.rows for cell in row[1:])


class Column(NamedTuple):
    cells: list[str]
    is_still: bool = False  # a still picture is better here than the truth


# columns of the paper's Table 1: VBench's dimensions, and the drift of two of them
QUALITY_HEADS = ("Subject", "Bg. Cons.", "Smooth.", "Dynamic", "Aesthetic", "Imaging")
DRIFT_HEADS = QUALITY_HEADS[4:]
DRIFT = {f"d {head}": f"{head.lower()}_quality" for head in DRIFT_HEADS}
STILL = "†: a still picture is better than the truth here, so that the measure rewards stillness."


def make_tables(report: dict) -> list[Table]:
    free = [name for name in metrics.FREE | metrics.OPTIONAL if name in report["metrics"]]
    quality = zip(QUALITY_HEADS, metrics.DIMENSIONS, strict=True)
    tables = [as_table(
        report, "Quality and drift (the paper's Table 1)", "Global metrics: higher is better. Drifting "
        "metrics d, first 20 % minus average: lower is better. x100; (standard error).",
        {head: points(report, name) for head, name in quality}
        | {head: points(report, name, "drift") for head, name in DRIFT.items()},
        lack="needs VBench's weight files; see missing in summary.json, or --weights DIR")]
    if any(name in row for name in metrics.QUALITIES for row in report["mean"].values()):
        tables.append(as_table(report, "Motion and frame quality", "The paper's Table 2; higher is better.", {
            "Motion quality": points(report, "motion_quality"),
            "Frame quality": points(report, "frame_quality")}))
    tables += toy_tables(report)
    tables += [as_table(report, "Change without weights", "Last 20 % over first 20 %: x1.00 is no drift.",
                        {name: factor(report, name, "log_ratio") for name in free}),
               as_table(report, "Distance from no change", "The same, with up and down not cancelling "
                        "between videos.", {name: factor(report, name, "abs_log_ratio") for name in free})]
    if report["frechet"]:
        tables.append(frechet_table(report))
    if len(report["mean"]) > 1:
        tables.append(paired_table(report, free))
    return tables + probe_tables(report["probes"])


def as_table(report, title: str, note: str, columns: dict[str, Column], **lack) -> Table:
    """A row for each method. Where a column rewards stillness, its head says so."""
    heads = [f"{head} †" if column.is_still else head for head, column in columns.items()]
    if any(column.is_still for column in columns.values()):
        note = f"{note} {STILL}"
    rows = zip(report["mean"], *(column.cells for column in columns.values()), strict=True)
    return Table(title, note, ["Method", *heads], list(map(list, rows)), **lack)


def toy_tables(report) -> list[Table]:
    shown = [name for name in readings.READINGS if name in report["metrics"]]
    note = "First 20 % -> last 20 % of a video: "
    tables = []
    if "survival" in shown:
        medians = [survived(row).removesuffix(" s") if row else "-" for row in report["median"].values()]
        tables.append(as_table(
            report, "The toy world: against the truth", "Seconds until the sprite is wrong for half a second "
            f"on end, mean and median. {note}per cent of frames with a right sprite, pixels from its true "
            "place, dB.", {"survival": seconds(report, "survival"), "median": Column(medians)}
            | {name: change(report, name) for name in TRUE[1:]}))
    if "sprite" in shown:
        tables.append(as_table(
            report, "The toy world: what is seen", f"{note}per cent of moments with a sprite, with the right "
            "shape and direction; grey levels off the truth (or the first chunk, if the world is unknown).",
            {name: change(report, name) for name in shown if name not in TRUE}))
    return tables


def frechet_table(report) -> Table:
    columns = {}
    for i in range(5):
        keys = {method: row[i] for method, row in report["frechet"].items()}
        cells = [f"{v:.1f}" for v in keys.values()]
        columns[f"{20 * i}-{20 * i + 20} %"] = Column(cells, rewards_stillness(keys))
    return as_table(report, "Frechet distance to real windows of 4 frames",
                    "By fifths of the videos; lower is better.", columns)


TRUE = ("survival", "right", "place", "psnr")  # readings that need the truth
LOWER = ("place", "colour", "background")  # readings of which less is better


def key_of(name: str, what: str):
    """A function of a metric's value, by which the least is the best."""
    if what in ("log_ratio", "abs_log_ratio"):
        return abs
    falls = what == "drift" or name in LOWER
    return (lambda v: v) if falls else (lambda v: -v)


def keys_of(report, name: str, what: str) -> dict[str, float]:
    """{method: the key of its mean}, nan where it has none"""
    key = key_of(name, what)
    return {method: key(row.get(name, {}).get(what, math.nan)) for method, row in report["mean"].items()}


def rewards_stillness(keys: dict[str, float]) -> bool:
    return all(control in keys for control in CONTROLS) and keys["frozen"] < keys["truth"]


def column(report, name, what, text) -> Column:
    """A cell for each method: text(means, standard errors) of the metric, bold for the best given method."""
    keys = keys_of(report, name, what)
    is_still = rewards_stillness(keys)
    given = [key for method, key in keys.items() if method not in CONTROLS]
    best = min((key for key in given if not math.isnan(key)), default=None)
    cells = []
    for method, key in keys.items():
        row, error = (report[kind][method].get(name, {}) for kind in ("mean", "sem"))
        cell = "-" if math.isnan(key) else text(row, error)
        is_best = key == best and len(given) > 1 and not is_still and method not in CONTROLS
        cells.append(f"**{cell}**" if is_best else cell)
    return Column(cells, is_still)


def points(report, name, what="score"):
    """x100, as the paper reports them; of scores the highest is the best, of drifts the lowest."""
    scale = metrics.SCALE.get(name, 100)
    return column(report, name, what, lambda row, error: with_error(scale * row[what], scale * error[what]))


def seconds(report, name):
    return column(report, name, "score",
                  lambda row, error: with_error(row["score"], error["score"], ".1f", ".1f"))


def factor(report, name, what):
    return column(report, name, what, lambda row, error: "x" + with_error(
        math.exp(row[what]), 100 * math.expm1(error[what]), ".2f", ".0f", "%"))


def change(report, name):
    """First -> last 20 %, of a share in per cent, or of something else as it is."""
    is_fine = name in ("place", "psnr")
    scale = 1 if is_fine or name in LOWER else 100
    digits = ".1f" if is_fine else ".0f"
    return column(report, name, "last", lambda row, error: (
        ("-" if math.isnan(row["first"]) else f"{scale * row['first']:{digits}}") + " -> "
        + with_error(scale * row["last"], scale * error["last"], digits, digits)))


def with_error(value: float, error: float, digits=".2f", error_digits=".2f", unit="") -> str:
    digits = digits if abs(value) < 100 else ".0f"
    return f"{value:{digits}}" + ("" if math.isnan(error) else f" ({error:{error_digits}}{unit})")


def paired_table(report, free: list[str]) -> Table:
    """How each method differs from the first."""
    first = next(iter(report["mean"]))
    comparisons = [c for c in report["paired"] if c["a"] == first]
    toy_shown = [name for name in readings.READINGS if name in report["metrics"]]
    shown = [(head, name, "drift") for head, name in DRIFT.items()]
    shown += [(f"log ratio of {name}", name, "log_ratio") for name in free]
    if "survival" in toy_shown:
        shown.append(("seconds survived", "survival", "score"))
    shown += [(f"{name}, last 20 %", name, "last") for name in toy_shown if name != "survival"]
    rows = []
    stills = []
    for head, name, what in shown:
        scale = metrics.SCALE.get(name, 100) if what == "drift" else 1
        gaps = [c["b_minus_a"].get(name, {}).get(what) for c in comparisons]
        is_still = rewards_stillness(keys_of(report, name, what))
        cells = [with_interval(scale, is_bold=not is_still, **gap) if gap else "-" for gap in gaps]
        if set(cells) != {"-"}:
            rows.append([f"{head} †" if is_still else head, *cells])
            stills.append(is_still)
    note = ("Mean over prompts [95 % interval, Student's t over prompts], bold where it excludes 0 and rests "
            f"on {FEWEST} prompts or more.")
    return Table(f"Differences from {first} on the same prompts", f"{note} {STILL}" if any(stills) else note,
                 ["", *(f"{c['b']} ({c['pairs']} pairs, {c['prompts']} prompts)" for c in comparisons)], rows,
                 "needs videos of 2 prompts that both made")


FEWEST = 5  # prompts for a bold difference: of fewer, one odd prompt decides


def with_interval(scale: float, interval: list[float], prompts: int, is_bold: bool) -> str:
    cell = "{:+.2f} [{:.2f}, {:.2f}]".format(*(scale * v for v in interval))
    return f"**{cell}**" if is_bold and prompts >= FEWEST and interval[1] * interval[2] > 0 else cell


def as_markdown(tables: list[Table]) -> str:
    lines = []
    for table in tables:
        if table.is_blank():
            lines += [f"{table.title}: {table.lack}", ""]
            continue
        cells = [table.heads, *table.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        padded = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
        rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
        lines += [f"### {table.title}", "", table.note, "", padded[0], rule, *padded[1:], ""]
    return "\n".join(lines)


def probe_tables(probes: dict) -> list[Table]:
    if not probes:
        return []
    first = next(iter(probes.values()))  # all have the same levels, kinds and chunks
    gaps, recovered = [], []
    for path, probe in probes.items():
        for chunk, row in probe["own_minus_real"].items():
            pairs = zip(row["mean"], row["sem"], strict=True)
            gaps.append([path, chunk, *(with_error(*both, ".4f", ".4f") for both in pairs)])
        recovered.append([path, *(with_error(row["chunks"], row["sem"], ".1f", ".1f")
                                  for row in probe["recovery"].values())])
    recovery = first["recovery"]
    ahead = len(recovery["untouched"]["within"])
    return [Table("Loss on own minus real videos", "Of the first and the last chunk that continue a held-out "
                  "clip, by noise level t. 0: its own videos are to the model as real ones; negative: easier "
                  "(simpler, or real ones are strange to it); positive: harder (wilder).",
                  ["Model", "Chunk", *(f"t = {t}" for t in first["levels"])], gaps),
            Table("Recovery", f"Chunks until a spoilt context is overcome; {ahead + 1}: not within "
                  f"{ahead}. Untouched: the same for a real context.", ["Model", *recovery], recovered)]


# ----------------------------------------------------------------------------------------------------
# pictures

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
WIDTH, HEIGHT, ACROSS = 250, 170, 4  # of a panel, in pixels; panels in a row


def draw_curves(curves: dict) -> str:
    """An SVG with a panel for each metric, in it a line and its standard error for each method."""
    names = list(dict.fromkeys(name for lines in curves.values() for name in lines))
    height = 34 + HEIGHT * math.ceil(len(names) / ACROSS)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH * ACROSS} {height}" '
             'font-family="Helvetica, Arial, sans-serif" font-size="10" fill="#333">']
    x = 46
    colours = dict(zip(curves, itertools.cycle(COLOURS), strict=False))
    for method, colour in colours.items():
        parts.append(f'<rect x="{x}" y="10" width="18" height="4" fill="{colour}"/>'
                     f'<text x="{x + 24}" y="16" font-size="12">{html.escape(method)}</text>')
        x += 48 + 7 * len(method)
    for i, name in enumerate(names):
        lines = {m: rows[name] for m, rows in curves.items() if name in rows}
        parts.append(f'<g transform="translate({i % ACROSS * WIDTH} {34 + i // ACROSS * HEIGHT})">'
                     + draw_panel(name.replace("_", " "), lines, colours) + "</g>")
    return "\n".join(parts) + "\n</svg>\n"


def draw_panel(title: str, lines: dict, colours: dict) -> str:
    left, right, top, bottom = 46, WIDTH - 12, 22, HEIGHT - 30
    table = np.concatenate(list(lines.values()), 1)
    error = np.nan_to_num(table[2])
    low, high = np.nanmin(table[1] - error), np.nanmax(table[1] + error)
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - pad, high + pad
    end = table[0].max() + table[0].min()  # of the video, from the middles of its first and last bin

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
        band, line = " ".join(over + under[::-1]), " ".join(line)
        parts.append(f'<path d="M{band}Z" fill="{colours[method]}" fill-opacity="0.18"/>'
                     f'<path d="M{line}" fill="none" stroke="{colours[method]}" stroke-width="1.8"/>')
    return "".join(parts)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from low to high."""
    rough = (high - low) / count
    step = 10 ** math.floor(math.log10(rough))
    step *= next(m for m in (1, 2, 5, 10) if m * step >= rough)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


class Strip(NamedTuple):
    """One method's video of a prompt."""
    method: str
    clip: NamedTuple  # eval_drift.py's
    png: bytes  # frames across time
    mp4: bytes | None = None


def film_strips(report: dict, clips: list, out: Path) -> list:
    """[(prompt, seconds, [Strip])], a Strip of each method's video of one prompt."""
    rows = defaultdict(list)
    for video, clip in zip(report["videos"], clips, strict=True):
        rows[clip.method].append(video | {"clip": clip})
    base = next(iter(rows))
    same = {method: {a["name"]: b for a, b in partners(rows[base], group)} for method, group in rows.items()}
    groups = [[same[method][video["name"]] for method in rows if video["name"] in same[method]]
              for video in rows[base]]
    groups = sorted(groups, key=len, reverse=True)[:PROMPTS]
    groups += [[rows[method][0]] for method in rows if not same[method]]  # methods without a common prompt
    strips, pictures = [], []
    for group in groups:
        strip = []
        for video in group:
            frames = across_time(video["clip"])
            data.film_strip(out / "row.png", [frames])
            strip.append(Strip(video["method"], video["clip"], (out / "row.png").read_bytes()))
            pictures.append(frames)
        pictures.append(torch.full((1, 3, 6, 1), 255, dtype=torch.uint8))  # space before the next prompt
        strips.append((group[0]["prompt"], group[0]["frames"] / group[0]["fps"], strip))
    (out / "row.png").unlink()
    data.film_strip(out / "filmstrips.png", pictures[:-1])
    return with_videos(strips, out)


PAGE = 15_000_000  # bytes that the page may have; in base64, 3 bytes take 4
TALL = 160  # pixels: the height to which larger videos are reduced


def with_videos(strips: list, out: Path) -> list:
    """The same with videos to play, of as many prompts as the page has room for."""
    room = 0.7 * PAGE - sum(len(strip.png) for _, _, row in strips for strip in row)
    result = []
    for prompt, seconds, row in strips:
        if room > 0:
            played = [strip._replace(mp4=playable(strip.clip, out)) for strip in row]
            room -= sum(len(strip.mp4) for strip in played)
            row = played if room >= 0 else row
        result.append((prompt, seconds, row))
    return result


def playable(clip, out: Path) -> bytes:
    """A video as an mp4 for a browser: small ones of our own as they are."""
    if clip.height <= TALL and data.read_tags(clip.path):
        return clip.path.read_bytes()
    width = 2 * round(clip.width * min(TALL, clip.height) / clip.height / 2)
    size = width, 2 * (min(TALL, clip.height) // 2)
    path = out / "small.mp4"
    video = data.probe(clip.path)
    data.write_video(path, data.read_frames(video, None, size), video.fps, crf=30)
    content = path.read_bytes()
    path.unlink()
    return content


PROMPTS, FRAMES, ROW = 4, 8, 80  # the most prompts in film strips; frames in a row, and its height in pixels


def across_time(clip) -> torch.Tensor:
    """uint8 [FRAMES,3,ROW,W], from the first frame to the last."""
    video = data.probe(clip.path)
    rate = (FRAMES - 1) / (video.duration - 1 / video.fps)
    size = round(clip.width * ROW / clip.height), ROW
    return torch.stack(list(islice(data.read_frames(video, rate, size), FRAMES)))


def sparklines(curves: dict) -> str:
    """A line of blocks for each metric and method; a metric's methods share one scale."""
    lines = []
    widest = max(map(len, curves))
    for name in dict.fromkeys(name for rows in curves.values() for name in rows):
        shown = {method: rows[name][1] for method, rows in curves.items() if name in rows}
        together = np.concatenate(list(shown.values()))
        low, high = np.nanmin(together), np.nanmax(together)
        for method, values in shown.items():
            levels = (values - low) / ((high - low) or 1)
            blocks = "".join(" " if math.isnan(v) else chr(0x2581 + int(7.999 * v)) for v in levels)
            known = values[~np.isnan(values)]
            lines.append(f"{name:22} {method:{widest}} {blocks} {known[0]:.4g} -> {known[-1]:.4g}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------
# the page

STYLE = """
body { font: 15px/1.5 Georgia, serif; color: #222; max-width: 1100px; margin: 3em auto; padding: 0 1em }
h1 { font-size: 1.7em } h2 { font-size: 1.2em; margin: 2.2em 0 .3em } p { margin: .3em 0 }
table { border-collapse: collapse; border-top: 2px solid; border-bottom: 2px solid; margin: .6em 0;
        font: 13px/1.4 Helvetica, Arial, sans-serif; display: block; overflow-x: auto; width: fit-content }
th, td { padding: .25em .9em .25em .2em; text-align: left; white-space: nowrap }
th { border-bottom: 1px solid } small, .note, dd { color: #777 }
.found { font-size: 1.15em }
.strip { display: grid; grid-template-columns: max-content auto; gap: 0 1em; align-items: center }
.strip img { max-width: 100%; display: block }
.videos { display: flex; flex-wrap: wrap; gap: .6em; margin: .4em 0 }
.videos figure { margin: 0 } figcaption { font: 13px/1.4 Helvetica, Arial, sans-serif }
.videos video { display: block; height: 160px; background: #eee }
.videos .small { image-rendering: pixelated }
#bar { position: sticky; top: 0; background: #fff; padding: .5em 0; display: flex; gap: 1em; z-index: 1 }
#bar button { width: 6em } #bar input { flex: 1 }
dt { float: left; clear: left; width: 11em; font-weight: bold }
dd { margin-left: 12em; overflow-wrap: anywhere }
"""
BAR = """<div id="bar"><button id="play">Play</button>
<input id="slider" type="range" min="0" max="1" step="0.001" value="0" aria-label="time">
<span id="time"></span></div>
"""
# one clock for all videos: each plays by itself, and is put right when it is more than a frame or two off
SCRIPT = """
const videos = [...document.querySelectorAll("video")], play = document.getElementById("play")
const slider = document.getElementById("slider"), time = document.getElementById("time")
let now = 0, playing = false, begun = 0
const end = () => Math.max(0.1, ...videos.map(v => v.duration || 0))
function show() {
  slider.max = end()
  slider.value = now
  time.textContent = now.toFixed(1) + " of " + end().toFixed(1) + " s"
  play.textContent = playing ? "Pause" : "Play"
}
function place(video, slack) {
  const aim = Math.min(now, Math.max(0, (video.duration || 0) - 0.01))
  if (!video.seeking && Math.abs(video.currentTime - aim) > slack) video.currentTime = aim
}
function tick() {
  if (!playing) return
  now = Math.min(end(), (performance.now() - begun) / 1000)
  for (const video of videos) {
    if (video.paused && now < video.duration - 0.05) video.play().catch(() => {})
    place(video, 0.1)
  }
  if (now >= end()) pause()
  show()
  requestAnimationFrame(tick)
}
function pause() {
  playing = false
  for (const video of videos) { video.pause(); place(video, 0) }
  show()
}
function toggle() {
  if (playing) return pause()
  if (now >= end() - 0.05) now = 0
  begun = performance.now() - 1000 * now
  playing = true
  tick()
}
play.onclick = toggle
slider.oninput = () => {
  now = Number(slider.value)
  begun = performance.now() - 1000 * now
  if (!playing) pause()
}
document.addEventListener("keydown", event => {
  if (event.code === "Space" && event.target !== play) { event.preventDefault(); toggle() }
})
for (const video of videos) video.onloadedmetadata = show
show()
"""


def as_html(report: dict, tables: list[Table], strips) -> str:
    """One page that needs no other file."""
    text = html.escape
    parts = [f'<p class="found">{text(line)}</p>' for line in report["findings"]]
    parts += map(table_html, tables)
    parts += ['<h2>Over time</h2><p class="note">Mean over prompts; the band is its standard error.</p>',
              draw_curves(report["curves"]), "<h2>Film strips</h2>"]
    is_playing = any(strip.mp4 for _, _, row in strips for strip in row)
    parts += [BAR] * is_playing
    parts += [strip_html(*strip) for strip in strips]
    parts += [f"<script>{SCRIPT}</script>"] * is_playing
    for title in ("skipped", "missing", "metrics", "definitions", "settings"):
        rows = "".join(f"<dt>{text(k)}</dt><dd>{text(str(v))}</dd>" for k, v in report[title].items())
        parts.append(f"<h2>{title.capitalize()}</h2><dl>{rows}</dl>" if rows else "")
    counts = Counter(video["method"] for video in report["videos"])
    counts = ", ".join(f"{method} ({count} videos)" for method, count in counts.items())
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Drift</title>'
            f"<style>{STYLE}</style></head><body><h1>Drift</h1><p>{text(counts)}</p>"
            + "\n".join(parts) + "</body></html>\n")


def table_html(table: Table) -> str:
    if table.is_blank():
        return f'<p class="note">{html.escape(f"{table.title}: {table.lack}")}</p>'
    lines = [[cell_html(head, "th") for head in table.heads],
             *([cell_html(cell, "td") for cell in row] for row in table.rows)]
    return (f'<h2>{html.escape(table.title)}</h2><p class="note">{html.escape(table.note)}</p><table><tr>'
            + "</tr><tr>".join(map("".join, lines)) + "</tr></table>")


def cell_html(content: str, tag: str) -> str:
    content = re.sub(r"(\(.*?\)|\[.*?\])", r"<small>\1</small>", html.escape(content))
    return f"<{tag}>" + re.sub(r"\*\*(.*)\*\*", r"<b>\1</b>", content) + f"</{tag}>"


def strip_html(prompt: str, seconds: float, row: list[Strip]) -> str:
    """A prompt with its videos side by side, then their frames across time."""
    text = html.escape
    videos, images = [], []
    for strip in row:
        if strip.mp4:
            small = ' class="small"' if strip.clip.height < TALL / 2 else ""
            videos.append(f'<figure><video muted playsinline preload="auto"{small} src="data:video/mp4;'
                          f'base64,{base64.b64encode(strip.mp4).decode()}"></video>'
                          f"<figcaption>{text(strip.method)}</figcaption></figure>")
        images.append(f'<span>{text(strip.method)}</span><img alt="frames of {text(strip.method)}" '
                      f'src="data:image/png;base64,{base64.b64encode(strip.png).decode()}">')
    played = f'<div class="videos">{"".join(videos)}</div>' if videos else ""
    return (f'<p>{text(prompt)} <span class="note">(0 to {seconds:.1f} s)</span></p>{played}'
            f'<div class="strip">{"".join(images)}</div>')
