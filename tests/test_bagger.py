"""The whole method by its script, at the sizes of QUICK=1: it ends, whatever happens on the way."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data

SCRIPT = Path(__file__).parent.parent / "bagger.sh"


def start(out, **more):
    """bagger.sh, in a process group of its own."""
    env = dict(QUICK="1", PYTHON=sys.executable, OUT=str(out), OMP_NUM_THREADS="1") | more
    return subprocess.Popen(["bash", str(SCRIPT)], env=os.environ | env, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True)


def kill(process):
    """It and all it has started, torchrun's workers too, which have groups of their own."""
    listed = subprocess.run(["ps", "-eo", "pid,sid"], capture_output=True, text=True).stdout.split("\n")[1:]
    for pid, session in (map(int, line.split()) for line in listed if line.strip()):
        if session == process.pid:
            os.kill(pid, signal.SIGKILL)
    process.wait()


def bytes_of(out) -> dict:
    """What must not depend on how often it was interrupted: models, clips and indices, videos."""
    kinds = (".safetensors", ".mp4", "index.jsonl", "config.json", "prompts.jsonl")
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(Path(out).rglob("*"))
            if p.name.endswith(kinds) and "scores" not in p.parts}


SPY = """
import atexit, pathlib, sys
def look():
    if any("gloo" in task.read_text() for task in pathlib.Path("/proc/self/task").glob("*/comm")):
        print("left behind by", *sys.argv)
atexit.register(look)
"""


def test_the_method_by_one_command(tmp_path):
    out, spy = tmp_path / "run", tmp_path / "spy"
    spy.mkdir()
    (spy / "sitecustomize.py").write_text(SPY)
    process = start(out, NPROC="1", STEPS="2")
    while not (out / "model_0" / "log.jsonl").exists():  # stopped in the middle of a training
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    kill(process)
    process = start(out, NPROC="1", STEPS="2", PYTHONPATH=str(spy))
    told, _ = process.communicate()
    assert process.returncode == 0, told
    assert "learnt nothing" in told
    assert "left behind" not in told, "a thread of gloo's that outlives Python may abort the process"
    for stage in ("a toy world", "seed data", "the toy's base model", "train model_0", "roll model_0 out",
                  "play the rollouts backwards", "train model_1", "videos of 6 s from model_1", "drift"):
        assert f"== {stage}" in told or f": {stage}" in told, stage
    assert json.loads((out / "model_1/config.json").read_text())["step"] == 2
    clips = data.Clips(out / "agg_1")
    assert list(clips.kinds) == ["seed"] * 12 + ["corrective"] * 6
    assert all(clips.load(i)["latents"].shape == (21, 16, 4, 4) for i in range(18))
    assert sum(1 for _ in (out / "agg_1/clips").iterdir()) == 6, "nothing was copied"
    summary = json.loads((out / "report/summary.json").read_text())
    assert list(summary["mean"]) == ["DF", "R1"] and len(summary["videos"]) == 16
    assert (out / "report/report.html").exists() and (out / "rollout_0/preview.png").exists()


@pytest.mark.slow
def test_killed_ten_times_it_ends_with_the_same_bytes(tmp_path):
    out, chance = tmp_path / "run", random.Random(0)
    process = start(out)
    began = time.monotonic()
    told, _ = process.communicate()
    assert process.returncode == 0, told
    took = time.monotonic() - began
    reference = bytes_of(out)
    assert len(reference) > 60
    out.rename(tmp_path / "reference")
    for _ in range(10):
        process = start(out)
        time.sleep(chance.uniform(0.05, 0.35) * took)
        kill(process)
        print(sorted(p.name for p in out.iterdir()))
    process = start(out)
    told, _ = process.communicate()
    assert process.returncode == 0, told
    again = bytes_of(out)
    assert again.keys() == reference.keys()
    assert [name for name in again if again[name] != reference[name]] == []


@pytest.mark.parametrize("more,message", [
    (dict(WAN="nowhere", VIDEOS="nowhere"), "no such folder: nowhere"),
    (dict(OUT="/proc/run"), "/proc/run"),
])
def test_refusals(tmp_path, more, message):
    process = start(tmp_path / "run", **more)
    told, _ = process.communicate()
    assert process.returncode and message in told
