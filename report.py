"""The report of eval_drift.py: tables, curves, film strips, and one page that holds all of it."""

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
    """report: what eval_drift.py found; clips: its videos, for the film strips."""
    found, curves = tables(report), report["curves"]
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
    lack: str = "no video has a value for it"  # what is said in place of a table of dashes

    def is_blank(self) -> bool:
        return all(cell == "-" for row in self.rows for cell in row[1:])


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
        scale, sign = metrics.SCALE.get(name, 100), -1 if what == "score" else 1
        return column(name, what, lambda v: sign * v,
                      lambda row, error: with_error(scale * row[what], scale * error[what]))

    def factor(name, what):
        return column(name, what, abs, lambda row, error: "x" + with_error(
            math.exp(row[what]), 100 * math.expm1(error[what]), ".2f", ".0f", "%"))

    def change(name, off):  # off: in grey levels, the less the better; else a share
        return column(name, "last", lambda v: v if off else -v, lambda row, error: (
            ("- -> " if math.isnan(row["first"]) else f"{row['first'] * (off or 100):.0f} -> ")
            + with_error(row["last"] * (off or 100), error["last"] * (off or 100), ".0f", ".0f")))

    def table(title, note, columns, **lack):
        rows = zip(methods, *columns.values(), strict=True)
        return Table(title, note, ["Method", *columns], list(map(list, rows)), **lack)

    heads = ("Subject", "Bg. Cons.", "Smooth.", "Dynamic", "Aesthetic", "Imaging")
    found = [table("Quality and drift (the paper's Table 1)", "Global metrics: higher is better. Drifting "
                   "metrics d, first 20 % minus average: lower is better. x100; (standard error).",
                   dict(zip(heads, map(points, metrics.DIMENSIONS), strict=True))
                   | {f"d {name}": points(f"{name.lower()}_quality", "drift") for name in heads[4:]},
                   lack="needs VBench's weight files; see missing in summary.json, or --weights DIR")]
    if any(name in row for name in metrics.QUALITIES for row in report["mean"].values()):
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


def as_markdown(found: list[Table]) -> str:
    lines = []
    for table in found:
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
    some, gaps, back = next(iter(probes.values())), [], []
    for path, probe in probes.items():
        for chunk, row in probe["own_minus_real"].items():
            pairs = zip(row["mean"], row["sem"], strict=True)
            gaps.append([path, chunk, *(with_error(*both, ".4f", ".4f") for both in pairs)])
        back.append([path, *(with_error(row["chunks"], row["sem"], ".1f", ".1f")
                             for row in probe["recovery"].values())])
    recovery = some["recovery"]
    ahead = len(recovery["untouched"]["within"])
    return [Table("Loss on own minus real videos", "Of the first and the last chunk that continue a held-out "
                  "clip, by noise level t. 0: its own videos are to the model as real ones; negative: easier "
                  "(simpler, or real ones are strange to it); positive: harder (wilder).",
                  ["Model", "Chunk", *(f"t = {t}" for t in some["levels"])], gaps),
            Table("Recovery", f"Chunks until a spoilt context is overcome; {ahead + 1}: not within "
                  f"{ahead}. Untouched: the same for a real context.", ["Model", *recovery], back)]


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


def film_strips(report: dict, clips: list, out: Path) -> list:
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


def across_time(clip) -> torch.Tensor:
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


def as_html(report: dict, found: list[Table], strips) -> str:
    """One page that needs no other file."""
    text = html.escape

    def cell(content, tag="td"):
        content = re.sub(r"(\(.*?\)|\[.*?\])", r"<small>\1</small>", text(content))
        return f"<{tag}>" + re.sub(r"\*\*(.*)\*\*", r"<b>\1</b>", content) + f"</{tag}>"

    parts = []
    for table in found:
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
