"""Stage 0: the store it makes, that ranks and kills change nothing, and its refusals."""

import os
import shutil
import signal
import tarfile
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from worlds import (
    call,
    disk_full_after,
    ended,
    fork_ranks,
    relative,
    run_stage,
    start,
    tree,
    tree_but_command,
    wait_until,
)

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


def test_batches_change_clips_by_rounding_only(world, agg_0, tmp_path):
    """One of a batch may be no video."""
    videos = tmp_path / "videos"
    shutil.copytree(world / "videos", videos)
    (videos / "00001.mp4").write_text("not a video")
    call("prepare.py", *flags(world, tmp_path / "agg", videos), "--batch", 3)
    ids = [clip["id"] for clip in data.Clips(tmp_path / "agg")]
    assert ids == ["00000", "00002", "00003", "00004", "00005"]
    for id in ids:
        made, alone = (load_file(data.clip_file(out, id))["latents"] for out in (tmp_path / "agg", agg_0))
        torch.testing.assert_close(made, alone, rtol=0.02, atol=0.02)


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
    assert again.keys() == whole.keys()
    a, b = ([clip | {"crc32": 0} for clip in data.Clips(folder)] for folder in (tmp_path / "agg", agg_0))
    assert a == b
    assert all(same_clip(tmp_path / "agg", agg_0, f"{i:05d}") for i in range(6))


def test_what_was_edited_or_damaged_is_made_anew_and_nothing_else(world, agg_0, tmp_path):
    """A caption, a video; a clip that is cut, an empty one. Afterwards as if it had been like this before."""
    videos = tmp_path / "videos"
    shutil.copytree(world / "videos", videos)
    (videos / "00000.txt").write_text("Something else")
    shutil.copy(videos / "00005.mp4", videos / "00001.mp4")
    out = tmp_path / "agg"
    shutil.copytree(agg_0, out)
    for id, size in (("00002", 5000), ("00003", 0)):
        os.truncate(data.clip_file(out, id), size)
    kept = {id: data.clip_file(out, id).stat().st_mtime_ns for id in ("00004", "00005")}
    cfg = prepare.Config((str(videos),), str(world / "wan"), str(out))
    run_stage(prepare, cfg)
    run_stage(prepare, replace(cfg, out=str(tmp_path / "new")))
    assert list(data.Clips(out))[0]["prompt"] == "Something else"
    assert all(same_clip(out, tmp_path / "new", f"{i:05d}") for i in range(6))
    assert same_clip(out, agg_0, "00003") and not same_clip(out, agg_0, "00001")
    assert len(data.Clips(out).load(0)["text"]) != len(data.Clips(agg_0).load(0)["text"])
    assert kept == {id: data.clip_file(out, id).stat().st_mtime_ns for id in kept}
    assert data.main(data.Flags("check", str(out))) == 0


def test_a_store_keeps_to_how_it_was_begun(world, agg_0):
    before = tree(agg_0)
    for extra, message in ((("--frames", "49"), "latents"), (("--seed", "1"), "seed = 0, not 1")):
        errors = call("prepare.py", *flags(world, agg_0), *extra, code=2).stderr
        assert f"was begun with {message}" in errors and "Traceback" not in errors
    assert tree(agg_0) == before


def test_a_full_disk_keeps_what_is_done(world, tmp_path):
    cfg = prepare.Config((str(world / "videos"),), str(world / "wan"), str(tmp_path / "agg"))
    with disk_full_after(2):
        run_stage(prepare, cfg)
    assert len(list((tmp_path / "agg").glob("clips/*"))) == 2


def test_shards_are_read_in_place_by_any_number_of_processes(world, agg_0, tmp_path):
    """Three clips in two tars: one process ends at a full disk, two go on."""
    shards = tmp_path / "shards"
    shards.mkdir()
    for i in range(3):
        with tarfile.open(shards / f"{i // 2:05d}.tar", "a") as tar:
            for suffix in ("txt", "mp4"):
                tar.add(world / "videos" / f"{i:05d}.{suffix}", f"{i:05d}.{suffix}")
    before = tree(shards)
    cfg = prepare.Config((str(shards),), str(world / "wan"), str(tmp_path / "agg"))
    with disk_full_after(1):
        run_stage(prepare, cfg)
    named = replace(cfg, videos=(str(shards / "00000.tar"), str(shards / "00001.tar")))
    fork_ranks(2, lambda: run_stage(prepare, named))
    clips = data.Clips(tmp_path / "agg")
    known = data.Clips(agg_0)
    assert [clip["source"] for clip in clips] == [f"{i // 2:05d}.tar/{i:05d}.mp4" for i in range(3)]
    for i in range(3):
        assert torch.equal(clips.load(i)["latents"], known.load(i)["latents"])
        assert clips[i]["prompt"] == known[i]["prompt"]
    assert tree(shards) == before


def test_miradata_from_its_uncut_videos(world, agg_0, tmp_path, capsys):
    """Two clips one after another in one video, a third whose video is not there, and another source."""
    known = data.Clips(agg_0)
    raw = tmp_path / "raw_video" / "000000000" / "000000000123_vi-deo.mp4"
    raw.parent.mkdir(parents=True)
    frames = [toy.render(toy.draw_world(0, i), 81) for i in range(2)]
    data.write_video(raw.with_name("000000000123_vi.mp4"), frames, 16)
    rows = [f"000000000{number}_vi-deo-{i:06d},{81 * i},{81 * i + 81},16,pexels,dense {i}"
            for i, number in enumerate((123, 123, 124))] + ["000000000125_x-000000,0,81,16,youtube,no"]
    table = tmp_path / "miradata.csv"
    header = "index,start_frame,end_frame,fps,source,dense_caption"
    table.write_text("\n".join([header, *rows, ",,,,,\n"]))
    cfg = prepare.Config((str(table),), str(world / "wan"), str(tmp_path / "agg"), where="source=pexels",
                         root=(str(tmp_path / "clip_video"), str(tmp_path / "raw_video")))
    assert run_stage(prepare, cfg) is None
    clips = data.Clips(tmp_path / "agg")
    assert [clip["id"] for clip in clips] == [f"000000000123_vi-deo-{i:06d}" for i in range(2)]
    assert [clip["prompt"] for clip in clips] == ["dense 0", "dense 1"]
    assert clips[1]["source"] == "000000000123_vi.mp4 (5.0625 s to 10.125 s)"
    for i in range(2):  # h264 has been at it once more
        assert relative(clips.load(i)["latents"], known.load(i)["latents"]) < 0.1
        assert relative(clips.load(i)["latents"], known.load(1 - i)["latents"]) > 0.3
    lost = f"no such file: {tmp_path}/clip_video/000000000/000000000124_vi-deo-000002.mp4"
    assert (tmp_path / "agg/skipped.txt").read_text() == f"{lost}\n"
    printed = capsys.readouterr().out
    assert "3 videos in" in printed and f"skipped: {lost}" in printed and "2 clips in" in printed
    before = tree(tmp_path / "agg/clips")
    shutil.rmtree(tmp_path / "raw_video")  # clips that are made need their videos no more
    run_stage(prepare, cfg)
    assert tree(tmp_path / "agg/clips") == before and len(data.Clips(tmp_path / "agg")) == 2
    capsys.readouterr()
    assert run_stage(prepare, replace(cfg, out=str(tmp_path / "other"))) == 2
    errors = capsys.readouterr().err
    assert "none of the 3 videos can be used" in errors and "--root FOLDER says where" in errors
    assert "no such file: " in errors and not (tmp_path / "other").exists()


def test_the_screen_is_not_flooded_with_reasons(world, tmp_path, capsys):
    table = tmp_path / "list.csv"
    names = [f"lost{i:02d}.mp4" for i in range(25)] + [str(world / "videos" / "00000.mp4")]
    table.write_text("video,caption\n" + "".join(f"{name},x\n" for name in names))
    run_stage(prepare, prepare.Config((str(table),), str(world / "wan"), str(tmp_path / "agg")))
    printed = capsys.readouterr().out
    assert printed.count("skipped: no such file") == 20 and "skipped: 5 more" in printed
    assert len((tmp_path / "agg/skipped.txt").read_text().splitlines()) == 25


@pytest.mark.parametrize("change,message", [
    (("--size", "100x100"), "multiples of 16"), (("--size", "big"), "give WIDTHxHEIGHT"),
    (("--frames", "80"), "one more than a multiple of 4"), (("--wan", "nowhere"), "nowhere"),
    (("--videos", "nowhere"), "no such folder: nowhere"), (("--out", "README.md/agg"), "README.md")])
def test_refusals(world, tmp_path, change, message):
    errors = call("prepare.py", *flags(world, tmp_path / "agg"), *change, code=2).stderr
    assert message in errors and "Traceback" not in errors
    assert not list(tmp_path.rglob("*.safetensors"))
