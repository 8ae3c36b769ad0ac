"""The state of a training and its checkpoints, out/train/step-N; any number of processes can go on from one.

Each rank writes its share of the rows of every tensor, R-of-N.safetensors, and then R-of-N.json with their
checksums. A checkpoint is whole once all N are there; its tensors are the shares one after another. A share
is what FSDP2 leaves on a rank, so sharded and whole copies are stored alike. Nothing in it can be code.
"""

import json
import re
import shutil
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

import common
import model
import records
from common import UserError, print0
from files import write_text


@dataclass
class State:
    """All that a checkpoint holds, beside the network it belongs to."""
    net: model.WanModel
    weights: dict[str, torch.nn.Parameter]  # fp32, this rank's shards where there are several
    optimizer: torch.optim.AdamW
    ema: list[torch.Tensor]
    totals: torch.Tensor  # sums and counts since the last line of the log; see tally in train_df.py
    broken: torch.Tensor  # the first step whose gradient was not finite, or -1
    saving: Future | None = None  # of this rank's share of a checkpoint, on its way to disk


def contents(state: State) -> dict[str, torch.Tensor]:
    groups = {"model": [p.detach() for p in state.weights.values()], "ema": state.ema}
    for key in ("exp_avg", "exp_avg_sq"):
        groups[key] = [state.optimizer.state[p][key] for p in state.weights.values()]
    named = {f"{group}.{name}": x for group, tensors in groups.items()
             for name, x in zip(state.weights, tensors, strict=False)}
    return named | {"totals": state.totals}


def rows(x, rank: int, world: int) -> tuple[int, int]:
    """The first row of a rank's share, and the one behind it: torch.chunk's, as in FSDP2."""
    each = -(-len(x) // world)
    return min(rank * each, len(x)), min((rank + 1) * each, len(x))


# ----------------------------------------------------------------------------------------------------
# which there are

def checkpoints(out) -> list[tuple[int, Path]]:
    """[(step, folder), ...] of the whole ones, oldest first."""
    found = [(int(folder.name[5:]), folder) for folder in folders(out) if shares(folder)]
    return sorted(found)


def folders(out) -> list[Path]:
    return [path for path in Path(out).glob("train/step-*") if re.fullmatch(r"step-[0-9]+", path.name)]


def shares(folder: Path) -> int:
    """Of how many a checkpoint is made; 0 if one is missing."""
    names = {file.stem for file in folder.glob("*.json")}
    return len(names) if names == {f"{rank}-of-{len(names)}" for rank in range(len(names))} else 0


def sweep(out):
    """Removes half checkpoints, which a killed run was writing or removing."""
    for folder in folders(out):
        if not shares(folder):
            shutil.rmtree(folder)


def finished(out, steps: int, ranks) -> bool:
    """Whether the model that this training exports is there, as it was written."""
    problem = model.damage(out, steps) if ranks.rank == 0 else ""
    problem, *_ = common.gathered([problem], ranks)
    if problem and not checkpoints(out):
        raise UserError(f"{problem}, and there is no checkpoint to make it of; to train it anew remove "
                        f"{Path(out, 'config.json')}")
    if problem:
        print0(f"warning: {problem}; it is made again")
    return problem == ""


# ----------------------------------------------------------------------------------------------------
# writing

def save(state: State, out, step: int, keep: int, ranks):
    finish_save(state, out, keep, ranks)
    dist.all_reduce(state.totals)
    share = {}
    for name, x in contents(state).items():
        first, last = rows(x, ranks.rank, ranks.world)
        share[name] = (x.to_local() if is_spread(x) else x[first:last]).cpu()
    file = Path(out, "train", f"step-{step}", f"{ranks.rank}-of-{ranks.world}.json")
    state.saving = ThreadPoolExecutor(1).submit(write, file, step, share)
    if ranks.device.type == "cpu":  # a GPU trains on meanwhile: there, these are copies
        finish_save(state, out, keep, ranks)
    if ranks.rank:
        state.totals.zero_()  # rank 0 has them all now


def write(file: Path, step: int, share: dict[str, torch.Tensor]):
    file.parent.mkdir(parents=True, exist_ok=True)
    sums = {name: common.checksum(x) for name, x in share.items()}
    common.save_tensors(file.with_suffix(".safetensors"), share)
    text = json.dumps({"step": step, "crc32": sums})
    write_text(file, f"{text}\n{zlib.crc32(text.encode())}\n")


def finish_save(state: State, out, keep: int, ranks):
    """Waits for a checkpoint on its way, of all ranks; then the newest `keep` stay."""
    error = state.saving.exception() if state.saving else None
    if error and not isinstance(error, (OSError, UserError)):
        raise error
    state.saving = None
    errors = [text for text in common.gathered([error and str(error)], ranks) if text]
    whole_ones = checkpoints(out)
    if errors:
        kept = f"{whole_ones[-1][1]} is the newest" if whole_ones else "there is no other"
        raise UserError(f"a checkpoint cannot be written: {errors[0]}\n{kept}; the same command goes on")
    dist.barrier()  # nobody still looks
    if ranks.rank == 0:
        for _, old in whole_ones[:-keep]:
            (old / f"0-of-{shares(old)}.json").unlink()  # so that what is half deleted does not count
            shutil.rmtree(old)


# ----------------------------------------------------------------------------------------------------
# reading

def load_newest(state: State, out, steps: int, ranks) -> int | None:
    """The step gone on from; None at the beginning. Damaged checkpoints are set aside for an older one."""
    found = common.gathered(checkpoints(out) if ranks.rank == 0 else [], ranks)  # as one of them sees it
    if found and found[-1][0] > steps:
        raise UserError(f"{found[-1][1]} is beyond --steps {steps}; choose more steps, or another --out")
    damaged = []
    for step, folder in reversed(found):
        problems = [text for text in common.gathered([load(state, folder, step, ranks)], ranks) if text]
        if not problems:
            set_aside(damaged, ranks)
            for p in state.weights.values():
                state.optimizer.state[p]["step"].fill_(step)
            if ranks.rank:
                state.totals.zero_()
            return step
        print0(f"warning: {problems[0]}")
        damaged.append(folder)
    if damaged:
        raise UserError(f"no checkpoint in {damaged[0].parent} is intact; remove that folder to begin anew")
    return None


def set_aside(damaged: list[Path], ranks):
    """Out of the way of the checkpoints of these steps that will be written again."""
    for folder in damaged:
        aside = folder.with_name(f"{folder.name}-damaged")
        print0(f"set aside as {aside}, which can be removed")
        if ranks.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)


def load(state: State, folder: Path, step: int, ranks) -> str | None:
    """Fills the state. Returns what is wrong with this rank's part of a checkpoint."""
    count = shares(folder)
    wanted = contents(state)
    for part in range(count):
        file = folder / f"{part}-of-{count}.safetensors"
        try:
            read(file, part, count, wanted, step, ranks)
        except (SafetensorError, OSError, RuntimeError, ValueError, LookupError, TypeError) as error:
            return f"{file} is damaged: {common.first_line(error)}"


def read(file: Path, part: int, count: int, wanted: dict[str, torch.Tensor], step: int, ranks):
    """Copies what wanted needs of a share, once its checksum is right."""
    text, check = records.read_text(file.with_suffix(".json")).splitlines()
    if zlib.crc32(text.encode()) != int(check):
        raise ValueError("its list of checksums has another checksum")
    about = json.loads(text)
    if about["step"] != step or about["crc32"].keys() != wanted.keys():
        raise ValueError(f"it is of step {about['step']}, or of another network")
    with safe_open(file, "pt") as f:
        for name, x in wanted.items():
            first, last = rows(x, part, count)
            begin, end = rows(x, ranks.rank, ranks.world) if is_spread(x) else (0, len(x))
            above, below = max(first, begin), min(last, end)
            if above >= below:
                continue
            stored = f.get_tensor(name)
            if stored.dtype != x.dtype or stored.shape != (last - first, *x.shape[1:]):
                raise ValueError(f"{name} is {stored.dtype} {tuple(stored.shape)}")
            if common.checksum(stored) != about["crc32"][name]:
                raise ValueError(f"{name} has another checksum")
            mine = x.to_local() if is_spread(x) else x
            mine[above - begin:below - begin].copy_(stored[above - first:below - first])


def whole(x: torch.Tensor) -> torch.Tensor:
    """A tensor that may be spread over the ranks, on each of them."""
    return x.full_tensor() if is_spread(x) else x


def is_spread(x: torch.Tensor) -> bool:
    """Is it one of FSDP2's? By what only they have: to import their class takes a second."""
    return hasattr(x, "full_tensor")
