"""Flags, seeds and files."""

import json
import os
import re
import subprocess
import sys
import typing
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from worlds import ENV, ROOT, call, umask

import bench
import common
import diffusion
import files
import flags
import history
import train_df


@dataclass
class Flags:
    videos: tuple[str, ...] = flags.positional()  # folders of videos
    out: str  # where to
    lr: float = 4e-6  # step size, not 100%
    # one of two
    mode: Literal["df", "tf"] = "df"  # objectives
    compile: bool = True  # compile the blocks
    init: str | None = None  # a model directory
    dtype: Literal["fp32", "bf16"] | None = None  # of the products
    chunks: tuple[int, ...] = (3, 3)  # sizes

    __post_init__ = flags.in_range


def parse(*argv):
    return flags.parse(Flags, "What it does.\n\n    python it.py --out x", list(argv))


def test_flags():
    assert parse("a", "b", "--out", "o") == Flags(("a", "b"), "o")
    given = "a --out o --lr 3e-4 --no-compile --mode tf --init m --dtype bf16 --chunks 1 3"
    assert parse(*given.split()) == Flags(("a",), "o", 3e-4, "tf", False, "m", "bf16", (1, 3))


@pytest.mark.parametrize("given,message", [
    ("", "required: videos, --out"),
    ("a --out o --learning-rate 1", "there is no flag --learning-rate"),
    ("a --out o --mode xx", "--mode: invalid choice: 'xx'"),
    ("a --out o --dtype fp8", "invalid choice: 'fp8'"), ("a --out o --lr fast", "--lr: .*'fast'"),
    ("a --out o --mod tf", "there is no flag --mod; did you mean --mode?"),
    ("a --ot o", "--ot; did you mean --out?"), ("a -out o", "-out; did you mean --out?"),
    ("a --out o --lr nan", "--lr nan: give a number"), ("a --out o --lr=-inf", "--lr -inf: give a number")])
def test_wrong_flags_are_refused(given, message):
    with pytest.raises(files.UserError) as error:
        parse(*given.split())
    assert re.search(message.replace("?", "[?]"), str(error.value)) and "\n" not in str(error.value)


def test_help_is_complete(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    for words in ("What it does. python it.py --out x", "folders of videos", "--no-compile",
                  "step size, not 100% (default: 4e-06)", "one of two objectives (default: df)",
                  "a model directory", "sizes (default: (3, 3))"):
        assert words in text, words
    assert "default: None" not in text


SCRIPT = """
import os, sys, common, flags, torch
from dataclasses import dataclass
@dataclass
class Flags:
    what: str = "error"  # what to do
def main(cfg):
    if cfg.what == "error":
        raise common.UserError("7 is not a multiple of 4; use 8")
    ranks = common.start_ranks("cpu")
    common.print0(f"rank {ranks.rank} of {ranks.world} on {ranks.device}")
    if ranks.world > 1 and cfg.what != "start":
        if cfg.what == "all":
            raise common.UserError("no such folder")
        if cfg.what == f"error {ranks.rank}":
            raise common.UserError(f"rank {ranks.rank} cannot read a.mp4")
        if cfg.what == f"kill {ranks.rank}":
            os.kill(os.getpid(), 9)
        torch.distributed.barrier()
common.run(main, flags.parse(Flags, "a script"))
"""


def test_an_error_is_a_line_and_one_process_is_a_group(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = call(script, code=2)
    assert (done.stdout, done.stderr) == ("", "script.py: 7 is not a multiple of 4; use 8\n")
    for ranks in (1, 2):
        assert call(script, "--what", "start", ranks=ranks).stdout == f"rank 0 of {ranks} on cpu\n"


def test_seeds_are_functions_of_names():
    def draw(*names):
        return torch.randn(4, generator=common.rng(*names)).tolist()
    assert draw(0, "noise", "clip", 3) == draw(0, "noise", "clip", 3)
    others = [draw(1, "noise", "clip", 3), draw(0, "noise", "clip", 4), draw(0, "noise", "cli", "p", 3)]
    assert all(other != draw(0, "noise", "clip", 3) for other in others)
    assert common.seed_of(0, "noise", "clip", 3) == 4976886686001815956  # the same everywhere


def test_files_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("mask,mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_file_modes_follow_the_umask(mask, mode, tmp_path):
    with umask(mask):
        common.save_tensors(tmp_path / "t.safetensors", {"x": torch.ones(2).expand(3, 2)}, note="\u00e9")
    assert os.stat(tmp_path / "t.safetensors").st_mode & 0o777 == mode
    with safe_open(tmp_path / "t.safetensors", "pt") as f:
        assert f.metadata() == {"json": '{"note": "\u00e9"}'} and f.get_tensor("x").shape == (3, 2)


def test_flags_on_the_command_line_are_known():
    assert set(parse("a", "--out", "o").given) == {"videos", "out"}
    given = parse("a", "--out", "o", "--lr", "4e-6", "--compile").given
    assert set(given) == {"videos", "out", "lr", "compile"}, "two of them at their defaults"


def test_tensors_are_written_as_the_library_writes_them(tmp_path):
    """Byte for byte, names and shapes of all sorts."""
    g = common.rng("tensors")
    tensors = {"b.x": torch.randn(3, 4, generator=g), "a": torch.randn(5, generator=g).half(),
               "\u00e9": torch.arange(3), "scalar": torch.randn((), generator=g).double(),
               "empty": torch.zeros(0, 3),
               "c": torch.randn(2, 2, generator=g).bfloat16(), "bytes": torch.arange(7, dtype=torch.uint8),
               "turned": torch.randn(4, 3, generator=g).T, "z": torch.randn(3, generator=g).half()}
    words = {"prompt": 'a "q" \u00e9\n\x01', "n": 1}
    common.save_tensors(tmp_path / "t", tensors, **words)
    theirs = save({k: v.contiguous() for k, v in tensors.items()},
                  {"json": json.dumps(words, ensure_ascii=False)})
    assert (tmp_path / "t").read_bytes() == theirs


def test_what_killed_writers_left_is_swept(tmp_path):
    names = [".a.txt.12.tmp", "sub/.clip.safetensors.4321.tmp", ".mine.tmp", "x.12.tmp", "a.txt"]
    (tmp_path / "sub").mkdir()
    for name in names:
        (tmp_path / name).write_text("half")
    files.sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [".mine.tmp", "a.txt", "x.12.tmp"]


def test_a_batch_is_made_as_a_whole_or_not_at_all():
    batches = common.batched(list(range(11)), 3)
    assert batches == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]
    for missing in ({4}, {0, 10}, set(range(11)), set()):
        shares = [common.my_share(batches, common.Ranks(rank, 2, None), lambda i, m=missing: i not in m)
                  for rank in range(2)]
        assert shares == [[b for b in batches[rank::2] if missing & set(b)] for rank in range(2)]


def test_neighbours():
    assert common.neighbour("run/agg_1", "model", "out") == "run/model_1"
    assert common.neighbour("rollout_9/", "agg", "out", later=1) == "agg_10"
    with pytest.raises(common.UserError, match="run/data does not end in .*; give --out DIR"):
        common.neighbour("run/data", "model", "out")


def test_forked_ranks_end_as_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for what, code, said in (("start", 0, ""), ("all", 2, "script.py: no such folder\n"),
                             ("error 0", 2, "script.py: rank 0 cannot read a.mp4\n"),
                             ("error 1", 2, "script.py: rank 1 cannot read a.mp4\n"),
                             ("kill 1", 137, r"process \d+ was ended by signal 9; .*\n")):
        done = call(script, "--what", what, code=code, env=ENV | {"RANKS": "2"})
        assert done.stdout == "rank 0 of 2 on cpu\n" and re.fullmatch(said, done.stderr), (what, done.stderr)
    assert "RANKS=two: give the number" in call(script, "--what", "start", code=2,
                                                 env=ENV | {"RANKS": "two"}).stderr


def test_help_answers_before_torch_is_imported():
    stages = "toy prepare train_df rollout aggregate sample eval_drift bench".split()
    code = ("import runpy, sys\n"
            "for stage in sys.argv[1:]:\n"
            "    sys.argv = [stage + '.py', '--help']\n"
            "    try: runpy.run_path(stage + '.py', run_name='__main__')\n"
            "    except SystemExit as done: assert done.code == 0, stage\n"
            "    assert 'torch' not in sys.modules, stage\n")
    subprocess.run([sys.executable, "-c", code, *stages], cwd=ROOT, check=True, capture_output=True)


def test_flags_offer_what_there_is():
    """Their choices are spelled out, since they are parsed before these tables are imported."""
    assert typing.get_args(flags.Solver) == tuple(diffusion.SOLVERS)
    assert typing.get_args(typing.get_type_hints(train_df.Config)["mode"]) == tuple(history.HISTORIES)
    assert typing.get_args(typing.get_type_hints(bench.Config)["model"]) == tuple(bench.MODELS)
