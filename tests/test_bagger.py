"""bagger.sh: the whole method at the sizes of QUICK=1, kills, its commands, and the environment it makes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from worlds import ROOT, ended, tree, wait_until

import data

SCRIPT = ROOT / "bagger.sh"


def start(out, **more):
    """bagger.sh, in a process group of its own."""
    env = dict(QUICK="1", PYTHON=sys.executable, OUT=str(out), OMP_NUM_THREADS="1") | more
    return subprocess.Popen(["bash", str(SCRIPT)], env=os.environ | env, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True)


def kill(process):
    """Kills it and all it has started, torchrun's workers too, which have process groups of their own."""
    listed = subprocess.run(["ps", "-eo", "pid,sid"], capture_output=True, text=True).stdout.split("\n")[1:]
    for pid, session in (map(int, line.split()) for line in listed if line.strip()):
        if session == process.pid:
            os.kill(pid, signal.SIGKILL)
    process.wait()


def bytes_of(out) -> dict:
    """What must not depend on how often it was interrupted: models, clips and indices, videos."""
    kinds = (".safetensors", ".mp4", "index.jsonl", "config.json", "prompts.jsonl")
    return {path: content for path, content in tree(out).items()
            if path.endswith(kinds) and "scores" not in Path(path).parts}


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
    wait_until((out / "model_0" / "log.jsonl").exists, process)  # stopped in the middle of a training
    kill(process)
    printed = ended(start(out, NPROC="1", STEPS="2", PYTHONPATH=str(spy))).stdout
    assert "learnt nothing" in printed
    assert "left behind" not in printed, "a thread of gloo's that outlives Python may abort the process"
    for stage in ("a toy world", "seed data", "train model_0", "roll model_0 out",
                  "play the rollouts backwards", "train model_1", "videos of 6 s from model_1", "drift"):
        assert f"== {stage}" in printed or f": {stage}" in printed, stage
    assert json.loads((out / "model_1/config.json").read_text())["step"] == 2
    clips = data.Clips(out / "agg_1")
    assert list(clips.kinds) == ["seed"] * 12 + ["corrective"] * 6
    assert all(clips.load(i)["latents"].shape == (21, 16, 4, 4) for i in range(18))
    assert sum(1 for _ in (out / "agg_1/clips").iterdir()) == 6, "nothing was copied"
    summary = json.loads((out / "report/summary.json").read_text())
    assert list(summary["mean"]) == ["DF", "R1", "frozen", "truth"] and len(summary["videos"]) == 36
    assert (out / "report/report.html").exists() and (out / "rollout_0/preview.png").exists()


@pytest.mark.slow
def test_killed_ten_times_it_ends_with_the_same_bytes(tmp_path):
    out = tmp_path / "run"
    chance = random.Random(0)
    began = time.monotonic()
    ended(start(out))
    took = time.monotonic() - began
    reference = bytes_of(out)
    assert len(reference) > 60
    out.rename(tmp_path / "reference")
    for _ in range(10):
        process = start(out)
        time.sleep(chance.uniform(0.05, 0.35) * took)
        kill(process)
        print(sorted(p.name for p in out.iterdir()))
    ended(start(out))
    again = bytes_of(out)
    assert again.keys() == reference.keys()
    assert [name for name in again if again[name] != reference[name]] == []


@pytest.mark.parametrize("more,message", [
    (dict(WAN="nowhere", VIDEOS="nowhere"), "no such folder: nowhere"),
    (dict(WAN=str(SCRIPT), VIDEOS="nowhere"), "no such folder: "),
    (dict(WAN="tests"), "VIDEOS is missing"),
    (dict(OUT="/proc/run"), "/proc/run"),
])
def test_refusals(tmp_path, more, message):
    printed = ended(start(tmp_path / "run", **more), code=2).stdout
    assert message in printed and len(printed.splitlines()) < 5


# ----------------------------------------------------------------------------------------------------
# the commands: a stand-in for python records them

STAND_IN = """#!/bin/sh
if [ "$1" = -c ]; then echo 1; exit; fi
(printf '%s\\037' "$PET_RDZV_ENDPOINT:$PET_MASTER_PORT" "$@"; echo) >> "$RECORD"
"""


def recorded(tmp_path, **more) -> list[list[str]]:
    """[where torchrun's processes meet, argument, ...] of every command, but for the scripts' folder."""
    python, record = tmp_path / "python", tmp_path / "record"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    record.write_text("")
    env = {k: v for k, v in os.environ.items() if not k.startswith("PET_")}
    env |= dict(PYTHON=str(python), RECORD=str(record), OUT=str(tmp_path / "the run")) | more
    ended(subprocess.Popen(["bash", str(SCRIPT)], env=env, cwd=ROOT, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True))
    lines = record.read_text().replace(f"{ROOT}/", "").split("\x1f\n")[:-1]
    return [line.split("\x1f") for line in lines]


TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node"]
REAL = dict(WAN="tests", VIDEOS="my clips", ROUNDS="2")
STAGES = {  # which variable is for which stage, and the flag by which the plan gets it
    "PREPARE": ("prepare.py", "--prepare=--x 1 --yes"),
    "TRAIN": ("train_df.py", "--train=--x 1 --yes --steps 16000"),
    "ROLLOUT": ("rollout.py", "--rollout= --x 1 --yes"),
    "AGGREGATE": ("aggregate.py", "--aggregate=--x 1 --yes"),
    "SAMPLE": ("sample.py", "--sample= --x 1 --yes"),
    "EVAL": ("eval_drift.py", "--eval=--x 1 --yes"),
}


def test_the_commands_of_a_real_run(tmp_path):
    plan, *commands = recorded(tmp_path, **REAL, NPROC="8")
    assert plan[1:3] == ["bench.py", "plan"] and "--baselines" in plan
    assert all(command[1:5] == [*TORCHRUN, "8"] for command in commands)
    assert all(command[0].startswith("localhost:0:") for command in commands), "any port, so that two can run"
    again = ["rollout.py", "aggregate.py", "train_df.py"]
    assert [command[5] for command in commands] == [
        "prepare.py", "train_df.py", *again, *again, *["sample.py"] * 5, "eval_drift.py"]
    assert commands[0][6:] == ["--videos", "my clips", "--wan", "tests", "--out", f"{tmp_path}/the run/agg_0",
                               "--seed", "0"]
    assert commands[4][6:] == ["--data", f"{tmp_path}/the run/agg_1", "--init", "tests", "--out",
                               f"{tmp_path}/the run/model_1", "--steps", "16000", "--seed", "0"]
    samples = [command[command.index("--seed") + 2:] for command in commands if command[5] == "sample.py"]
    assert samples == [[], ["--context-noise", "0.2"], ["--history-guidance", "1.2"], [], []]
    names = [method.rpartition("=")[0] for method in commands[-1][6:commands[-1].index("--out")]]
    assert names == ["DF", "DF (sigma_test = 0.2)", "History Guidance", "R1", "R2"]
    assert not {"--toy", "--real"} & set(commands[-1])


def test_the_papers_two_other_rows_can_be_left_out(tmp_path):
    commands = recorded(tmp_path, **REAL, BASELINES="")
    assert sum("sample.py" in command for command in commands) == 3 and "--baselines" not in commands[0]
    for more, count in (dict(QUICK="1"), 2), (dict(QUICK="1", BASELINES="1"), 4):
        assert sum("sample.py" in command for command in recorded(tmp_path, **more)) == count


@pytest.mark.parametrize("variable", STAGES)
@pytest.mark.parametrize("run", [REAL, dict(QUICK="1")])
def test_each_stage_takes_flags_of_its_own(variable, run, tmp_path):
    stage, flag = STAGES[variable]
    plan, *commands = recorded(tmp_path, **run, **{variable: "--x 1 --yes"})
    for command in commands:
        assert (" --x 1 --yes" in " ".join(command)) == ("--yes" in command) == (stage in command), command
    assert run is not REAL or [word for word in plan if "--yes" in word] == [flag]


def test_flags_for_both_stages_that_generate(tmp_path):
    plan, *commands = recorded(tmp_path, **REAL, MAKE="--x 1", ROLLOUT="--y", SAMPLE="--z")
    assert {"--rollout=--x 1 --y", "--sample=--x 1 --z"} <= set(plan)
    for command in commands:
        made = {"rollout.py": " --x 1 --y", "sample.py": " --x 1 --z"}.get(command[5])
        assert made in " ".join(command) if made else "--x" not in command, command


def test_two_nodes_of_one_process(tmp_path):
    nodes = [recorded(tmp_path, **REAL, NPROC="1", PET_NNODES="2", PET_NODE_RANK=rank) for rank in "01"]
    (plan, *first), second = nodes
    assert "bench.py" in plan and plan[plan.index("--nodes") + 1] == "2"
    assert first == second, "all the rest both do, through torchrun and at the same ports"
    assert all(command[1:5] == [*TORCHRUN, "1"] for command in first)
    assert len({command[0] for command in first}) == len(first), "a port for each stage"
    assert all(command[0].startswith(":") for command in first), "at the other machine's address"
    assert not any("torch.distributed.run" in word for command in recorded(tmp_path, **REAL, NPROC="1")
                   for word in command), "one process alone needs none"

    toys = [recorded(tmp_path, QUICK="1", NPROC="1", PET_NNODES="2", PET_NODE_RANK=rank) for rank in "01"]
    alone = [command[1] for command in toys[0] if command not in toys[1]]
    assert alone == ["toy.py"]
    assert [command for command in toys[0] if command in toys[1]] == toys[1]


# ----------------------------------------------------------------------------------------------------
# the environment: stand-ins for python3 and pip

MAKES_VENV = """#!/bin/sh
mkdir -p "$3/bin"
cp "$STAND_IN" "$3/bin/python"
"""
INSTALLS = """#!/bin/sh
if [ "$1" = -m ] && [ "$2" = pip ]; then echo installed >> "$RECORD"; exit "$PIP"; fi
if [ "$1" = -c ]; then echo 1; fi
"""


@pytest.fixture
def fresh(tmp_path):
    """A function that starts bagger.sh in a fresh copy of its own; how often pip ran is in `record`."""
    for name in ("bagger.sh", "requirements.txt"):
        shutil.copy(SCRIPT.with_name(name), tmp_path)
    (tmp_path / "bin").mkdir()
    for path, text in (tmp_path / "bin" / "python3", MAKES_VENV), (tmp_path / "stand_in", INSTALLS):
        path.write_text(text)
        path.chmod(0o755)

    started = []

    def start(**more):
        env = {k: v for k, v in os.environ.items() if k != "PYTHON" and not k.startswith("PET_")}
        env |= dict(PATH=f"{tmp_path / 'bin'}:{env['PATH']}", STAND_IN=str(tmp_path / "stand_in"), QUICK="1",
                    RECORD=str(tmp_path / "record"), OUT=str(tmp_path / "run"), PIP="0") | more
        started.append(subprocess.Popen(["bash", str(tmp_path / "bagger.sh")], env=env, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        return started[-1]
    yield start
    for process in started:  # one that failed its test may wait for ever
        process.kill()


def test_a_broken_install_is_finished_by_the_next_start(fresh, tmp_path):
    for pip, code, count, made in ("1", 1, 1, True), ("1", 1, 2, True), ("0", 0, 3, True), ("1", 0, 3, False):
        process = fresh(PIP=pip)
        printed, _ = process.communicate(timeout=60)
        assert (process.returncode, "== making" in printed) == (code, made), printed
        assert len((tmp_path / "record").read_text().splitlines()) == count, "what is whole is left alone"
    with open(tmp_path / "requirements.txt", "a") as f:
        f.write("one-more\n")
    assert "== making" in fresh().communicate(timeout=60)[0], "other requirements, another install"
    assert "== making" not in fresh(PYTHON="true").communicate()[0]


def test_one_node_makes_the_environment(fresh, tmp_path):
    second = fresh(PET_NNODES="2", PET_NODE_RANK="1")
    assert "waiting for node 0" in second.stdout.readline()
    assert not (tmp_path / ".venv").exists() and not (tmp_path / "record").exists()
    for pip in "10":
        fresh(PET_NNODES="2", PET_NODE_RANK="0", PIP=pip).communicate()
        time.sleep(0.5)
        assert pip == "0" or second.poll() is None, "python is there, but its packages are not"
    printed, _ = second.communicate(timeout=60)
    assert second.returncode == 0 and "== done" in printed and "== making" not in printed, printed
