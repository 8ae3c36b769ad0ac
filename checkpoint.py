"""The state of a training and its checkpoints, out/train/step-N: whole once .metadata is there, written last.

Written and read by all ranks together, in torch's distributed format: a run may go on with another number of
GPUs than it was stopped with.
"""

import re
import shutil
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

import model
from common import UserError


@dataclass
class State:
    """All that a checkpoint holds, beside the network it belongs to."""
    net: model.WanModel
    weights: dict[str, torch.nn.Parameter]  # fp32, this rank's shards where there are several
    optimizer: torch.optim.AdamW
    ema: list[torch.Tensor]
    totals: torch.Tensor  # sums and counts since the last line of the log; see tally in train_df.py
    broken: torch.Tensor  # the first step whose gradient was not finite, or -1
    saving: Future | None = None  # of a checkpoint on its way to disk


def contents(state: State) -> dict:
    moments = {key: {name: state.optimizer.state[p][key] for name, p in state.weights.items()}
               for key in ("exp_avg", "exp_avg_sq")}
    ema = dict(zip(state.weights, state.ema, strict=False))
    return {"model": {k: p.detach() for k, p in state.weights.items()}, **moments, "ema": ema,
            "totals": state.totals}


def checkpoints(out) -> list[tuple[int, Path]]:
    """[(step, folder), ...] of the whole ones, oldest first."""
    folders = [file.parent for file in Path(out).glob("train/step-*/.metadata")]
    return sorted((int(folder.name.removeprefix("step-")), folder) for folder in folders)


def sweep(out):
    """Removes half checkpoints, which a killed run was writing or removing."""
    whole_ones = {folder for _, folder in checkpoints(out)}
    for folder in set(Path(out).glob("train/step-*")) - whole_ones:
        if re.fullmatch(r"step-\d+", folder.name):
            shutil.rmtree(folder)


def save(state: State, out, step: int, keep: int, ranks):
    finish_save(state, out, keep, ranks)
    folder = Path(out, "train", f"step-{step}")
    dist.all_reduce(state.totals)
    if ranks.device.type == "cuda":  # copies to the CPU, and writes while training goes on
        state.saving = dcp.async_save(contents(state), checkpoint_id=folder)
    else:
        dcp.save(contents(state), checkpoint_id=folder)
        finish_save(state, out, keep, ranks)
    if ranks.rank:
        state.totals.zero_()  # rank 0 has them all now


def finish_save(state: State, out, keep: int, ranks):
    """Waits for a checkpoint on its way; then the newest `keep` stay."""
    if state.saving:
        state.saving = state.saving.result()
    if ranks.rank == 0:
        for _, old in checkpoints(out)[:-keep]:
            (old / ".metadata").unlink()  # first, so that what is half deleted does not count
            shutil.rmtree(old)


def load_newest(state: State, out, steps: int, ranks) -> int | None:
    """The step gone on from; None at the beginning."""
    if not checkpoints(out):
        return None
    step, folder = checkpoints(out)[-1]
    if step > steps:
        raise UserError(f"{folder} is beyond --steps {steps}; choose more steps, or another --out")
    dcp.load(contents(state), checkpoint_id=folder)
    for p in state.weights.values():
        state.optimizer.state[p]["step"].fill_(step)
    if ranks.rank:
        state.totals.zero_()
    return step


def whole(x: torch.Tensor) -> torch.Tensor:
    """A tensor that may be spread over the ranks, on each of them."""
    return x.full_tensor() if isinstance(x, DTensor) else x
