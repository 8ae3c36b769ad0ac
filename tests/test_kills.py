"""Every stage, killed three times and started again by the same command, ends with the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SAMPLING = "--steps 2 --guidance 3 --batch 3 "  # batches that a kill finds half done
STAGES = {
    "toy.py": "--clips 10 --starts 7",
    "prepare.py": "--videos toy/videos --wan toy/wan --out agg_0",
    "train_df.py": "--data agg_0 --batch 4 --micro 2 --steps 30 --save-every 3 --held-out 2 --ema 0.9 "
                   "--eval-every 10 --preview-every 15 --log-every 1",
    "rollout.py": "--model model_0 --count 8 " + SAMPLING,
    "aggregate.py": "--rollouts rollout_0",
    "sample.py": "--model model_0 --prompts toy/prompts.jsonl --seconds 8 " + SAMPLING,
    "eval_drift.py": "videos --toy --stride 1 --real toy/videos --model model_0 --data agg_0 --clips 2 "
                     "--held-out 2 --steps 1"}
TIMED = ("log.jsonl", ".metadata", ".distcp")  # times of steps; DCP's own files, in which order varies


def start(stage, folder):
    return subprocess.Popen([sys.executable, str(ROOT / stage), *STAGES[stage].split()], cwd=folder,
                            env=os.environ | {"OMP_NUM_THREADS": "2"}, start_new_session=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(stage, folder):
    process = start(stage, folder)
    _, errors = process.communicate()
    assert process.returncode == 0, f"{stage}: {errors}"


def tree(folder) -> dict:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and not p.name.endswith(TIMED)}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1))
def test_three_kills_of_every_stage(tmp_path, seed):
    run, chance, took, kills = tmp_path / "run", random.Random(seed), {}, 0
    run.mkdir()
    for stage in STAGES:
        began = time.monotonic()
        finish(stage, run)
        took[stage] = time.monotonic() - began
    expected = tree(run)
    run.rename(tmp_path / "whole")
    run.mkdir()
    for stage in STAGES:
        for part in (0.35, 0.6, 0.85):  # what was done is kept, so that later ones may find it finished
            process = start(stage, run)
            time.sleep(chance.uniform(0.8, 1.1) * part * took[stage])
            kills += process.poll() is None
            os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
            process.communicate()
        finish(stage, run)
    again = tree(run)
    assert again.keys() == expected.keys(), "also: nothing is left of what was killed"
    assert [name for name in again if again[name] != expected[name]] == []
    assert kills >= 14, f"only {kills} of 21 kills met a running process"
    print(f"{kills} kills, {len(again)} files")
