"""Faults on real stages of a toy run, and a table of what became of them; bash tests/faults.sh starts it.

Kills, two starts and ranks are processes of their own. What is tried on files and disks runs in forks of this
process, which has imported all that a stage needs: a tenth of a second each. Nothing is faked.
"""

import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from pathlib import Path

import torch  # noqa: F401
from worlds import ENV, ROOT, tree

import bench  # noqa: F401  # imports all stages

STAGES = {  # its flags and its folder, in the order of a run
    "toy.py": ("--clips 6 --starts 3", "toy"),
    "prepare.py": ("--videos toy/videos --wan toy/wan --out agg_0", "agg_0"),
    "train_df.py": ("--data agg_0 --batch 2 --steps 8 --save-every 2 --held-out 2 --ema 0.9 --eval-every 4 "
                    "--preview-every 0 --log-every 1", "model_0"),
    "rollout.py": ("--model model_0 --count 3 --steps 1 --guidance 1 --batch 2 --held-out 2", "rollout_0"),
    "aggregate.py": ("--rollouts rollout_0", "agg_1"),
    "sample.py": ("--model model_0 --prompts toy/prompts.jsonl --seconds 4 --steps 1 --guidance 1 --batch 2",
                  "videos"),
    "eval_drift.py": ("videos --toy --real toy/videos", "report")}
IGNORED = re.compile(r"log\.jsonl$|train/step-\d+-damaged")  # times of steps; what was put aside
# files that a stage reads, its own included where it goes on. checked: a changed one is noticed
READ = [("prepare.py", "toy/videos/*.mp4", False), ("prepare.py", "toy/videos/*.txt", False),
        ("prepare.py", "toy/wan/*.safetensors", False), ("prepare.py", "toy/wan/google/*/*", False),
        ("prepare.py", "agg_0/clips/*", False),
        ("prepare.py", "agg_0/meta.json", False), ("train_df.py", "agg_0/index.jsonl", False),
        ("train_df.py", "agg_0/meta.json", False), ("train_df.py", "agg_0/clips/*", True),
        ("train_df.py", "agg_0/empty.safetensors", False), ("train_df.py", "model_0/train/*/*", True),
        ("train_df.py", "model_0/run.json", False), ("train_df.py", "model_0/log.jsonl", False),
        ("train_df.py", "model_0/.bagger.json", False), ("rollout.py", "model_0/*.safetensors", False),
        ("rollout.py", "model_0/config.json", False), ("aggregate.py", "rollout_0/clips/*", True),
        ("aggregate.py", "rollout_0/*.json*", False), ("aggregate.py", "agg_0/index.jsonl", False),
        ("sample.py", "toy/prompts.jsonl", False), ("sample.py", "toy/starts/*.mp4", False),
        ("eval_drift.py", "videos/*.mp4", False), ("eval_drift.py", "report/scores/*", False)]

base = Path(tempfile.mkdtemp(prefix="faults-"))
run, whole, of_two = base / "run", base / "whole", base / "of two ranks"  # run: paths are recorded in files
counts = defaultdict(Counter)  # {(fault, stage): {"injected": n, what became of it: n}}
failures = []


def note(fault: str, stage: str, outcome: str, good: bool, detail=""):
    counts[fault, stage].update({"injected": 1, outcome if good else "FAILED": 1})
    if not good:
        detail = str(detail).strip()[-800:].replace("\n", "\n    ")
        failures.append(f"{fault}, {stage}: {outcome}\n    {detail}")
        print(failures[-1], flush=True)


# ----------------------------------------------------------------------------------------------------
# stages: as processes, and in forks

def command(stage: str) -> list[str]:
    return [sys.executable, str(ROOT / stage), *STAGES[stage][0].split()]


def process(stage: str, **env) -> subprocess.Popen:
    return subprocess.Popen(command(stage), cwd=run, env=ENV | env, start_new_session=True, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def forked(stage: str, before=lambda: None, seconds: float = 60) -> tuple[int | str, str]:
    """(exit code or "hangs", what it said) of a stage in a fork; before() is called there first."""
    reading, writing = os.pipe()  # no file, which would have a limit too; it holds 64 KB
    with os.fdopen(reading, errors="replace") as said:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.setsid()
                os.chdir(run)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(writing, 2)
                sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)
                sys.argv = command(stage)[1:]
                before()
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.close(writing)
        deadline = time.monotonic() + seconds
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.005)
        if not ended[0]:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(ended[1]) if ended[0] else "hangs", said.read()


def begin(stage: str, source: Path = whole, keep=False):
    """run/ as it is before a stage or, with keep, after it, from a whole run."""
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(source, run, symlinks=True)
    names = list(STAGES)
    for later in names[names.index(stage) + keep:]:
        shutil.rmtree(run / STAGES[later][1], ignore_errors=True)


def made(stage: str, folder: Path = run) -> dict:
    files = tree(folder / STAGES[stage][1])  # of none, if there is no folder
    return {name: content for name, content in files.items() if not IGNORED.search(name)}


def difference(stage: str, source: Path = whole, but: str = "") -> str:
    """In what a stage's folder is not as in a whole run, but for a file."""
    ours, expected = made(stage), made(stage, source)
    other = [name for name in sorted(ours.keys() | expected.keys())
             if name != but and ours.get(name, "absent") != expected.get(name, "absent")]
    return ", ".join(other[:5] + ["..."] * (len(other) > 5))


def is_line(said: str) -> bool:
    return 0 < len(said.splitlines()) <= 3 and "Traceback" not in said


def goes_on(fault: str, stage: str, source: Path = whole, **env):
    """The same command again, undisturbed, must end as if nothing had been."""
    again = process(stage, **env)
    said = again.communicate()[1]
    other = difference(stage, source)
    note(fault, stage, "equal after a restart", again.returncode == 0 and not other,
         f"ended with {again.returncode}, differs in {other or 'nothing'}: {said}")


# ----------------------------------------------------------------------------------------------------
# the faults

def kills(stage: str, took: float, chance, per_restart: int = 3):
    """Some kills at random moments, start-up included; then a restart to the end."""
    begin(stage)
    for _ in range(per_restart):
        victim = process(stage)
        time.sleep(chance.uniform(0, took))
        met = victim.poll() is None
        if met:
            os.killpg(victim.pid, signal.SIGKILL)
        victim.communicate()
        note("kill -9", stage, "killed" if met else "was done", True)
    goes_on("restart after kills", stage)


def rank_kill(stage: str, took: float, chance):
    """One of two ranks is killed: the other must end soon, too."""
    begin(stage, of_two)
    victim = process(stage, RANKS="2")
    time.sleep(chance.uniform(0.3, 1) * took)
    children = Path(f"/proc/{victim.pid}/task/{victim.pid}/children")
    ranks = children.read_text().split() if children.exists() else []
    pid = int(chance.choice([*ranks, victim.pid]))
    if victim.poll() is None:
        os.kill(pid, signal.SIGKILL)
    try:
        said = victim.communicate(timeout=60)[1]
        good = victim.returncode in (0, -9) or is_line(said)
        note("one of two ranks killed", stage, "ended by itself", good, said)
    except subprocess.TimeoutExpired:
        os.killpg(victim.pid, signal.SIGKILL)
        note("one of two ranks killed", stage, "the other hangs", False)
    time.sleep(0.2)  # a child dies a moment after its parent
    goes_on("one of two ranks killed", stage, of_two, RANKS="2")


def two_starts(stage: str):
    begin(stage)
    both = [process(stage) for _ in range(2)]
    said = [each.communicate()[1] for each in both]
    codes = sorted(each.returncode for each in both)
    refused = [text for text in said if "is being written by process" in text]
    good = codes == [0, 0] or codes == [0, 2] and len(refused) == 1 and is_line(refused[0])
    other = difference(stage)
    note("two starts at once", stage, "one refused in a line" if refused else "one after the other",
         good and not other, f"{codes}, differs in {other}: {said}")


def limited(stage: str, chance):
    """A limit on the size of files, anywhere within what the stage writes."""
    begin(stage)
    sizes = [len(content) for content in made(stage, whole).values() if content]
    limit = int(chance.choice(sizes) * chance.uniform(0.01, 1.2)) + 1
    code, said = forked(stage, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    full(stage, f"files of {limit} bytes at most", code, said)


def small_disk(stage: str, chance):
    """A disk in memory, smaller than what the stage writes. It grows before the restart."""
    begin(stage)
    out = run / STAGES[stage][1]
    need = sum(-(-len(content) // 4096) * 4096 for content in made(stage, whole).values() if content)
    out.mkdir()
    size = max(4096, int(need * chance.uniform(0, 1)))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", out], check=True)
    try:
        code, said = forked(stage)
        subprocess.run(["mount", "-o", "remount,size=1g", out], check=True)
        full(stage, "small disk", code, said)
    finally:
        subprocess.run(["umount", "-l", out], check=True)


def full(stage: str, fault: str, code, said: str):
    """What must hold of a stage that met a full disk."""
    fault = "disk full" if fault == "small disk" else "file too large"
    left = [name for name in made(stage) if name.endswith(".tmp")]
    good = not left and (code == 0 or code == 2 and is_line(said) and "cannot write" in said)
    note(fault, stage, "said in a line" if code else "had room", good,
         f"ended with {code}, left {left}: {said}")
    code, said = forked(stage)
    other = difference(stage)
    note(fault, stage, "equal after a restart", code == 0 and not other,
         f"ended with {code}, differs in {other}: {said}")


def damage(stage: str, pattern: str, checked: bool, chance):
    """A file cut, emptied or with a flipped bit: refused by its name, made again, or without effect."""
    own = pattern.startswith(STAGES[stage][1] + "/")
    begin(stage, keep=own)
    if own and stage == "train_df.py" and "train/" in pattern:
        (run / "model_0/config.json").unlink()  # not finished
    file = chance.choice(sorted(path for path in run.glob(pattern) if path.is_file()))
    content = bytearray(file.read_bytes())
    how = chance.choice(["cut", "cut", "flipped", "flipped", "flipped", "emptied"])
    place = chance.randrange(len(content))
    if how == "flipped":
        content[place] ^= 1 << chance.randrange(8)
    file.write_bytes(content if how == "flipped" else content[:place] if how == "cut" else b"")
    code, said = forked(stage)
    other = difference(stage, but=file.relative_to(run / STAGES[stage][1]).as_posix() if own else "")
    if code in (0, 3):
        outcome = "other output" if other else "no effect or mended"
        good = not (other and checked)
    else:
        good = code == 2 and is_line(said)
        outcome = "refused by name" if file.name in said else "refused"
    detail = f"{file.relative_to(run)} {how} at {place}: ended with {code}, differs in {other}"
    note(f"{file.suffix or file.name} damaged", stage, outcome, good, f"{detail}: {said}")


# ----------------------------------------------------------------------------------------------------

def whole_run(folder: Path, timed, **env) -> dict[str, float]:
    """An undisturbed run into folder. Returns the seconds of these stages as processes; others are forked."""
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    took = {}
    for stage in STAGES:
        began = time.monotonic()
        if stage in timed:
            ended = process(stage, **env)
            said = ended.communicate()[1]
            code = ended.returncode
        else:
            code, said = forked(stage)
        assert code == 0, said
        took[stage] = time.monotonic() - began
    shutil.copytree(run, folder, symlinks=True)
    return took


def may_mount() -> bool:
    place = base / "mount"
    place.mkdir()
    trial = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4096", "tmpfs", place], capture_output=True)
    return trial.returncode == 0 and subprocess.run(["umount", place]).returncode == 0


def table():
    outcomes = sorted({outcome for row in counts.values() for outcome in row} - {"injected", "FAILED"})
    columns = ["injected", *outcomes, "FAILED"]
    print("\n| fault | stage | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 2) + "|")
    rows = dict(sorted(counts.items())) | {("all", ""): sum(counts.values(), Counter())}
    for (fault, stage), row in rows.items():
        print(f"| {fault} | {stage} | " + " | ".join(str(row[c] or "") for c in columns) + " |")


def main(short: bool, seed: int):
    began = time.monotonic()
    print(f"seed {seed}, in {base}", flush=True)
    chance = random.Random(seed)
    took = whole_run(whole, ["prepare.py"] if short else STAGES)
    mounts = may_mount()
    if not mounts:
        print("no tmpfs may be mounted here: full disks are tried as limits on files alone")
    stages = list(STAGES)
    if short:
        kills("prepare.py", took["prepare.py"], chance, 1)
        two_starts("toy.py")
        for stage in chance.sample(stages, 3):
            limited(stage, chance)
        if mounts:
            small_disk(chance.choice(stages), chance)
        for row in chance.sample(READ, 10):
            damage(*row, chance)
    else:
        took_two = whole_run(of_two, STAGES, RANKS="2")
        for stage in stages:
            for _ in range(17):
                kills(stage, took[stage], chance)
            for _ in range(10 if stage != "toy.py" else 0):
                rank_kill(stage, took_two[stage], chance)
            for _ in range(5):
                two_starts(stage)
            for _ in range(20):
                limited(stage, chance)
                if mounts:
                    small_disk(stage, chance)
            print(f"{stage} has been killed and starved, {time.monotonic() - began:.0f} s", flush=True)
        for row in READ:
            for _ in range(20):
                damage(*row, chance)
    table()
    print(f"\n{len(failures)} failed; {time.monotonic() - began:.0f} s, seed {seed}")
    shutil.rmtree(base)
    return 1 if failures else 0


if __name__ == "__main__":
    words = sys.argv[1:]
    seeds = [int(word) for word in words if word.isdigit()]
    sys.exit(main("short" in words, seeds[0] if seeds else random.randrange(10**6)))
