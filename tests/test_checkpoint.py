"""Checkpoints: any number of processes, sharded or whole; what is damaged is named, and never used."""

import random
import shutil
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from worlds import fork_ranks, tree

import checkpoint
import common
from common import UserError


def make_state(net, step=0):
    """As train_df.py's, with every value a function of its name and the step."""
    weights = dict(net.named_parameters())
    optimizer = torch.optim.AdamW(weights.values())
    for p in weights.values():
        optimizer.state[p] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}
    ema = [torch.zeros_like(p) for p in weights.values()]
    totals = torch.zeros(2, 5, dtype=torch.float64)
    state = checkpoint.State(net, weights, optimizer, ema, totals, torch.tensor(-1))
    if step:
        for name, x in checkpoint.contents(state).items():
            x.copy_(value(name, step, x))
    return state


def value(name, step, x):
    """For a tensor of x's shape; sharded as x is."""
    whole = torch.randn(x.shape, generator=common.rng(name, step), dtype=x.dtype)
    return distribute_tensor(whole, x.device_mesh, x.placements) if checkpoint.is_spread(x) else whole


def small_net(sharded=False):
    net = torch.nn.Sequential(torch.nn.Linear(3, 7), torch.nn.Linear(7, 1), torch.nn.Linear(1, 2, bias=False))
    if sharded:
        fully_shard(net, mesh=dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)))
    return net


def holds(state, step) -> bool:
    kept = {name: torch.equal(checkpoint.whole(x), checkpoint.whole(value(name, step, x)))
            for name, x in checkpoint.contents(state).items() if name != "totals"}
    return len(kept) == 20 and all(kept.values())


WAYS = [(1, False), (3, True), (2, False)]  # processes, sharded


def test_any_number_of_processes_goes_on_sharded_or_whole(tmp_path):
    """A tensor has as many rows as processes, more, or fewer; the totals are those of all."""
    for step, (world, sharded) in enumerate(WAYS, 1):
        def go_on(step=step, sharded=sharded):
            ranks = common.start_ranks("cpu")
            before = make_state(small_net(sharded))
            assert checkpoint.load_newest(before, tmp_path, 9, ranks) == (step - 1 or None)
            assert step == 1 or holds(before, step - 1)
            totals = before.totals.clone()
            dist.all_reduce(totals)
            assert totals[0, 0] == (step - 1) * WAYS[step - 2][0], "what each rank counted"
            after = make_state(small_net(sharded), step)
            after.totals.fill_(step)
            checkpoint.save(after, tmp_path, step, 2, ranks)
            assert (after.totals == 0).all() or ranks.rank == 0
            dist.destroy_process_group()
        fork_ranks(world, go_on)
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [2, 3]
    assert len(list(tmp_path.glob("train/step-2/*"))) == 6


@pytest.fixture
def saved(tmp_path, ranks):
    """Checkpoints of steps 2, 4 and 6."""
    for step in (2, 4, 6):
        checkpoint.save(make_state(small_net(), step), tmp_path, step, 3, ranks)
    return tmp_path


def flip(file: Path, chance):
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def cut(file: Path, chance):
    file.write_bytes(file.read_bytes()[:chance.randrange(file.stat().st_size)])


DAMAGE = {
    "flip": flip, "cut": cut, "gone": lambda file, chance: file.unlink(),
    "folder": lambda file, chance: (file.unlink(), file.mkdir()),
    "code": lambda file, chance: torch.save(types.SimpleNamespace(run=print), file),
    "other": lambda file, chance: shutil.copy(file.parents[1] / "step-2" / file.name, file)}


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_what_is_damaged_is_named_and_an_older_one_used(saved, ranks, capsys, what, suffix):
    shutil.copytree(saved / "train/step-6", saved / "intact")
    for seed in range(40 if what in ("flip", "cut") else 1):
        DAMAGE[what](saved / f"train/step-6/0-of-1.{suffix}", random.Random(seed))
        checkpoint.sweep(saved)
        state = make_state(small_net())
        assert checkpoint.load_newest(state, saved, 9, ranks) == 4 and holds(state, 4)
        said = capsys.readouterr().out.splitlines()
        if (what, suffix) != ("gone", "json"):  # it would not count as a checkpoint
            assert "step-6/0-of-1.safetensors is damaged: " in said[0] and "step-6-damaged" in said[1]
            assert len(said) == 2
            shutil.rmtree(saved / "train/step-6-damaged")
        shutil.copytree(saved / "intact", saved / "train/step-6")
        assert checkpoint.load_newest(state, saved, 9, ranks) == 6 and holds(state, 6)


def test_nothing_is_begun_anew_because_all_are_damaged(saved, ranks):
    for file in saved.glob("train/*/*.safetensors"):
        cut(file, random.Random(0))
    before = tree(saved)
    with pytest.raises(UserError, match="no checkpoint in .*train is intact; remove that folder"):
        checkpoint.load_newest(make_state(small_net()), saved, 9, ranks)
    assert tree(saved) == before


def test_what_cannot_be_written_is_said_with_what_there_is(saved, ranks):
    (saved / "train/step-8").write_text("in the way")
    with pytest.raises(UserError, match="(?s)cannot be written: .*step-8.*step-6 is the newest"):
        checkpoint.save(make_state(small_net(), 8), saved, 8, 3, ranks)
    assert [step for step, _ in checkpoint.checkpoints(saved)] == [2, 4, 6]
