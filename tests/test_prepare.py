"""Stage 0: the store it makes, that ranks and kills change nothing, and its refusals."""

import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from worlds import call, disk_full_after, ended, run_stage, start, tree, tree_but_command, wait_until

import data
import prepare
import t5
import toy
import vae


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """toy.py's own output: 6 clips and a Wan directory."""
    folder = tmp_path_factory.mktemp("world")
    call("toy.py", "--out", folder, "--clips", 6)
    return folder


def flags(world, out, videos=None):
    return "--videos", videos or world / "videos", "--wan", world / "wan", "--out", out


@pytest.fixture(scope="module")
def agg_0(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("store") / "agg_0"
    printed = call("prepare.py", *flags(world, out)).stdout
    assert "6 clips" in printed and "0 skipped" in printed
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
    call("prepare.py", *flags(world, tmp_path / "agg"), ranks=2)
    assert tree_but_command(tmp_path / "agg") == tree_but_command(agg_0)


@pytest.mark.parametrize("when", ["text/00003", "clips/00001", "clips/00004"])
def test_killed_and_started_again_it_ends_the_same(world, agg_0, tmp_path, when):
    out = tmp_path / "agg"
    process = start("prepare.py", *flags(world, out))
    wait_until((out / f"{when}.safetensors").exists, process)
    process.kill()
    ended(process, -signal.SIGKILL)
    made = len(list(out.glob("clips/*.safetensors")))
    assert made < 6, "killed too late to show anything"
    assert not (out / "index.jsonl").exists(), "it comes last"
    call("prepare.py", *flags(world, out))
    assert tree_but_command(out) == tree_but_command(agg_0)


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
    printed = call("prepare.py", *flags(world, tmp_path / "agg", videos), ranks=2).stdout
    assert "1 clips" in printed and "5 skipped" in printed
    listed = (tmp_path / "agg" / "skipped.txt").read_text().splitlines()
    reasons = ["no caption", "is empty", "cannot be read", "too short", "12 fps is below 16"]
    for i, (line, reason) in enumerate(zip(listed, reasons, strict=True)):
        name = f"{i:05d}"
        assert name in line and reason in line and line in printed
    assert same_clip(tmp_path / "agg", agg_0, "00005")
    shutil.rmtree(videos)
    shutil.copytree(world / "videos", videos)  # mended, the same command takes them in
    call("prepare.py", *flags(world, tmp_path / "agg", videos))
    again, whole = tree(tmp_path / "agg"), tree(agg_0)
    assert again.keys() == whole.keys() and again["index.jsonl"] == whole["index.jsonl"]
    assert all(same_clip(tmp_path / "agg", agg_0, f"{i:05d}") for i in range(6))


def test_a_store_keeps_to_how_it_was_begun(world, agg_0):
    before = tree(agg_0)
    for extra, message in ((("--frames", "49"), "latents"), (("--seed", "1"), "seed = 0, not 1")):
        errors = call("prepare.py", *flags(world, agg_0), *extra, code=1).stderr
        assert f"was begun with {message}" in errors and "Traceback" not in errors
    assert tree(agg_0) == before


def test_a_full_disk_keeps_what_is_done(world, tmp_path):
    cfg = prepare.Config(str(world / "videos"), str(world / "wan"), str(tmp_path / "agg"))
    with disk_full_after(2):
        run_stage(prepare, cfg)
    assert len(list((tmp_path / "agg").glob("clips/*"))) == 2


@pytest.mark.parametrize("change,message", [
    (("--size", "100x100"), "multiples of 16"), (("--size", "big"), "not WIDTHxHEIGHT"),
    (("--frames", "80"), "one more than a multiple of 4"), (("--wan", "nowhere"), "nowhere"),
    (("--videos", "nowhere"), "no such folder: nowhere"), (("--out", "README.md/agg"), "README.md")])
def test_refusals(world, tmp_path, change, message):
    errors = call("prepare.py", *flags(world, tmp_path / "agg"), *change, code=1).stderr
    assert message in errors and "Traceback" not in errors
    assert not list(tmp_path.rglob("*.safetensors"))
