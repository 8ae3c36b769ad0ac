"""What is promised: full disks, kills, second starts, strange names and broken numbers end in a line, and
nothing is lost. Real disks, signals and processes; tests/faults.sh does the same to whole stages."""

import dataclasses
import io
import itertools
import json
import math
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from worlds import ENV, blank, fork, tiny_model, tree

import aggregate
import bench
import common
import data
import eval_drift
import files
import flags
import model
import prepare
import rollout
import sample
import sources
import toy
import train_df
import vae
from files import DiskError, UserError

STAGES = {"toy": toy, "prepare": prepare, "train_df": train_df, "rollout": rollout, "aggregate": aggregate,
          "sample": sample, "eval_drift": eval_drift, "bench": bench}


# ----------------------------------------------------------------------------------------------------
# writing

def write_npz(path):
    with files.replacing(path) as temporary, open(temporary, "wb") as f:
        np.savez(f, x=np.zeros(10_000))


def write_as_if_torch(path):
    """A library that hides why it failed."""
    with files.replacing(path) as temporary:
        try:
            temporary.write_bytes(bytes(10**6))
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598") from None


def noise_video(path):
    data.write_video(path, [torch.randint(256, (30, 3, 64, 64), dtype=torch.uint8)], 16)


WRITERS = {"a.txt": lambda path: files.write_text(path, "x" * 10**5), "a.npz": write_npz,
           "a.mp4": noise_video, "a.bin": write_as_if_torch,
           "log.jsonl": lambda path: files.append(path, "x" * 10**5),
           "a.safetensors": lambda path: common.save_tensors(path, {"x": torch.zeros(10**5)}),
           "a.png": lambda path: data.write_png(path, torch.randint(256, (3, 200, 200), dtype=torch.uint8))}


def in_child(function, *args):
    """What the function returns in another process, whose limits and locks are its own."""
    receive, send = os.pipe()
    process = fork(lambda: os.write(send, json.dumps(function(*args)).encode()))
    os.close(send)
    process.join()
    with os.fdopen(receive) as f:
        return json.loads(f.read())


def test_a_full_disk_is_a_line_whatever_library_met_it(tmp_path):
    """By a limit on the size of files, which is as real as a full disk and needs no rights."""
    def attempts():
        said = {}
        for name, write in WRITERS.items():
            path = tmp_path / name
            path.write_text("before\n")
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
            try:
                write(path)
            except DiskError as error:
                assert isinstance(error, OSError)  # which data.Writer counts the kept clips for
                said[name] = str(error)
        return said
    said = in_child(attempts)
    assert said.keys() == WRITERS.keys()
    for name, text in said.items():
        assert re.fullmatch(f"cannot write {tmp_path / name}: File too large; .* kept", text)
        before, more = (tmp_path / name).read_text().split("\n")
        assert before == "before" and (name == "log.jsonl") == bool(more)
    assert len(os.listdir(tmp_path)) == len(WRITERS)


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(ZeroDivisionError), files.replacing(tmp_path / "a"):
        raise ZeroDivisionError
    with pytest.raises(FileNotFoundError, match="elsewhere"), files.replacing(tmp_path / "a"):
        open(tmp_path / "elsewhere")
    with pytest.raises(DiskError, match="cannot write .*nowhere/a: No such file"):
        files.write_text(tmp_path / "nowhere" / "a", "x")
    assert os.listdir(tmp_path) == []


def test_names_as_long_as_can_be(tmp_path):
    name = "x" * 251 + ".txt"
    files.write_text(tmp_path / name, "x")
    assert os.listdir(tmp_path) == [name]


# ----------------------------------------------------------------------------------------------------
# owning

def refused(words):
    return pytest.raises(UserError, match=words)


@pytest.fixture(autouse=True)
def released():
    yield
    files.release()


def test_a_folder_is_new_empty_or_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "lost+found"):
        Path("disk", name).mkdir(parents=True)
    Path("wan").mkdir()
    Path("wan/config.json").touch()
    Path("old").mkdir()
    Path("old/meta.json").write_text("{}")
    before = tree(".")
    for folder, words in (("", "empty name"), (".", "holds (disk|old|wan)"), ("wan", "holds config.json"),
                          ("disk", "holds mine"), ("old", "holds meta.json")):
        with refused(words):
            files.own(folder, "videos")
    assert tree(".") == before
    Path("disk/mine").rmdir()
    files.own("disk", "videos")  # empty but for what file systems put there
    files.own("a/new/one", "clips")
    files.own("a/new/one", "clips")
    files.own("old", "clips")  # made before there were marks
    files.release()
    assert Path("a/new/one", files.MARK).read_text() == '{"holds": "clips"}\n'
    with refused("holds clips, so that a model cannot be written there"):
        files.own("a/new/one", "a model")


def test_only_ones_own_leftovers_are_swept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files.own("run", "a toy world")
    files.release()
    for name in ("run/.a.12.tmp", "run/sub/.a\n.12.tmp", "run/.mine.tmp", "run/other/.a.12.tmp"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    Path("run/other", files.MARK).touch()
    Path("run/link").symlink_to("/")
    files.own("run", "a toy world")
    assert {str(path) for path in Path("run").rglob(".*.tmp")} == {"run/.mine.tmp", "run/other/.a.12.tmp"}


def owner(folder, then="time.sleep(60)", first="0"):
    """A process that says when it has folder/out."""
    code = f"import files, time; {first}; files.own('out', 'clips'); print('mine', flush=True); {then}"
    return subprocess.Popen([sys.executable, "-c", code], env=ENV, cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_one_process_at_a_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = owner(tmp_path)
    first.stdout.readline()
    with refused(rf"out is being written by process {first.pid} on .*, since .*; wait for it, or choose"):
        files.own("out", "clips")
    first.kill()
    first.wait()
    assert f'"pid": {first.pid}' in Path("out", files.MARK).read_text(), "it could not clear up"
    files.own("out", "clips")
    second = owner(tmp_path, "files.release()")
    assert "is being written by process" in second.communicate()[1] and second.returncode == 1
    files.release()
    assert owner(tmp_path, "files.release()").wait() == 0
    assert Path("out", files.MARK).read_text() == '{"holds": "clips"}\n'


def test_of_many_that_start_at_once_one_has_it(tmp_path):
    started = [owner(tmp_path, "time.sleep(1.5)") for _ in range(6)]
    assert sorted(process.wait() for process in started) == [0] + [1] * 5


def test_other_machines_are_known_by_their_heartbeat(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writer = files.this_process() | {"host": "node7 pid:[1]", "pid": 1}
    Path("out").mkdir()
    mark = Path("out", files.MARK)
    mark.write_text(json.dumps({"holds": "clips", "writer": writer}) + "\n")
    with refused("process 1 on node7, .*; wait for it .should it be dead: 5 minutes."):
        files.own("out", "clips")
    os.utime(mark, (time.time() - files.STALE - 5,) * 2)
    files.own("out", "clips")
    assert json.loads(mark.read_text())["writer"]["pid"] == os.getpid()
    for damaged in (b"", b"[", b"[]", b"\xe5", b'{"holds": "clips", "writer": 7}',
                    b'{"writer": {"pid": "x", "host": 1}}'):
        files.release()
        mark.write_bytes(damaged)
        files.own("out", "clips")


def test_a_process_that_was_taken_for_dead_ends(tmp_path):
    sleeper = owner(tmp_path, first="files.BEAT = 0.01")
    sleeper.stdout.readline()
    mark = tmp_path / "out" / files.MARK
    mark.write_text(json.dumps({"holds": "clips", "writer": files.this_process()}))
    assert "has been taken over" in sleeper.communicate()[1] and sleeper.returncode == 2


def test_a_killed_parent_takes_its_children_along(tmp_path):
    code = ("import files, subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time;"
            "time.sleep(60)'], preexec_fn=files.die_with_parent); print(child.pid, flush=True); child.wait()")
    parent = subprocess.Popen([sys.executable, "-c", code], env=ENV, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert files.started(child)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while files.started(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sys.platform != "linux" or not files.started(child)


# ----------------------------------------------------------------------------------------------------
# numbers

REQUIRED = {"prepare": "--videos v --wan w --out o", "train_df": "--data d", "rollout": "--model m",
            "aggregate": "--rollouts r", "eval_drift": "v", "bench": "vae"}


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_knows_its_range(stage):
    config = STAGES[stage].Config
    fixed = REQUIRED.get(stage, "").split()

    def parse(*given):
        return flags.parse(config, "", [*fixed, *given])
    parse()
    tried = 0
    for field in dataclasses.fields(config):
        kind, words, test = flags.kinds(config)[field.name]
        values = {float: ["nan", "inf", "-inf", "x"], int: ["1.5", "x", "9" * 5000]}.get(kind, [])
        values += ["-1", "99999999999"] if kind is int and test else []
        values += ["nonsense", "", "0x0", "cuda:-1"] if kind is str and test else []
        for value in values:
            with pytest.raises(UserError) as error:
                parse(f"{flags.name_of(field)}={value}")
            assert flags.name_of(field) in str(error.value) and len(str(error.value)) < 500
            tried += 1
    assert tried > 3


def test_ranges_hold_in_python_too():
    needed = {"prepare": {"videos": ("v",), "wan": "w", "out": "o"}, "train_df": {"data": "d"}, "sample": {}}
    for stage, name, value in (
            ("prepare", "fps", -16), ("prepare", "size", "0x0"), ("train_df", "held_out", -1),
            ("train_df", "clip", -1.0), ("train_df", "lr", -1.0), ("train_df", "beta2", 1.0),
            ("train_df", "shift", 0.0), ("train_df", "previews", 0), ("train_df", "device", "nonsense"),
            ("sample", "seconds", 1e308), ("sample", "guidance", math.nan), ("sample", "steps", "20"),
            ("sample", "causal", 3)):
        with refused(f"^--{name.replace('_', '-')} {re.escape(str(value))}: give "):
            STAGES[stage].Config(**needed[stage], **{name: value})


# ----------------------------------------------------------------------------------------------------
# errors

@pytest.mark.parametrize("error,code,words", [
    (UserError("no clips; see there"), 2, "no clips; see there"),
    (PermissionError(13, "Permission denied", "/a"), 2, r"Permission denied: '/a'"),
    (UserError("a\x1b[31m\nb"), 2, r"a\\x1b\[31m\nb"),
    (MemoryError("of 10 GB"), 2, "out of memory: of 10 GB\nmake batches"),
    (RuntimeError("Symlink loop from '/a'"), 2, "Symlink loop from '/a'"),
    (KeyError("x"), 1, "a defect; please report it, with the lines above and the command: ")])
def test_an_error_is_a_line_or_two_or_a_defect(error, code, words, capsys, monkeypatch):

    def main(cfg):
        raise error
    for debug in ([], ["--debug"]):
        monkeypatch.setattr(sys, "argv", ["stage.py", *debug])
        with pytest.raises(SystemExit) as ended:
            common.run(main, None)
        printed = capsys.readouterr().err
        assert ended.value.code == code and re.search(f"^stage.py: .*{words}", printed, re.MULTILINE)
        assert ("Traceback" in printed) == (code == 1 or bool(debug))
        assert "Traceback" in printed or printed.count("\n") <= 2


# ----------------------------------------------------------------------------------------------------
# names and text

STRANGE = ["a\udcff", "\ud800", "esc\x1b[31m", "new\nline", "tab\t", "nul\0", "\u202eexe.4pm", "\x9b31m",
           "caf\u00e9", "\u901f\u3044", "'quote\"", "a,b;c", "-rf", "%s%d{}", "\u2028", "\U0001f642",
           "\x7f\x08\x08", "C:\\x", "\r"]


def test_strange_text_survives_files_and_never_reaches_the_screen(tmp_path):
    for text in STRANGE:
        files.write_text(tmp_path / "a.json", files.as_json({text: text}))
        assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {text: text}
        common.save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, prompt=text)
        assert common.open_weights(tmp_path / "a.safetensors")[1] == {"prompt": text}
        data.write_video(tmp_path / "a.mp4", [blank(1)], 16, {"prompt": text})
        assert data.read_tags(tmp_path / "a.mp4") == {"prompt": text}
        shown = files.plain(text)
        assert shown.isprintable() and shown.encode() and "\n" not in shown
    for encoding in ("utf-8", "latin-1", "ascii", "utf-16"):
        for text, kept in itertools.product(STRANGE, ("", "\r")):
            screen = files.Screen(io.TextIOWrapper(io.BytesIO(), encoding), kept)
            print(text, file=screen, flush=True)
            written = screen.buffer.getvalue().decode(encoding)
            assert all(c in "\n\t" + kept or c.isprintable() for c in written), (text, written)


def test_names_of_files():
    assert all(map(files.is_name, ["a", "caf\u00e9", "a\udcff", " ", "-", "x" * 230]))
    wrong = ["", ".", "..", "a/b", "/a", "a\0", "\ud800", "x" * 231, "\u901f" * 80]
    assert not any(map(files.is_name, wrong))
    assert len({sources.clip_id(f"{text}.mp4") for text in STRANGE}) == len(STRANGE)
    assert all(files.is_name(sources.clip_id(f"{text}.mp4" * 100)) for text in STRANGE)


def test_a_bad_caption_is_a_skipped_clip(tmp_path, ranks):
    names = [name for name in STRANGE if files.is_name(name)]
    for name in [*names, "latin", "long", "fifo", "folder"]:
        (tmp_path / f"{name}.mp4").touch()
        if name in names:
            (tmp_path / f"{name}.txt").write_text("a caption")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "long.txt").write_text("x" * (data.CAPTION + 1))
    os.mkfifo(tmp_path / "fifo.txt")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "gone.mp4").symlink_to("nowhere.mp4")
    clips = {clip.path.stem: clip for clip in sources.find_clips(tmp_path)}
    assert clips.keys() == {*names, "latin", "long", "fifo", "folder", "gone"}
    assert all(clips[name].caption == "a caption" for name in names)
    assert "latin.txt is not UTF-8" in clips["latin"].problem
    assert f"long.txt has {data.CAPTION + 1} bytes" in clips["long"].problem
    skipped = prepare.find_unusable(list(clips.values()), tmp_path / "out", ranks)
    assert len(skipped) == 5 and "latin.txt is not UTF-8" in " ".join(skipped.values())


# ----------------------------------------------------------------------------------------------------
# nan and infinity

def test_nan_stops_where_it_appears(tmp_path, ranks):
    dtypes = torch.float32, torch.bfloat16, torch.float16
    for dtype, value in itertools.product(dtypes, (torch.nan, -torch.inf)):
        x = torch.ones(5, dtype=dtype)
        common.check_finite(x, "x")
        x[2] = value
        with refused("^x: NaN or infinite"):
            common.check_finite(x, "x")
    with refused("a video: NaN"):
        data.to_uint8(torch.full((1, 3, 2, 2), torch.nan))
    store = data.Writer(tmp_path / "agg", ranks, {}, [data.index_entry("a", "p", "seed", 0, "s")])
    with refused("the latents of clip a: NaN or infinite"):
        store.write("a", torch.full((1, 1, 1, 1), 1e9), torch.ones(1, 4))  # beyond float16
    assert not store.has("a")
    net = tiny_model("broken")
    net.head.head.bias.data[0] = torch.nan
    with refused("head.head.bias of the weights for .*m: NaN"):
        model.save(net, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    coder = vae.WanVAE(8, (1, 1, 1, 1), 1, z_dim=16, latents_mean=[0.0] * 16, latents_std=[0.0] * 16)
    vae.save(coder, tmp_path / "vae.safetensors")
    with refused("vae.safetensors: latents_mean and latents_std must be .*, the latter above 0"):
        vae.load(tmp_path / "vae.safetensors")
