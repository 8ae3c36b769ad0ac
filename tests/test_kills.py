"""Every stage, killed three times and started again by the same command, ends with the same bytes."""

import os
import random
import signal
import subprocess
import time

import pytest
from worlds import ended, start, tree

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
TIMED = "log.jsonl"  # times of steps


def begin(stage, folder):
    return start(stage, *STAGES[stage].split(), cwd=folder, start_new_session=True, stdout=subprocess.DEVNULL)


def bytes_of(folder) -> dict:
    return {name: content for name, content in tree(folder).items() if not name.endswith(TIMED)}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1))
def test_three_kills_of_every_stage(tmp_path, seed):
    run = tmp_path / "run"
    chance = random.Random(seed)
    took = {}
    kills = 0
    run.mkdir()
    for stage in STAGES:
        began = time.monotonic()
        ended(begin(stage, run))
        took[stage] = time.monotonic() - began
    expected = bytes_of(run)
    run.rename(tmp_path / "whole")
    run.mkdir()
    for stage in STAGES:
        for part in (0.35, 0.6, 0.85):  # what was done is kept, so that later ones may find it finished
            process = begin(stage, run)
            time.sleep(chance.uniform(0.8, 1.1) * part * took[stage])
            if process.poll() is None:
                kills += 1
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        ended(begin(stage, run))
    again = bytes_of(run)
    assert again.keys() == expected.keys(), "also: nothing is left of what was killed"
    assert [name for name in again if again[name] != expected[name]] == []
    assert kills >= 14, f"only {kills} of 21 kills met a running process"
    print(f"{kills} kills, {len(again)} files")
