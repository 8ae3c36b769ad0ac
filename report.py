"""The report of eval_drift.py: tables, curves, film strips, and one page with all of them."""

import base64
import html
import itertools
import json
import math
import re
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import common
import data
import metrics
import toy


def write(out: Path, report: dict, clips: list):
    """report: all that eval_drift.py knows; clips: its videos, for the film strips."""
    tables = make_tables(report)
    curves = report["curves"]
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
    common.write_text(out / "table.md", as_markdown(tables))
    common.write_text(out / "curves.svg", draw_curves(curves))
    common.write_text(out / "report.html", as_html(report, tables, film_strips(report, clips, out)))
    print(as_markdown(tables), sparklines(curves), "", sep="\n")
    print(f"{out / 'report.html'} holds all of it, with curves and film strips")


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
# tables

class Table(NamedTuple):
    title: str
    note: str
    heads: list[str]
    rows: list[list[str]]  # the best of a column in **
    lack: str = "no video has a value for it"  # stands in place of a table of nothing but dashes

    def is_blank(self) -> bool:
        return all(cell == "-" for row in self.rows for cell in row[1:])


# columns of the paper's Table 1: VBench's dimensions, and the drift of two of them
QUALITY_HEADS = ("Subject", "Bg. Cons.", "Smooth.", "Dynamic", "Aesthetic", "Imaging")
DRIFT_HEADS = QUALITY_HEADS[4:]


def make_tables(report: dict) -> list[Table]:
    methods, toy_shown = list(report["mean"]), "sprite" in report["metrics"]
    free = [name for name in metrics.FREE | metrics.OPTIONAL if name in report["metrics"]]

    def table(title, note, columns, **lack):
        rows = zip(methods, *columns.values(), strict=True)
        return Table(title, note, ["Method", *columns], list(map(list, rows)), **lack)

    quality = zip(QUALITY_HEADS, metrics.DIMENSIONS, strict=True)
    drift = {f"d {head}": f"{head.lower()}_quality" for head in DRIFT_HEADS}
    tables = [table("Quality and drift (the paper's Table 1)", "Global metrics: higher is better. Drifting "
                    "metrics d, first 20 % minus average: lower is better. x100; (standard error).",
                    {head: points(report, name) for head, name in quality}
                    | {head: points(report, name, "drift") for head, name in drift.items()},
                    lack="needs VBench's weight files; see missing in summary.json, or --weights DIR")]
    if any(name in row for name in metrics.QUALITIES for row in report["mean"].values()):
        tables.append(table("Motion and frame quality", "The paper's Table 2; higher is better.", {
            "Motion quality": points(report, "motion_quality"),
            "Frame quality": points(report, "frame_quality")}))
    tables += [table("Change without weights", "Last 20 % over first 20 %: x1.00 is no drift.",
                     {name: factor(report, name, "log_ratio") for name in free}),
               table("Distance from no change", "The same, with up and down not cancelling between videos.",
                     {name: factor(report, name, "abs_log_ratio") for name in free})]
    if toy_shown:
        tables.append(table(
            "The toy world", "First 20 % -> last 20 %: per cent of moments with the sprite, "
            "with the told shape and direction; grey levels off the first chunk.",
            {name: change(report, name, name in ("colour", "background")) for name in toy.READINGS}))
    if report["frechet"]:
        rows = [[method, *(f"{v:.1f}" for v in row)] for method, row in report["frechet"].items()]
        tables.append(Table("Frechet distance to real frames", "By fifths of the videos; lower is better.",
                            ["Method", *(f"{i}-{i + 20} %" for i in range(0, 100, 20))], rows))
    if len(methods) > 1:
        shown = [(head, name, "drift") for head, name in drift.items()]
        shown += [(f"log ratio of {name}", name, "log_ratio") for name in free]
        shown += [(f"{name}, last 20 %", name, "last") for name in toy.READINGS if toy_shown]
        tables.append(paired_table([c for c in report["paired"] if c["a"] == methods[0]], shown))
    return tables + probe_tables(report["probes"])


def column(report, name, what, key, text) -> list[str]:
    """A cell for each method: text(means, standard errors) of the metric, bold where key(mean) is least."""
    rows = [[report[kind][m].get(name, {}) for kind in ("mean", "sem")] for m in report["mean"]]
    keys = [key(row.get(what, math.nan)) for row, _ in rows]
    cells = ["-" if math.isnan(k) else text(*row) for k, row in zip(keys, rows, strict=True)]
    best = min((k for k in keys if not math.isnan(k)), default=None) if len(rows) > 1 else None
    return [f"**{cell}**" if k == best else cell for k, cell in zip(keys, cells, strict=True)]


def points(report, name, what="score"):
    """x100, as the paper reports them; of scores the highest is the best, of drifts the lowest."""
    scale = metrics.SCALE.get(name, 100)
    sign = -1 if what == "score" else 1
    return column(report, name, what, lambda v: sign * v,
                  lambda row, error: with_error(scale * row[what], scale * error[what]))


def factor(report, name, what):
    return column(report, name, what, abs, lambda row, error: "x" + with_error(
        math.exp(row[what]), 100 * math.expm1(error[what]), ".2f", ".0f", "%"))


def change(report, name, is_level):
    """First -> last 20 %, of grey levels (the lowest is the best) or of a share (the highest)."""
    scale = 1 if is_level else 100
    return column(report, name, "last", lambda v: v if is_level else -v, lambda row, error: (
        ("- -> " if math.isnan(row["first"]) else f"{scale * row['first']:.0f} -> ")
        + with_error(scale * row["last"], scale * error["last"], ".0f", ".0f")))


def with_error(value: float, error: float, digits=".2f", error_digits=".2f", unit="") -> str:
    digits = digits if abs(value) < 100 else ".0f"
    return f"{value:{digits}}" + ("" if math.isnan(error) else f" ({error:{error_digits}}{unit})")


def paired_table(comparisons: list[dict], shown) -> Table:
    rows = []
    for head, name, what in shown:
        scale = metrics.SCALE.get(name, 100) if what == "drift" else 1
        gaps = [c["b_minus_a"].get(name, {}).get(what) for c in comparisons]
        rows.append([head, *(with_interval(scale, **gap) if gap else "-" for gap in gaps)])
    return Table(f"Differences from {comparisons[0]['a']} on the same prompts",
                 "Mean over prompts [95 % interval, Student's t over prompts], bold where it excludes 0 and "
                 f"rests on {FEWEST} prompts or more.",
                 ["", *(f"{c['b']} ({c['pairs']} pairs, {c['prompts']} prompts)" for c in comparisons)],
                 [row for row in rows if set(row[1:]) != {"-"}], "needs videos of 2 prompts that both made")


FEWEST = 5  # prompts for a bold difference: of fewer, one odd prompt decides


def with_interval(scale: float, interval: list[float], prompts: int) -> str:
    cell = "{:+.2f} [{:.2f}, {:.2f}]".format(*(scale * v for v in interval))
    return f"**{cell}**" if prompts >= FEWEST and interval[1] * interval[2] > 0 else cell


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


def film_strips(report: dict, clips: list, out: Path) -> list:
    """[(prompt, seconds, [(method, png)])]: frames across time, from each method's video of one prompt."""
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
            strip.append((video["method"], (out / "row.png").read_bytes()))
            pictures.append(frames)
        pictures.append(torch.full((1, 3, 6, 1), 255, dtype=torch.uint8))  # space before the next prompt
        strips.append((group[0]["prompt"], group[0]["frames"] / group[0]["fps"], strip))
    (out / "row.png").unlink()
    data.film_strip(out / "filmstrips.png", pictures[:-1])
    return strips


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
.strip { display: grid; grid-template-columns: max-content auto; gap: 0 1em; align-items: center }
.strip img { max-width: 100%; display: block }
dt { float: left; clear: left; width: 11em; font-weight: bold }
dd { margin-left: 12em; overflow-wrap: anywhere }
"""


def as_html(report: dict, tables: list[Table], strips) -> str:
    """One page that needs no other file."""
    text = html.escape

    def cell(content, tag="td"):
        content = re.sub(r"(\(.*?\)|\[.*?\])", r"<small>\1</small>", text(content))
        return f"<{tag}>" + re.sub(r"\*\*(.*)\*\*", r"<b>\1</b>", content) + f"</{tag}>"

    parts = []
    for table in tables:
        if table.is_blank():
            parts.append(f'<p class="note">{text(f"{table.title}: {table.lack}")}</p>')
            continue
        lines = [[cell(head, "th") for head in table.heads], *([cell(c) for c in row] for row in table.rows)]
        parts.append(f'<h2>{text(table.title)}</h2><p class="note">{text(table.note)}</p><table><tr>'
                     + "</tr><tr>".join(map("".join, lines)) + "</tr></table>")
    parts += ['<h2>Over time</h2><p class="note">Mean over prompts; the band is its standard error.</p>',
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
