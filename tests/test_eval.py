"""Stage 5: the paper's formulas and tables, resuming, refusals, the toy world read back."""

import base64
import html
import html.parser
import json
import math
import re
import shutil
import signal
import subprocess
import xml.etree.ElementTree
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from worlds import ROOT, call, ended, identity, read_video, run_stage, start, wait_until

import data
import eval_drift
import metrics
import readings
import report as page
import toy
from common import UserError


def ramp(frames):
    return torch.linspace(0, 1, frames).view(-1, 1, 1, 1)


def saturated(video):
    grey = video.mean(1, True)
    return (grey + (video - grey) * (1 + 1.5 * ramp(len(video)))).clamp(-1, 1)


def write(path, video, prompt="A disc moving left", fps=16, **tags):
    path.parent.mkdir(parents=True, exist_ok=True)
    data.write_video(path, [video], fps, {"prompt": prompt} | tags, crf=8, preset="veryfast")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """kept/ and drifted/: 3 toy videos each, of the same worlds, which their tags name, of 81 frames."""
    root = tmp_path_factory.mktemp("videos")
    for i in range(3):
        world = toy.draw_world("eval", i)
        video = toy.render(world, 81)
        tags = {"prompt": toy.caption(world), "seed": i, "world": world.name}
        write(root / "kept" / f"{i}.mp4", video, **tags)
        write(root / "drifted" / f"{i}.mp4", saturated(video), **tags)
    return root


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Runs eval_drift.main in tmp_path: (what it returns, summary.json)."""
    monkeypatch.chdir(tmp_path)

    def run(*folders, out="report", **flags):
        cfg = eval_drift.Config(tuple(map(str, folders)), out=str(out), **flags)
        status = run_stage(eval_drift, cfg)
        return status, json.loads(Path(out, "summary.json").read_text())
    return run


# ----------------------------------------------------------------------------------------- the formulas

def test_drift_of_a_linear_decay():
    row = eval_drift.summaries(1 - np.arange(801) / 800)
    assert row["drift"] == pytest.approx(0.4, abs=2e-3)
    assert row["start_end"] == pytest.approx(0.85, abs=2e-3)
    assert row["first"] == pytest.approx(0.9, abs=2e-3) and row["last"] == pytest.approx(0.1, abs=2e-3)
    assert row["log_ratio"] == pytest.approx(math.log(row["last"] / row["first"]))
    step = eval_drift.summaries(np.r_[np.ones(160), np.zeros(641)])
    assert step["drift"] == pytest.approx(1 - 160 / 801), "a decay right after the first fifth: 0.8 of it"
    assert step["last"] == 0 and step["log_ratio"] == pytest.approx(math.log(eval_drift.FLOOR))
    rising = eval_drift.summaries(np.arange(100) / 99)
    assert rising["drift"] < 0 < rising["start_end"], "the paper's keeps the sign, FramePack's does not"
    assert eval_drift.summaries(np.array([3.0, 2.0, 1.0]))["drift"] == 1, "three frames are enough"


def test_frames_without_a_value_do_not_count():
    values = np.r_[np.full(50, math.nan), np.full(50, 2.0)]
    row = eval_drift.summaries(values)
    assert row["score"] == 2 and math.isnan(row["first"]) and math.isnan(row["log_ratio"])
    assert metrics.mean([1, math.nan, 3]) == 2 and metrics.sem([1, math.nan, 3]) == pytest.approx(1)
    assert math.isnan(metrics.sem([1]))


def test_students_quantiles():
    known = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 7: 2.3646, 30: 2.0423, 10**6: 1.96}
    assert {n: eval_drift.t_quantile(n) for n in known} == pytest.approx(known, abs=1e-4)


def test_intervals():
    assert eval_drift.interval(np.array([1.0, 4.0])) == {
        "interval": pytest.approx([2.5, 2.5 - 12.7062 * 1.5, 2.5 + 12.7062 * 1.5], abs=1e-4), "prompts": 2}
    assert eval_drift.interval(np.array([1.0])) is None and eval_drift.interval(np.array([])) is None


@pytest.mark.parametrize("shape,worst", [("normal", 6), ("uniform", 8), ("skewed", 8)])
def test_intervals_hold_their_level(shape, worst):
    """No difference is found where there is none: by rights in 5 % of cases, of 4000 here; a bootstrap of the
    pairs finds one in 19 % at 4 pairs. Skewed: a gamma distribution of skewness 1."""
    generator = np.random.default_rng(0)
    draw = {"normal": generator.normal, "uniform": lambda size: generator.uniform(-1, 1, size),
            "skewed": lambda size: generator.gamma(4, size=size) - 4}[shape]
    for pairs in (4, 8, 32):
        intervals = [eval_drift.interval(gap)["interval"] for gap in draw(size=(4000, pairs))]
        share = 100 * np.mean([low * high > 0 for _, low, high in intervals])
        print(f"{shape}, {pairs} pairs: {share:.1f} %")
        assert 4 <= share <= (worst if pairs < 32 else 6)


def rows_of(method, values):
    """Videos whose scores are values [metrics, prompts, samples]."""
    _, prompts, samples = values.shape
    return [{"method": method, "name": f"{p}-{s}.mp4", "prompt": str(p), "begin": None, "seed": s,
             "metrics": {str(i): {"score": v} for i, v in enumerate(values[:, p, s])}}
            for p in range(prompts) for s in range(samples)]


@pytest.mark.parametrize("prompts", [4, 8, 32])
def test_samples_of_a_prompt_are_no_independent_pairs(prompts):
    generator = np.random.default_rng(1)
    gaps = generator.normal(size=(2000, prompts, 1)) + generator.normal(size=(2000, prompts, 4))
    comparison = eval_drift.compare(rows_of("a", 0 * gaps), rows_of("b", gaps))
    assert (comparison["pairs"], comparison["prompts"]) == (4 * prompts, prompts)
    intervals = [gap["score"]["interval"] for gap in comparison["b_minus_a"].values()]
    share = 100 * np.mean([low * high > 0 for _, low, high in intervals])
    print(f"{prompts} prompts with 4 samples each: {share:.1f} %")
    assert 3.5 <= share <= 6.5


def test_errors_are_over_prompts():
    """Copies of a video change nothing; but videos that continue different ones have different prompts."""
    values = np.random.default_rng(2).normal(size=(1, 6, 1))
    once, often = rows_of("a", values), rows_of("a", values.repeat(4, 2))
    for f in (metrics.mean, metrics.sem):
        assert eval_drift.over_videos(often, f)["0"]["score"] == pytest.approx(f(values))
    curves = {"0": np.array([[0.0, 16.0], [1.0, 2.0]])}
    binned = [eval_drift.binned([row | {"curves": {"0": curves["0"] * [[1], [row["metrics"]["0"]["score"]]]},
                                        "frames": 32, "fps": 16} for row in rows])["0"]
              for rows in (once, often)]
    assert binned[0] == pytest.approx(binned[1], nan_ok=True) and binned[0][2, 0] == pytest.approx(
        metrics.sem(values))
    for i, row in enumerate(once):
        row |= {"prompt": "one", "begin": f"{i}.mp4"}
    assert eval_drift.over_videos(once, metrics.sem)["0"]["score"] == pytest.approx(metrics.sem(values))
    zeros, values = np.zeros((1, 2, 2)), np.array([[[1, math.nan], [2, 4]]])
    gaps = eval_drift.compare(rows_of("a", zeros), rows_of("b", values))["b_minus_a"]
    assert gaps["0"]["score"]["interval"][0] == 2, "the mean of 1 and of the mean of 2 and 4"


def test_pairs_share_a_name_or_prompt_and_seed():
    def row(name, prompt, seed):
        return {"name": name, "prompt": prompt, "seed": seed}

    a = [row("0.mp4", "x", 0), row("1.mp4", "y", 1), row("2.mp4", "z", None), row("3.mp4", "w", 5)]
    b = [row("0.mp4", "other", 9), row("b.mp4", "y", 1), row("c.mp4", "z", None), row("d.mp4", "w", 5),
         row("e.mp4", "w", 5)]
    assert [(x["name"], y["name"]) for x, y in page.partners(a, b)] == [("0.mp4", "0.mp4"),
                                                                             ("1.mp4", "b.mp4")]


# ------------------------------------------------------------------------------------------- the tables

def report_of(**methods) -> dict:
    """A report whose methods' means are given, with a standard error of 0.005."""
    return {"mean": {m: {n: {"score": v, "drift": v, "log_ratio": v, "abs_log_ratio": abs(v)}
                         for n, v in row.items()} for m, row in methods.items()},
            "sem": {m: {n: defaultdict(lambda: 0.005) for n in methods[m]} for m in methods},
            "metrics": {"saturation": "", "contrast": ""}, "paired": [], "frechet": {}, "probes": {}}


def test_the_papers_table():
    report = report_of(A={"subject_consistency": 0.8405, "imaging_quality": 63.41, "saturation": 0.35},
                       B={"subject_consistency": 0.807, "imaging_quality": 59.97, "saturation": -0.1})
    report["mean"]["A"]["imaging_quality"]["drift"] = 3.57
    report["mean"]["B"]["imaging_quality"]["drift"] = 7.34
    report["paired"] = [{"a": "A", "b": "B", "pairs": 12, "prompts": 6, "b_minus_a": {
        "saturation": {"log_ratio": {"interval": [-0.45, -0.6, -0.3], "prompts": 5}},
        "contrast": {"log_ratio": {"interval": [-0.45, -0.6, -0.3], "prompts": 4}},
        "imaging_quality": {"drift": {"interval": [3.77, -0.1, 7], "prompts": 6}}}}]
    first, change, spread, paired = page.make_tables(report)
    assert first.heads == ["Method", "Subject", "Bg. Cons.", "Smooth.", "Dynamic", "Aesthetic", "Imaging",
                           "d Aesthetic", "d Imaging"]
    assert first.rows == [
        ["A", "**84.05 (0.50)**", "-", "-", "-", "-", "**63.41 (0.01)**", "-", "**3.57 (0.01)**"],
        ["B", "80.70 (0.50)", "-", "-", "-", "-", "59.97 (0.01)", "-", "7.34 (0.01)"]]
    assert change.rows == [["A", "x1.42 (1%)", "-"], ["B", "**x0.90 (1%)**", "-"]], "nearest to 1 is best"
    assert spread.rows == [["A", "x1.42 (1%)", "-"], ["B", "**x1.11 (1%)**", "-"]]
    assert paired.heads == ["", "B (12 pairs, 6 prompts)"]
    assert paired.rows == [["d Imaging", "+3.77 [-0.10, 7.00]"],
                           ["log ratio of saturation", "**-0.45 [-0.60, -0.30]**"],
                           ["log ratio of contrast", "-0.45 [-0.60, -0.30]"]], "4 prompts are too few"
    lines = page.as_markdown([first]).splitlines()
    assert lines[4:6] == ["| Method | Subject          | Bg. Cons. | Smooth. | Dynamic | Aesthetic | Imaging"
                          "          | d Aesthetic | d Imaging       |",
                          "|--------|------------------|-----------|---------|---------|-----------|--------"
                          "----------|-------------|-----------------|"]


def test_the_papers_second_table_and_a_single_method():
    report = report_of(A={"motion_quality": 87.59, "frame_quality": 59.38})
    assert page.make_tables(report)[1].rows == [["A", "87.59 (0.01)", "59.38 (0.01)"]], "nothing to be bold"
    assert page.make_tables(report)[0].rows == [["A"] + ["-"] * 8]


def test_a_table_of_dashes_is_a_line(videos, evaluate, capsys):
    """Small frames and no weights leave nothing of the paper's Table 1."""
    evaluate(videos / "kept", videos / "drifted")
    line = ("Quality and drift (the paper's Table 1): needs VBench's weight files; see missing in "
            "summary.json, or --weights DIR")
    text = Path("report/report.html").read_text()
    for shown in (Path("report/table.md").read_text(), capsys.readouterr().out, html.unescape(text)):
        assert line in shown and "Imaging" not in shown and "saturation" in shown
    assert Page(text).seen.count("table") == 3, "change, distance and differences"
    table = page.Table("T", "note", ["", "a", "b"], [["x", "-", "-"], ["y", "-", "1"]], "more")
    assert "| x | - | - |" in page.as_markdown([table]), "some dashes stay"
    assert page.as_markdown([table._replace(rows=[])]) == "T: more\n"


# ------------------------------------------------------------------------------------------- whole runs

def test_a_report(videos, evaluate, capsys):
    status, summary = evaluate(f"Kept={videos}/kept", videos / "drifted", toy=True)
    assert status is None and list(summary["mean"]) == ["Kept", "drifted", "frozen", "truth"]
    assert len(summary["videos"]) == 12
    drift = summary["mean"]["drifted"]["saturation"]["log_ratio"]
    assert drift > 0.3 > abs(summary["mean"]["Kept"]["saturation"]["log_ratio"])
    per_video = [video["metrics"]["saturation"]["log_ratio"] for video in summary["videos"]
                 if video["method"] == "drifted"]
    assert drift == pytest.approx(np.mean(per_video))
    assert summary["sem"]["drifted"]["saturation"]["log_ratio"] == pytest.approx(
        np.std(per_video, ddof=1) / 3**0.5)
    paired = summary["paired"][0]
    assert (paired["a"], paired["b"], paired["pairs"]) == ("Kept", "drifted", 3)
    gap = paired["b_minus_a"]["saturation"]["log_ratio"]
    assert gap["interval"][0] > 0.3 and gap["prompts"] == 3
    kept = summary["mean"]["Kept"]
    assert kept["sprite"]["score"] == 1 and kept["direction"]["last"] == 1
    assert "imaging_quality" not in kept, "missing is not zero"
    assert "musiq" in summary["missing"]["imaging_quality"]
    assert summary["definitions"].keys() >= {"drift", "sem"}
    printed = capsys.readouterr().out
    tables = Path("report/table.md").read_text().partition("\n\n### ")[2]
    assert "https://" in printed and "\u2588" in printed and tables in printed
    assert "| drifted | " in printed

    rows = [line.split(",") for line in Path("report/curves.csv").read_text().splitlines()]
    assert rows[0] == ["method", "metric", "t_seconds", "mean", "sem"]
    mine = [row for row in rows if row[:2] == ["drifted", "saturation"]]
    assert len(mine) == 10 and float(mine[0][3]) < float(mine[-1][3])
    assert float(mine[0][2]) == pytest.approx(81 / 16 / 20, abs=1e-3)
    curves = np.load("report/curves.npz")
    assert curves["Kept/0.mp4/saturation"].shape == (2, 21), "every fourth of 81 frames"
    assert np.array_equal(curves["Kept/0.mp4/sprite"][0], curves["Kept/0.mp4/saturation"][0]), "when, too"
    assert "- -> 100 (0)" in printed, "no direction can be read in the first 20 %"
    assert curves["Kept/0.mp4/saturation"][1].mean() == pytest.approx(
        summary["videos"][0]["metrics"]["saturation"]["score"])


class Page(html.parser.HTMLParser):
    """Which tags there are, whether they nest, and what they refer to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.refers = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.refers += [v for k, v in attributes if k in ("src", "href", "xlink:href", "data")]
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else(videos, evaluate):
    evaluate(f"A<b>&={videos}/kept", videos / "drifted", toy=True)
    text = Path("report/report.html").read_text()
    page = Page(text)
    assert not page.open and page.seen.count("svg") == page.seen.count("script") == 1
    assert page.seen.count("img") == page.seen.count("video") == 12 and len(page.refers) == 24
    kinds = [link.partition(";base64,")[0] for link in page.refers]
    assert set(kinds) == {"data:image/png", "data:video/mp4"} and kinds.count("data:video/mp4") == 12
    assert not re.search(r"@import|url\(|<link|https?://(?!www.w3.org)", text.partition("<h2>Missing")[0])
    assert "A&lt;b&gt;&amp;" in text
    svg = xml.etree.ElementTree.parse("report/curves.svg").getroot()
    assert len(svg.findall("{*}g")) == len(metrics.FREE) + len(readings.READINGS), "a panel for each metric"
    strip = data.read_image("report/filmstrips.png")
    assert strip.shape[2:] == (12 * 84 + 2 * 10, 8 * 84), "four rows for each prompt, a gap between prompts"


def test_the_page_holds_small_videos_as_they_are_and_large_ones_reduced(evaluate, tmp_path, monkeypatch):
    for i in range(3):
        video = toy.render(toy.draw_world("small", i), 17)
        write(tmp_path / f"small/{i}.mp4", video)
        write(tmp_path / f"large/{i}.mp4", video.repeat(1, 1, 7, 10))  # 320x224
    evaluate("small", "large")
    links = Page(Path("report/report.html").read_text()).refers
    pictures, films = ([base64.b64decode(link.partition(",")[2]) for link in links if link.startswith(kind)]
                       for kind in ("data:image/png", "data:video/mp4"))
    assert len(films) == 6 and films[0] == (tmp_path / "small/0.mp4").read_bytes()
    (tmp_path / "embedded.mp4").write_bytes(films[1])
    reduced = data.probe(tmp_path / "embedded.mp4")
    assert (reduced.width, reduced.height, reduced.frames, reduced.fps) == (228, 160, 17, 16)
    room = sum(map(len, pictures)) + 0.9 * sum(map(len, films))
    monkeypatch.setattr(page, "PAGE", room / 0.7)
    evaluate("small", "large")
    assert Path("report/report.html").read_text().count("<video") == 4, "of as many prompts as fit"


def test_frames_of_a_strip_go_from_first_to_last(tmp_path):
    grey = torch.arange(61).view(-1, 1, 1, 1).expand(-1, 3, 32, 32) * 4
    write(tmp_path / "a.mp4", grey.to(torch.uint8))
    video = data.probe(tmp_path / "a.mp4")
    clip = eval_drift.Clip("m", "a.mp4", video.path, video.fps, 32, 32, 61, "", None, None, "")
    shown = page.across_time(clip).float().mean((1, 2, 3)) / 4
    assert shown.tolist() == pytest.approx([i * 60 / 7 for i in range(8)], abs=1.6)


def test_pieces_do_not_matter(videos, evaluate, monkeypatch):
    """But for the last bits of the toy's readings: a CPU may multiply more frames in another order."""
    _, whole = evaluate(videos / "drifted", toy=True, extra=True)
    pieces = eval_drift.pieces
    monkeypatch.setattr(eval_drift, "pieces", lambda job: pieces(job, 7))
    _, cut = evaluate(videos / "drifted", toy=True, extra=True, out="cut")
    for a, b in zip(cut["videos"], whole["videos"], strict=True):
        assert a["metrics"].keys() == b["metrics"].keys() >= {"flicker", "local_contrast", *readings.READINGS}
        for name, row in a["metrics"].items():
            numbers = (np.array([*of.values()], float) for of in (row, b["metrics"][name]))
            tolerance = 1e-4 if name in readings.READINGS else 0
            np.testing.assert_allclose(*numbers, 0, tolerance, err_msg=name)


def test_nothing_is_scored_twice(videos, evaluate, monkeypatch):
    """Neither in a second run, nor under another name; what is asked for later is added."""
    _, first = evaluate(videos / "kept")
    scored = []
    pieces = eval_drift.pieces
    monkeypatch.setattr(eval_drift, "pieces", lambda job: scored.append(job) or pieces(job))
    before = Path("report/summary.json").read_bytes()
    evaluate(videos / "kept")
    assert Path("report/summary.json").read_bytes() == before and not scored
    shutil.copytree(videos / "kept", "moved")
    _, moved = evaluate("moved")
    assert not scored and moved["mean"]["moved"] == first["mean"]["kept"]
    _, more = evaluate(videos / "kept", toy=True)
    assert len(scored) == 9, "and the controls"
    assert more["mean"]["kept"]["saturation"] == first["mean"]["kept"]["saturation"]
    made = identity(Path("report/controls"))
    evaluate(videos / "kept", toy=True)
    assert len(scored) == 9 and identity(Path("report/controls")) == made
    evaluate(videos / "kept", stride=2)
    assert len(scored) == 12, "other settings are other scores"


@pytest.fixture(scope="module")
def whole(videos, tmp_path_factory):
    """An uninterrupted run's folder, and its arguments."""
    out = tmp_path_factory.mktemp("whole") / "report"
    args = [videos / "kept", videos / "drifted", "--toy"]
    call("eval_drift.py", *args, "--out", out)
    return out, args


def same_report(a, b):
    for name in ("summary.json", "table.md", "curves.csv", "curves.svg", "report.html", "curves.npz"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_killed_and_started_again_it_ends_the_same(whole, tmp_path):
    out = tmp_path / "killed"
    process = start("eval_drift.py", *whole[1], "--out", out, stdout=subprocess.DEVNULL)
    wait_until(lambda: len(list(out.glob("scores/*.safetensors"))) >= 2, process)
    process.kill()
    ended(process, -signal.SIGKILL)
    made = {p: file for p, file in identity(out / "scores").items() if p.suffix == ".safetensors"}
    assert 2 <= len(made) < 12 and not (out / "summary.json").exists(), "killed too late to show anything"
    call("eval_drift.py", *whole[1], "--out", out)
    assert made.items() <= identity(out / "scores").items(), "scored again"
    same_report(out, whole[0])


def test_ranks_write_the_same_report(whole, tmp_path):
    call("eval_drift.py", *whole[1], "--out", tmp_path / "two", ranks=2)
    same_report(tmp_path / "two", whole[0])


def test_the_distance_to_real_frames(evaluate, tmp_path):
    for i in range(12):
        video = toy.render(toy.draw_world("real", i), 61)
        write(tmp_path / f"real/{i}.mp4", video)
        video = toy.render(toy.draw_world("fake", i), 61)
        write(tmp_path / f"fake/{i}.mp4", saturated(video))
    _, summary = evaluate("fake", real="real", stride=3)
    distances = summary["frechet"]["fake"]
    assert len(distances) == 5 and distances[4] > 2 * distances[0] > 0
    stored = [eval_drift.read_scores(file)[0]["frechet"] for file in Path("report/scores").iterdir()]
    video = read_video("fake/0.mp4")
    expected = metrics.frechet_features(*(video[offset:offset + 49:3] for offset in (0, 4, 8, 12)))
    assert len(stored) == 24 and {rows.shape for rows in stored} == {expected.shape}
    assert any(torch.allclose(rows, expected, atol=1e-5) for rows in stored), "from frames 0, 3, ... 48"
    assert "frechet" not in summary["mean"]["fake"] and "| fake " in Path("report/table.md").read_text()
    for i in range(7, 12):
        Path(f"fake/{i}.mp4").unlink()
    assert evaluate("fake", real="real", stride=3)[1]["frechet"] == {}, "too few windows in a fifth"


# ----------------------------------------------------------------------- the truth and a still picture

@pytest.fixture(scope="module")
def continued(tmp_path_factory):
    """good/ and bad/: 6 videos that continue starts by the truth; the bad ones stand still after 1.5 s."""
    root = tmp_path_factory.mktemp("continued")
    worlds = [toy.draw_world("starts", i) for i in range(6)]
    toy.draw_videos(root / "starts", worlds, 9)
    for i, world in enumerate(worlds):
        true = readings.true_frames(readings.Origin("starts", i, 0, 9), 81)
        tags = {"extend": str(root / "starts" / f"{i:05d}.mp4"), "context": 12, "seed": 0}
        write(root / "good" / f"{i}.mp4", true, toy.caption(world), **tags)
        stopped = torch.cat([true[:24], true[23:24].expand(57, -1, -1, -1)])
        write(root / "bad" / f"{i}.mp4", stopped, toy.caption(world), **tags)
    return root


def test_a_toys_report_is_judged_by_the_truth(continued, evaluate, capsys):
    folders = continued / "bad", continued / "good"
    _, summary = evaluate(*folders, toy=True, real=str(continued / "good"), stride=2)
    assert list(summary["mean"]) == ["bad", "good", "frozen", "truth"]
    survived = {method: row["survival"]["score"] for method, row in summary["mean"].items()}
    assert survived["good"] == survived["truth"] == 81 / 16
    assert 0.5 < survived["frozen"] < 1.9
    assert survived["bad"] == pytest.approx(survived["frozen"] + 15 / 16, abs=0.15)
    assert summary["median"]["good"] == {"seconds": 81 / 16, "at_least": True, "end": 81 / 16, "videos": 6}
    assert not summary["median"]["bad"]["at_least"]
    good, bad, frozen = ({name: row["last"] for name, row in summary["mean"][method].items()}
                         for method in ("good", "bad", "frozen"))
    assert good["right"] == good["survival"] == 1 > bad["right"]
    assert good["place"] < 0.7 < 3 < bad["place"] and good["psnr"] > 40 > bad["psnr"]
    assert bad["sprite"] == bad["shape"] == good["direction"] == 1 > frozen["direction"]
    curves = np.load("report/curves.npz")
    time, alive = curves["bad/0.mp4/survival"]
    assert alive.tolist() == (time / 16 < summary["videos"][0]["metrics"]["survival"]["score"]).tolist()
    printed = capsys.readouterr().out
    lines = summary["findings"]
    assert "\n".join(lines) in printed and printed.rstrip().endswith(lines[-1])
    assert Path("report/table.md").read_text().startswith(lines[0])
    text = html.unescape(Path("report/report.html").read_text())
    assert 0 < text.index(lines[0]) < text.index(lines[-1]) < text.index("<table")
    assert re.fullmatch(r"Sprites are right for > 5.1 s \(good\), \d\.\d s \(bad\), \d\.\d s \(a still "
                        r"picture\), > 5.1 s \(the truth\) \(medians\)\.", lines[0])
    assert lines[1].startswith("good's are right for longer than bad's: +2.")
    assert lines[2].startswith("good's are right for longer than a still picture's: +3.")
    assert "(bad)" in lines[3] and lines[4].endswith("0 % (a still picture), 100 % (the truth) of moments.")
    assert "0 % (a still picture) of the truth's speed" in lines[5]


def test_what_the_controls_are(continued, evaluate):
    evaluate(continued / "good", toy=True)
    for i in (0, 5):
        start, frozen, truth = (read_video(path) for path in (
            continued / f"starts/{i:05d}.mp4", f"report/controls/frozen/{i}.mp4",
            f"report/controls/truth/{i}.mp4"))
        assert len(frozen) == len(truth) == 81
        assert readings.psnr(frozen[:9], start).min() > 24 < readings.psnr(truth[:9], start).min()
        assert readings.psnr(frozen[9:], frozen[8:9]).min() > 35
        exact = data.to_uint8(toy.render(toy.draw_world("starts", i), 81))
        assert readings.psnr(truth, exact).min() > 23
        tags = data.read_tags(f"report/controls/truth/{i}.mp4")
        assert readings.origin_of(tags) == ("starts", i, 0, 9) and tags["seed"] == 0
    made = identity(Path("report/controls"))
    shutil.copytree(continued / "good", "shorter")
    world = toy.draw_world("starts", 0)
    write(Path("shorter/0.mp4"), toy.render(world, 49), toy.caption(world), **{
        "extend": str(continued / "starts/00000.mp4"), "seed": 0})
    _, summary = evaluate("shorter", toy=True)
    again = identity(Path("report/controls"))
    changed = {path.name for path, file in again.items() if path.suffix and made[path] != file}
    assert changed == {"0.mp4"} and len(read_video("report/controls/truth/0.mp4")) == 49
    assert [v["frames"] for v in summary["videos"] if v["method"] == "truth"] == [49, 81, 81, 81, 81, 81]


def test_worlds_that_are_unknown_are_judged_by_their_first_chunk(evaluate, tmp_path, capsys):
    for i in range(3):
        world = toy.draw_world("unknown", i)
        write(tmp_path / f"v/{i}.mp4", toy.render(world, 49), toy.caption(world))
    _, summary = evaluate("v", toy=True)
    assert list(summary["mean"]) == ["v"] and summary["findings"] == [] and summary["median"] == {"v": None}
    assert not summary["metrics"].keys() & {"survival", "right", "place", "psnr"}
    assert summary["mean"]["v"]["sprite"]["score"] == 1 and summary["mean"]["v"]["colour"]["last"] < 6
    assert "of 3 videos the tags do not say which world" in capsys.readouterr().out
    with pytest.raises(UserError, match="frozen and truth are the controls' names"):
        evaluate("frozen=v", toy=True)


def found(interval, prompts=6, seconds=(2.0, 6.0), order=("DF", "R3")):
    """What is found about R3 beside DF, from the interval of their difference."""
    def gap(interval):
        return {"b_minus_a": {"survival": {"score": interval and {"interval": interval, "prompts": prompts}}}}

    methods = (*order, "frozen", "truth")
    medians = dict(zip(methods, (*seconds, 1.25, 8), strict=True))
    speeds = dict(zip(methods, (0.5, 0.45, 0.0, 0.5), strict=True))
    pairs = {(order[0], order[1]): gap(interval), (order[1], "frozen"): gap([-1.0, -1.5, -0.5])}
    return page.findings({
        "mean": {m: {"speed": {"last": v}, "direction": {"last": 2 * v}} for m, v in speeds.items()},
        "median": {m: {"seconds": s, "at_least": s == 8, "end": 8.06} for m, s in medians.items()},
        "paired": [{"a": a, "b": b} | pair for (a, b), pair in pairs.items()],
        "frechet": {m: [1, 2, 3, 4, i] for i, m in enumerate(methods)}})


def test_findings_say_no_more_than_the_numbers():
    survived, *compared, distance, direction, motion = found([4.0, 2.5, 5.5])
    assert survived == (
        "Sprites are right for 6.0 s (R3), 2.0 s (DF), 1.2 s (a still picture), > 8.1 s (the truth) "
        "(medians).")
    assert compared == [
        "R3's are right for longer than DF's: +4.0 s on average over 6 prompts (95 % interval +2.5 to +5.5).",
        "R3's are right for longer than a still picture's: +1.0 s on average over 6 prompts "
        "(95 % interval +0.5 to +1.5)."]
    assert distance == (
        "In the last fifth the Frechet distance to real windows of frames is 1.0 (R3), 0.0 (DF), "
        "2.0 (a still picture), 3.0 (the truth).")
    assert direction == ("In the last fifth sprites move as told in 90 % (R3), 100 % (DF), 0 % (a still "
                         "picture), 100 % (the truth) of moments.")
    assert motion == (
        "In the last fifth pixels move at 90 % (R3), 100 % (DF), 0 % (a still picture) of the truth's speed.")
    assert found([-4.0, -5.5, -2.5])[1].startswith("R3's are right for shorter than DF's: -4.0 s")
    assert found([0.4, -0.5, 1.3])[1] == (
        "R3's are right for neither longer nor shorter than DF's, as far as this shows: +0.4 s on average "
        "over 6 prompts (95 % interval -0.5 to +1.3).")
    for few in (found([4.0, 2.5, 5.5], prompts=4)[1], found(None)[1]):
        assert few == "Too few prompts are common to R3 and DF to compare them."


def test_measures_that_reward_stillness_are_marked():
    report = report_of(
        A={"saturation": 0.2, "contrast": 0.1}, B={"saturation": 0.1, "contrast": 0.2},
        frozen={"saturation": 0.0, "contrast": 0.3}, truth={"saturation": -0.05, "contrast": 0.0})
    gap = {"log_ratio": {"interval": [1.0, 0.5, 1.5], "prompts": 9}}
    report["paired"] = [{"a": "A", "b": method, "pairs": 9, "prompts": 9, "b_minus_a": {
        "saturation": gap, "contrast": gap}} for method in ("B", "frozen", "truth")]
    report["frechet"] = {m: row for m, row in zip(report["mean"], (
        [3, 3, 3, 3, 3], [4, 4, 4, 4, 4], [2, 9, 9, 9, 9], [3, 3, 3, 3, 3]), strict=True)}
    _, change, _, frechet, paired = page.make_tables(report)
    assert change.heads == ["Method", "saturation †", "contrast"] and change.note.endswith(page.STILL)
    saturation, contrast = list(zip(*change.rows, strict=True))[1:]
    assert saturation == ("x1.22 (1%)", "x1.11 (1%)", "x1.00 (1%)", "x0.95 (1%)"), "none is bold"
    assert contrast == ("**x1.11 (1%)**", "x1.22 (1%)", "x1.35 (1%)", "x1.00 (1%)"), "not even the truth"
    assert frechet.heads == ["Method", "0-20 % †", "20-40 %", "40-60 %", "60-80 %", "80-100 %"]
    assert paired.rows[0] == ["log ratio of saturation †", *["+1.00 [0.50, 1.50]"] * 3]
    assert paired.rows[1] == ["log ratio of contrast", *["**+1.00 [0.50, 1.50]**"] * 3]


# --------------------------------------------------------------------------------- VBench's result file

def vbench_file(folder, names=("0", "1", "2"), **dimensions):
    paths = [f"/elsewhere/{folder}/{name}.mp4" for name in names]
    results = {dim: [0.5, [{"video_path": path, "video_results": value}
                           for path, value in zip(paths, values, strict=True)]]
               for dim, values in dimensions.items()}
    Path("results.json").write_text(json.dumps(results))
    return ("results.json",)


def test_vbenchs_own_scores(videos, evaluate):
    given = vbench_file("kept", imaging_quality=[60.0, 62.0, 64.0], aesthetic_quality=[0.5, 0.5, 0.56],
                        dynamic_degree=[True, False, True], motion_smoothness=[0.98, 0.98, 0.98])
    _, summary = evaluate(videos / "kept", videos / "drifted", vbench=given)
    kept = summary["mean"]["kept"]
    assert kept["imaging_quality"] == {"score": 62}
    assert kept["dynamic_degree"]["score"] == pytest.approx(2 / 3)
    assert kept["motion_quality"]["score"] == pytest.approx((98 + 200 / 3) / 2)
    assert kept["frame_quality"]["score"] == pytest.approx((62 + 52) / 2)
    assert "imaging_quality" not in summary["mean"]["drifted"]
    table = Path("report/table.md").read_text().splitlines()
    [row] = [line for line in table if line.startswith("| kept ") and "62.00" in line and "66.67" in line]
    assert [cell.strip(" *") for cell in row.split("|")[2:6]] == ["-", "-", "98.00 (0.00)", "66.67 (33.33)"]


def test_a_vbench_file_that_may_mean_either(videos, evaluate, tmp_path):
    """Two folders of one name: the whole path decides, or the file is refused."""
    shutil.copytree(videos / "kept", tmp_path / "a/v")
    shutil.copytree(videos / "drifted", tmp_path / "b/v")
    given = vbench_file("v", imaging_quality=[1, 2, 3])
    with pytest.raises(UserError, match="a/v/0.mp4 or b/v/0.mp4; rename"):
        evaluate("A=a/v", "B=b/v", vbench=given)
    text = Path("results.json").read_text().replace("/elsewhere", str(tmp_path / "b"))
    Path("results.json").write_text(text)
    _, summary = evaluate("A=a/v", "B=b/v", vbench=given)
    assert summary["mean"]["B"]["imaging_quality"]["score"] == 2
    assert "imaging_quality" not in summary["mean"]["A"]


@pytest.mark.parametrize("given,reason", [
    (dict(folder="kept", temporal_style=[1, 2, 3]), "temporal_style is none of"),
    (dict(folder="other", imaging_quality=[1, 2, 3]), "about none of these videos"),
    (dict(folder="kept", names=["0"], imaging_quality=[1]), "lacks"),
])
def test_a_vbench_file_that_does_not_fit(videos, evaluate, given, reason):
    with pytest.raises(UserError, match=reason):
        evaluate(videos / "kept", vbench=vbench_file(**given))


# -------------------------------------------------------------------------------------------- bad input

def bad(folder: Path, what: str) -> Path:
    path = folder / "bad.mp4"
    video = toy.render(toy.draw_world("bad", 0), 41)
    if what == "size":
        write(path, video.repeat(1, 1, 1, 2))
    elif what == "fps":
        write(path, video, fps=24)
    elif what == "short":
        write(path, video[:2])
    elif what == "truncated":
        write(path, video)
        path.write_bytes(path.read_bytes()[:-3000])
    elif what == "no times":  # a bare stream says nothing of its rate
        write(path, video)
        import av
        with av.open(str(path)) as source, av.open(str(folder / "x.h264"), "w", format="h264") as bare:
            stream = bare.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    bare.mux(packet)
        path.unlink()
        (folder / "x.h264").rename(path)
    elif what == "text":
        path.write_text("no video at all")
    elif what == "empty":
        path.write_bytes(b"")
    return path


@pytest.mark.parametrize("what,reason", [
    ("size", "64x32 at 16 fps, where most of mixed are 32x32 at 16 fps"),
    ("fps", "32x32 at 24 fps, where most"), ("short", "3 are the least"), ("truncated", "truncated"),
    ("no times", "no frame with a time"), ("text", "cannot be read as a video"), ("empty", "is empty")])
def test_what_cannot_be_scored_is_listed(videos, evaluate, tmp_path, capsys, what, reason):
    shutil.copytree(videos / "kept", tmp_path / "mixed")
    for name in ("index.jsonl", "0.txt", "notes.md", ".hidden.mp4"):
        (tmp_path / "mixed" / name).write_text("beside videos")
    path = bad(tmp_path / "mixed", what)
    status, summary = evaluate("mixed")
    assert status == 3 and [v["name"] for v in summary["videos"]] == ["0.mp4", "1.mp4", "2.mp4"]
    assert list(summary["skipped"]) == [path.relative_to(tmp_path).as_posix()]
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped: ")]
    assert "mixed/bad.mp4" in line and reason in line
    assert reason in Path("report/report.html").read_text()
    assert evaluate("mixed", allow_skips=True)[0] is None


def test_damage_found_while_decoding(videos, evaluate, tmp_path, monkeypatch):
    """The same file twice: both are listed, the rest is scored."""
    for folder in ("a", "b"):
        shutil.copytree(videos / "kept", tmp_path / folder)
    read = data.read_frames

    def failing(video, *args):
        for i, frame in enumerate(read(video, *args)):
            if video.path.name == "1.mp4" and i == 40:
                raise UserError(f"{video.path} cannot be read as a video: broken")
            yield frame
    monkeypatch.setattr(data, "read_frames", failing)
    status, summary = evaluate("a", "b")
    assert status == 3 and set(summary["skipped"]) == {"a/1.mp4", "b/1.mp4"} and len(summary["videos"]) == 4


def test_folders_that_cannot_be_scored(videos, evaluate, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no video can be scored: empty holds no videos"):
        evaluate("empty")
    status, summary = evaluate(videos / "kept", "empty")
    assert status == 3 and summary["skipped"] == {"empty": "holds no videos"} and len(summary["videos"]) == 3
    with pytest.raises(UserError, match="no such folder of videos: nowhere"):
        evaluate(videos / "kept", "nowhere")
    with pytest.raises(UserError, match="two folders are called kept"):
        evaluate(videos / "kept", f"kept={videos}/drifted")
    with pytest.raises(UserError, match="toy world .* is 32x32"):
        write(tmp_path / "wide/a.mp4", torch.zeros(5, 3, 32, 64))
        evaluate("wide", toy=True)
    with pytest.raises(UserError, match="--model and --data go together"):
        evaluate(videos / "kept", model=("m",))
    (tmp_path / "file").write_text("")
    errors = call("eval_drift.py", videos / "kept", "--out", tmp_path / "file" / "report", code=2).stderr
    assert errors.count("\n") == 1 and "file" in errors


def test_where_a_prompt_comes_from(evaluate, tmp_path):
    video = toy.render(toy.draw_world("prompt", 0), 9)
    write(tmp_path / "v/a.mp4", video, prompt="from its tags", seed=4)
    (tmp_path / "v/a.txt").write_text("not this")
    write(tmp_path / "v/b.mp4", video, prompt="")
    (tmp_path / "v/b.txt").write_text("from the text beside it\n")
    write(tmp_path / "v/a cat.mp4", video, prompt="")
    _, summary = evaluate("v")
    assert {v["name"]: (v["prompt"], v["seed"]) for v in summary["videos"]} == {
        "a.mp4": ("from its tags", 4), "b.mp4": ("from the text beside it", None),
        "a cat.mp4": ("a cat", None)}


def test_the_prompts_for_evaluation():
    prompts = (ROOT / "prompts.txt").read_text().splitlines()
    assert len(prompts) == 32 == len({p[:20] for p in prompts})
    assert all(60 < len(p) < 160 and p.endswith(".") and p.isascii() for p in prompts)
