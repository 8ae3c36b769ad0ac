"""Stage 0 by its script: what it makes, that it can be killed and shared among ranks, and what it refuses."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from worlds import torchrun

import common
import data
import prepare
import t5
import toy
import vae

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """toy.py's own output: 6 clips and a Wan directory."""
    folder = tmp_path_factory.mktemp("world")
    done = subprocess.run([sys.executable, "toy.py", "--out", folder, "--clips", "6"], env=ENV)
    assert done.returncode == 0
    return folder


@pytest.fixture
def alone():
    """In-process runs leave no process group behind."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def script(*args, ranks=1):
    command = [*torchrun(ranks), "prepare.py", *map(str, args)]
    return subprocess.run(command, env=ENV, capture_output=True, text=True)


def flags(world, out, videos=None):
    return "--videos", videos or world / "videos", "--wan", world / "wan", "--out", out


def contents(out):
    """Every file but meta.json, which holds the command."""
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(Path(out).rglob("*"))
            if p.is_file() and p.name != "meta.json"}


@pytest.fixture(scope="module")
def agg_0(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("store") / "agg_0"
    done = script(*flags(world, out))
    assert done.returncode == 0 and "6 clips" in done.stdout and "0 skipped" in done.stdout, done
    return out


def test_a_clip_is_the_encoded_crop_and_caption(world, agg_0):
    clips = data.Clips(agg_0)
    assert [clips[i]["id"] for i in range(6)] == [f"{i:05d}" for i in range(6)]
    assert clips.kinds == ["seed"] * 6
    clip = clips.load(4)
    video = data.read_clip(data.probe(world / "videos" / "00004.mp4"), 81, 16, (32, 32))
    latents = vae.load(world / "wan").encode(data.to_float(video[None]))[0]
    assert clip["latents"].shape == (21, 16, 4, 4)
    assert torch.allclose(clip["latents"].float(), latents, atol=1e-2)
    encoder = t5.load(world / "wan")
    text = encoder.encode([toy.caption(toy.draw_world(0, 4))])[0]  # alone: in a batch it is rounded otherwise
    torch.testing.assert_close(clip["text"], text.bfloat16())
    empty = data.read_text_embedding(agg_0 / "empty.safetensors")
    assert torch.equal(empty, encoder.encode([""])[0].bfloat16())
    meta = clips.meta()
    assert (meta["latents"], meta["frames"], meta["fps"], meta["width"]) == ([21, 16, 4, 4], 81, 16, 32)
    assert not (agg_0 / "text").exists() and (agg_0 / "skipped.txt").read_text() == ""


def test_ranks_make_the_same_bytes(world, agg_0, tmp_path):
    assert script(*flags(world, tmp_path / "agg"), ranks=2).returncode == 0
    assert contents(tmp_path / "agg") == contents(agg_0)


@pytest.mark.parametrize("when", ["text/00003", "clips/00001", "clips/00004"])
def test_killed_and_started_again_it_ends_the_same(world, agg_0, tmp_path, when):
    out = tmp_path / "agg"
    process = subprocess.Popen([sys.executable, "prepare.py", *map(str, flags(world, out))], env=ENV)
    while not (out / f"{when}.safetensors").exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = len(list(out.glob("clips/*.safetensors")))
    assert made < 6, "killed too late to show anything"
    assert not (out / "index.jsonl").exists(), "it comes last"
    assert script(*flags(world, out)).returncode == 0
    assert {k: v for k, v in contents(out).items() if not k.endswith(".tmp")} == contents(agg_0)


def same_clip(a, b, id) -> bool:
    """Its caption may have been encoded beside others, which rounds it otherwise."""
    a, b = (load_file(data.clip_file(folder, id)) for folder in (a, b))
    text = torch.allclose(a["text"], b["text"], rtol=0.02, atol=1e-3)
    return torch.equal(a["latents"], b["latents"]) and text


def test_what_cannot_be_used_is_listed(world, agg_0, tmp_path):
    videos = tmp_path / "videos"
    shutil.copytree(world / "videos", videos)
    (videos / "00000.txt").unlink()
    (videos / "00001.mp4").write_bytes(b"")
    (videos / "00002.mp4").write_text("not a video")
    frames = toy.render(toy.draw_world(0, 3), 81)
    data.write_video(videos / "00003.mp4", [frames[:40]], 16)
    data.write_video(videos / "00004.mp4", [frames], 12)
    done = script(*flags(world, tmp_path / "agg", videos), ranks=2)
    assert done.returncode == 0 and "1 clips" in done.stdout and "5 skipped" in done.stdout, done
    listed = (tmp_path / "agg" / "skipped.txt").read_text().splitlines()
    reasons = ["no caption", "is empty", "cannot be read", "too short", "12 fps is below 16"]
    for i, (line, reason) in enumerate(zip(listed, reasons, strict=True)):
        name = f"{i:05d}"
        assert name in line and reason in line and line in done.stdout
    assert same_clip(tmp_path / "agg", agg_0, "00005")
    shutil.rmtree(videos)
    shutil.copytree(world / "videos", videos)  # mended, the same command takes them in
    assert script(*flags(world, tmp_path / "agg", videos)).returncode == 0
    again, whole = contents(tmp_path / "agg"), contents(agg_0)
    assert again.keys() == whole.keys() and again["index.jsonl"] == whole["index.jsonl"]
    assert all(same_clip(tmp_path / "agg", agg_0, f"{i:05d}") for i in range(6))


def test_a_store_keeps_to_how_it_was_begun(world, agg_0):
    before = contents(agg_0)
    for extra, message in ((("--frames", "49"), "latents"), (("--seed", "1"), "seed = 0, not 1")):
        done = script(*flags(world, agg_0), *extra)
        assert done.returncode == 1 and f"was begun with {message}" in done.stderr
        assert "Traceback" not in done.stderr
    assert contents(agg_0) == before


def test_a_full_disk_keeps_what_is_done(world, tmp_path, monkeypatch, alone):
    write, written = data.write_clip, []

    def until_full(*args):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(args[0]))
        written.append(write(*args))
    monkeypatch.setattr(data, "write_clip", until_full)
    with pytest.raises(common.UserError, match="(?s)No space left.*2 finished clips are kept.*to continue"):
        prepare.main(prepare.Config(str(world / "videos"), str(world / "wan"), str(tmp_path / "agg")))
    assert len(list((tmp_path / "agg").glob("clips/*"))) == 2


@pytest.mark.parametrize("change,message", [
    (("--size", "100x100"), "multiples of 16"), (("--size", "big"), "not WIDTHxHEIGHT"),
    (("--frames", "80"), "one more than a multiple of 4"), (("--wan", "nowhere"), "nowhere"),
    (("--videos", "nowhere"), "no such folder: nowhere"), (("--out", "README.md/agg"), "README.md")])
def test_refusals(world, tmp_path, change, message):
    done = script(*flags(world, tmp_path / "agg"), *change)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not list(tmp_path.rglob("*.safetensors"))
