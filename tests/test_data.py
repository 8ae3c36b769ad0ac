"""Videos, captions, the clip store and the order of training, each against something counted by hand."""

import itertools
import json
import math
import os
import struct
import sys
import tarfile
import time
import tracemalloc
import weakref
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from worlds import read_video, umask

import common
import data
import files

BITS, BAR = 10, 16  # a frame shows its number as 10 bars, black or white, 16 pixels wide: h264 cannot hurt it
WIDTH, HEIGHT = BITS * BAR, 32


def numbered(number):
    bars = [255 * (number >> bit & 1) for bit in range(BITS)]
    return np.broadcast_to(np.repeat(np.uint8(bars), BAR)[None, :, None], (HEIGHT, WIDTH, 3)).copy()


def numbered_tensor(first, last):
    return torch.stack([torch.from_numpy(numbered(n)) for n in range(first, last)]).permute(0, 3, 1, 2)


def numbers(clip):
    bars = clip[:, 1, clip.shape[2] // 2, BAR // 2::BAR].int() > 127
    return (bars * 2 ** torch.arange(BITS)).sum(1).tolist()


def make(path, rate=16, count=40, times=None, images=None, gop=12, codec=None, rotation=0, aspect=None,
         x264="", container=None):
    """A video of numbered frames; times are seconds (Fraction), by default n / rate."""
    times = times or [n / Fraction(rate) for n in range(len(images or range(count)))]
    images = images or [numbered(n) for n in range(len(times))]
    base = 1 / Fraction(rate) if all(t * rate % 1 == 0 for t in times) else Fraction(1, 90000)
    codec = codec or ("mpeg4" if str(path).endswith("avi") else "libx264")
    with av.open(str(path), "w", container_options=container or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuv444p" if stream.width % 2 or stream.height % 2 else "yuv420p"
        stream.options = {"g": str(gop)}
        if codec == "libx264":
            stream.options |= {"preset": "ultrafast", "bf": "3", "b-adapt": "0", "crf": "10"}
            stream.options |= {"x264-params": x264}
        stream.codec_context.time_base = base
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        for t, image in zip(times, images, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(t / base), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def shown(times, count, fps=16, start=0, early=0):
    """Sample-and-hold by its definition: the last frame that has begun at each instant."""
    instants = [Fraction(start + i, fps) for i in range(count)]
    return [max(n for n, t in enumerate(times) if t - times[0] <= instant + early) for instant in instants]


# -------------------------------------------------------------------------------------------- videos in

RATES = [16, Fraction(24000, 1001), 24, 25, Fraction(30000, 1001), 30, 50, 60]


@pytest.mark.parametrize("rate", RATES, ids=str)
@pytest.mark.parametrize("suffix, delay", [("mp4", 0), ("mp4", 1), ("mkv", 0), ("mkv", 1), ("avi", 0)])
def test_resampling_is_sample_and_hold(tmp_path, rate, suffix, delay):
    frames = math.ceil(2 * rate) + 1
    times = [delay * 7 / Fraction(rate) + n / Fraction(rate) for n in range(frames)]
    video = data.probe(make(tmp_path / f"a.{suffix}", rate, times=times))
    assert video.fps == rate and video.frames == frames and (video.width, video.height) == (WIDTH, HEIGHT)
    assert abs(video.duration - frames / Fraction(rate)) <= (Fraction(1, 500) if suffix == "mkv" else 0)
    if suffix == "mkv":  # mp4 and avi keep these times exactly
        times = [Fraction(round(1000 * t), 1000) for t in times]
    early = Fraction(1, 10_000 if suffix == "mp4" else 1000)  # a tick
    for start, count in ((0, 31), (5, 20), (-9, 9)):
        first = start if start >= 0 else math.ceil(16 * frames / Fraction(rate)) + start
        assert numbers(data.read_clip(video, count, 16, start=start)) == shown(times, count, 16, first, early)


def test_variable_frame_rate(tmp_path):
    rng = np.random.default_rng(0)
    times = [Fraction(int(t), 90000) for t in np.cumsum(rng.integers(1000, 5000, 100))]
    video = data.probe(make(tmp_path / "a.mp4", rate=30, times=times))
    assert numbers(data.read_clip(video, 40, 16, start=3)) == shown(times, 40, 16, 3)


def test_every_seek_is_exact_and_decodes_no_more_than_a_gop(tmp_path, monkeypatch):
    decoded = []
    decode_from = data.decode_from
    monkeypatch.setattr(data, "decode_from", lambda *a: (decoded.append(0) or f for f in decode_from(*a)))
    for suffix in ("mp4", "mkv", "mov", "avi"):
        video = data.probe(make(tmp_path / f"a.{suffix}", 32, 200))
        for start in range(0, 96):
            decoded.clear()
            assert numbers(data.read_clip(video, 2, 16, start=start)) == [2 * start, 2 * start + 2]
            # from the key frame to the frame after the crop
            assert len(decoded) <= 12 + 2 + 1


def test_frames_before_a_key_frame_that_is_decoded_earlier(tmp_path):
    """In an open GOP a seek of an mp4 lands too late; the way back must be found."""
    x264 = "open-gop=1:bframes=8:b-adapt=0:keyint=20:min-keyint=20:scenecut=0"
    video = data.probe(make(tmp_path / "a.mp4", 16, 100, x264=x264))
    assert [numbers(data.read_clip(video, 1, 16, start=i)) for i in range(100)] == [[i] for i in range(100)]


def test_recordings_that_tell_neither_length_nor_rate(tmp_path):
    video = data.probe(make(tmp_path / "a.mkv", 25, 50, container={"live": "1"}))
    assert (video.fps, video.duration, video.frames) == (25, 2, 50)
    assert numbers(data.read_clip(video, 3, 25, start=-3)) == [47, 48, 49]


def test_times_that_run_backwards_are_refused(tmp_path):
    """An avi knows no order of display: h264 with B-frames in it would come out shuffled."""
    video = data.probe(make(tmp_path / "a.avi", 16, 40, codec="libx264"))
    with pytest.raises(common.UserError, match="no usable times; convert it to mp4"):
        data.read_clip(video, 16, 16)


def test_crops_are_random_but_fixed(tmp_path):
    video = data.probe(make(tmp_path / "a.mp4", 16, 40))
    starts = [data.random_start(video, 33, 16, 0, f"clip {i}") for i in range(100)]
    assert set(starts) == set(range(8)), "all of the eight places, and no other"
    assert starts == [data.random_start(video, 33, 16, 0, f"clip {i}") for i in range(100)]
    assert starts != [data.random_start(video, 33, 16, 1, f"clip {i}") for i in range(100)]
    assert numbers(data.read_clip(video, 33, 16, start=7)) == list(range(7, 40))
    with pytest.raises(AssertionError, match="start 8 of 8"):
        data.read_clip(video, 33, 16, start=8)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_a_clip_of_exactly_the_length_has_one_crop(tmp_path, suffix):
    video = data.probe(make(tmp_path / f"a.{suffix}", 16, 81))
    assert data.count_crops(video, 81, 16) == 1
    assert numbers(data.read_clip(video)) == list(range(81))
    with pytest.raises(common.UserError, match=r"too short: 82 frames at 16 fps need 5.12 s, it has 5.06 s"):
        data.count_crops(video, 82, 16)
    with pytest.raises(common.UserError, match=r"82 frames at 15.98 fps need 5.13 s"):
        data.count_crops(video, 82, Fraction(1598, 100))


def test_slow_videos_are_refused(tmp_path):
    make(tmp_path / "slow.mp4", 12, 80)
    with pytest.raises(common.UserError, match="slow.mp4: its 12 fps is below 16"):
        data.read_clip(data.probe(tmp_path / "slow.mp4"), 16, 16)
    almost = data.probe(make(tmp_path / "almost.mp4", Fraction(1598, 100), 40))
    times = [n / Fraction(1598, 100) for n in range(40)]
    assert numbers(data.read_clip(almost, 33, 16)) == shown(times, 33, early=Fraction(1, 10_000))


def test_long_videos_stream(tmp_path):
    video = data.probe(make(tmp_path / "a.mp4", Fraction(30000, 1001), 100))
    assert numbers(read_video(video.path)) == list(range(100))
    half = torch.stack(list(data.read_frames(video, fps=15)))
    times = [n * Fraction(1001, 30000) for n in range(100)]
    assert numbers(half) == shown(times, 51, 15)  # 3.337 s * 15 = 50.05


def quadrants(height, width):
    """Red, green / blue, white, so that every turn and mirror image is another picture."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:height // 2, :width // 2] = 255, 0, 0
    image[:height // 2, width // 2:] = 0, 255, 0
    image[height // 2:, :width // 2] = 0, 0, 255
    image[height // 2:, width // 2:] = 255, 255, 255
    return image


def looks_like(frame, image, tolerance=6) -> bool:
    """Equal but for what h264 and chroma at half resolution do around edges."""
    wrong = (frame.permute(1, 2, 0).int() - torch.from_numpy(image.copy()).int()).abs() > tolerance
    return wrong.float().mean() < 0.08


@pytest.mark.parametrize("rotation, quarter", [(0, 0), (90, 1), (180, 2), (-90, 3)])
def test_phone_videos_are_turned_upright(tmp_path, rotation, quarter):
    image, upright = quadrants(128, 192), np.rot90(quadrants(128, 192), quarter)
    video = data.probe(make(tmp_path / "a.mp4", images=[image] * 20, rotation=rotation))
    assert (video.height, video.width) == upright.shape[:2]
    assert looks_like(data.read_clip(video, 1, 16)[0], upright)
    wide = data.read_clip(video, 1, 16, size=(80, 40))[0]
    lying = quadrants(80, 40) if quarter % 2 else quadrants(40, 80)
    assert wide.shape == (3, 40, 80) and looks_like(wide, np.rot90(lying, quarter))


@pytest.mark.parametrize("source, size", [((64, 96), (48, 32)), ((96, 64), (48, 32)), ((33, 75), (50, 70))])
def test_resize_covers_and_crops_about_the_centre(tmp_path, source, size):
    height, width = source
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0] = np.linspace(40, 200, width)[None]
    ramp[..., 1] = np.linspace(40, 200, height)[:, None]
    clip = data.read_clip(data.probe(make(tmp_path / "a.mp4", images=[ramp] * 20)), 2, 16, size=size)
    assert clip.shape == (2, 3, size[1], size[0]) and clip.dtype == torch.uint8
    scale = max(size[0] / width, size[1] / height)
    for channel, axis, wanted, had in ((0, 2, size[0], width), (1, 1, size[1], height)):
        kept = wanted / scale / had  # the share of that side that is seen
        seen = clip[0, channel].float().mean(2 - axis)
        assert seen.mean() == pytest.approx(120, abs=3), "the centre stays the centre"
        assert seen[-2] - seen[1] == pytest.approx(160 * kept * (wanted - 3) / wanted, abs=6)


def test_wide_pixels_are_shown_wide(tmp_path):
    video = data.probe(make(tmp_path / "a.mp4", images=[quadrants(64, 64)] * 20, aspect=Fraction(3, 2)))
    assert (video.width, video.height) == (96, 64)
    assert looks_like(data.read_clip(video, 1, 16)[0], quadrants(64, 96))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_image_is_a_video_of_one_frame(tmp_path, suffix):
    av.VideoFrame.from_ndarray(quadrants(64, 96), format="rgb24").save(str(tmp_path / f"a.{suffix}"))
    image = data.read_image(tmp_path / f"a.{suffix}", size=(48, 32))
    assert image.shape == (1, 3, 32, 48) and looks_like(image[0], quadrants(32, 48), 12)
    (tmp_path / f"a.{suffix}").write_bytes((tmp_path / f"a.{suffix}").read_bytes()[:20])
    with pytest.raises(common.UserError, match=f"a.{suffix} cannot be read"):
        data.read_image(tmp_path / f"a.{suffix}")


# -------------------------------------------------------------------------------------------- bad input

def sound_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def cut(path, share):
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])


def test_each_bad_file_says_what_is_wrong(tmp_path):
    sound_only(tmp_path / "sound.mp4")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("once upon a time\n" * 100)
    (tmp_path / "folder.mp4").mkdir()
    cut(make(tmp_path / "headless.mp4"), 0.7)  # the table of contents comes last
    data.write_video(tmp_path / "cut.mp4", [numbered_tensor(0, 600)], 16)
    (tmp_path / "bitten.mp4").write_bytes((tmp_path / "cut.mp4").read_bytes()[:-10])
    cut(tmp_path / "cut.mp4", 0.5)  # here it comes first, and promises more than there is
    for name, reason in (("sound", "has no video stream"), ("empty", r"is empty \(0 bytes\)"),
                         ("text", "cannot be read as a video"), ("folder", "is a folder, not a video"),
                         ("headless", "cannot be read as a video"), ("missing", "no such file"),
                         ("cut", "is truncated: the end of its 37.5 s cannot be read"),
                         ("bitten", "is truncated: the end of its 37.5 s cannot be read")):
        with pytest.raises(common.UserError, match=reason) as error:
            data.probe(tmp_path / f"{name}.mp4")
        assert f"{name}.mp4" in str(error.value) and "\n" not in str(error.value)


def test_damage_within_a_crop_is_not_papered_over(tmp_path):
    """A file that loses its end after it was probed must not freeze on its last good frame."""
    data.write_video(tmp_path / "a.mp4", [numbered_tensor(0, 600)], 16)
    video = data.probe(tmp_path / "a.mp4")
    cut(tmp_path / "a.mp4", 0.5)
    with pytest.raises(common.UserError, match="a.mp4"):
        data.read_clip(video, 81, 16, start=300)


def test_a_phone_trims_without_cutting(tmp_path):
    """Trimming writes an edit list: show 3 s from 0.5 s on; what lies outside must not be seen."""
    path = make(tmp_path / "a.mp4", 16, 80)
    with av.open(str(path)) as container:
        ticks = round(1 / container.streams.video[0].time_base)
    content = bytearray(path.read_bytes())
    place = content.index(b"elst") + 12  # the duration in ms, then the first timestamp
    [begin] = struct.unpack_from(">i", content, place + 4)
    struct.pack_into(">Ii", content, place, 3000, begin + ticks // 2)
    path.write_bytes(content)
    video = data.probe(path)
    assert video.duration == 3 and video.frames == 48
    assert numbers(data.read_clip(video, 48, 16)) == list(range(8, 56))


def test_cover_art_is_not_a_video(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuvj420p"
        stream.disposition = av.stream.Disposition.attached_pic
        container.mux(stream.encode(av.VideoFrame(32, 32, "yuvj420p")))
        container.mux(stream.encode())
    with pytest.raises(common.UserError, match="has no video stream"):
        data.probe(tmp_path / "a.mp4")


# --------------------------------------------------------------------------------- parts of larger files

CUTS = [(0, 40), (37, 117), (48, 90), (100, 150)]


@pytest.mark.parametrize("digits", [3, 12])
@pytest.mark.parametrize("rate, fps", [(16, 16), (30, 30), (Fraction(24000, 1001), 23.97602398),
                                       (Fraction(30000, 1001), 29.97)], ids=str)
def test_a_range_has_the_frames_of_a_cut(tmp_path, rate, fps, digits):
    """With times that are rounded to milliseconds, or follow from a rounded fps, as in lists of videos."""
    whole = make(tmp_path / "whole.mp4", rate, 150)
    for first, last in CUTS:
        images = [numbered(n) for n in range(first, last)]
        cut = data.probe(make(tmp_path / "cut.mp4", rate, images=images))
        part = data.probe(data.Excerpt(whole, round(first / fps, digits), round(last / fps, digits)))
        assert (part.begin, part.fps) == (first / Fraction(rate), rate)
        assert part.duration == pytest.approx(float(cut.duration), abs=1e-3)
        count = data.count_crops(cut, 9, 16)
        assert data.count_crops(part, 9, 16) == count
        for start in (0, count // 2, count - 1):
            assert numbers(data.read_clip(part, 9, 16, start=start)) == \
                numbers(data.read_clip(cut, 9, 16, start=start))


@pytest.mark.parametrize("rate", [24, Fraction(30000, 1001)], ids=str)
def test_a_range_of_a_file_whose_times_are_rounded(tmp_path, rate):
    whole = make(tmp_path / "whole.mkv", rate, 150)
    times = [Fraction(round(1000 * n / Fraction(rate)), 1000) for n in range(150)]
    for first, last in CUTS:
        part = data.probe(data.Excerpt(whole, float(first / rate), float(last / rate)))
        for start in (0, 3):
            expected = [first + n for n in shown(times[first:last], 9, 16, start, Fraction(1, 1000))]
            assert numbers(data.read_clip(part, 9, 16, start=start)) == expected


def test_a_range_decodes_no_more_than_it_needs(tmp_path, monkeypatch):
    decoded = []
    decode_from = data.decode_from
    monkeypatch.setattr(data, "decode_from", lambda *a: (decoded.append(0) or f for f in decode_from(*a)))
    part = data.probe(data.Excerpt(make(tmp_path / "a.mp4", 32, 200), 5.0, 6.0))
    assert len(decoded) <= 12 + 1
    decoded.clear()
    assert numbers(torch.stack(list(data.read_frames(part, 16)))) == list(range(160, 192, 2))
    assert len(decoded) <= 12 + 32 + 1


def test_ranges_that_are_not_in_the_video(tmp_path):
    path = make(tmp_path / "a.mp4", 16, 40)
    assert numbers(data.read_clip(data.probe(data.Excerpt(path, 1.5)), 16, 16)) == list(range(24, 40))
    assert data.probe(data.Excerpt(path, 1.5, 99.0)).duration == 1
    between = data.probe(data.Excerpt(path, 1.51, 1.52))  # two frames are shown then, and none begins
    with pytest.raises(common.UserError, match=r"a.mp4 \(1.51 s to 1.52 s\) is too short: .* it has 0.00 s"):
        data.read_clip(between, 1, 16)
    for start, end, times in ((2.5, 9.0, "2.5 s to 9 s"), (7.0, None, "7 s to the end"),
                              (2.0, 1.0, "2 s to 1 s")):
        with pytest.raises(common.UserError, match=f"a.mp4 .{times}. holds nothing: the video ends at 2.50"):
            data.probe(data.Excerpt(path, start, end))
    with pytest.raises(common.UserError, match=r"no such file: .*b.mp4 \(0 s to 1 s\)"):
        data.probe(data.Excerpt(tmp_path / "b.mp4", 0.0, 1.0))


def test_a_member_of_a_tar_is_read_in_place(tmp_path):
    names = ["a.mp4", "b, c: d.mkv", "cut.mp4", "empty.mp4"]  # in the tar, bytes follow those of the cut one
    for i, name in enumerate(names[:2]):
        make(tmp_path / name, 16, images=[numbered(n + 100 * i) for n in range(60)])
    data.write_video(tmp_path / "cut.mp4", numbered_tensor(0, 600), 16)
    cut(tmp_path / "cut.mp4", 0.5)  # its table of contents comes first, and promises more than there is
    (tmp_path / "empty.mp4").touch()
    shard = tmp_path / "s, h\u00e4: d.tar"
    with tarfile.open(shard, "w") as tar:
        for name in names:
            tar.add(tmp_path / name, name)
        tar.add(__file__, "notes.txt")
    for name in names:
        (tmp_path / name).unlink()
    with tarfile.open(shard) as tar:
        members = {m.name: data.Excerpt(shard, member=m.name, offset=m.offset_data, size=m.size) for m in tar}
    for i, name in enumerate(names[:2]):
        video = data.probe(members[name])
        assert (video.frames, video.path.name) == (60, f"{shard.name}/{name}")
        assert numbers(read_video(video.path)) == list(range(100 * i, 100 * i + 60))
        assert numbers(data.read_clip(video, 9, 16, start=40)) == list(range(100 * i + 40, 100 * i + 49))
    part = data.probe(members["a.mp4"]._replace(start=1.0, end=2.0))
    assert numbers(data.read_clip(part, 16, 16)) == list(range(16, 32))
    for name, reason in (("cut.mp4", "is truncated"), ("empty.mp4", r"is empty \(0 bytes\)")):
        with pytest.raises(common.UserError, match=f"{shard.name}/{name} {reason}"):
            data.probe(members[name])


# ------------------------------------------------------------------------------------------- videos out

def test_float_and_uint8_are_inverse():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(data.to_uint8(data.to_float(levels)), levels)
    assert data.to_float(levels)[[0, -1]].tolist() == [-1, 1]
    assert data.to_uint8(torch.tensor([-1.5, -1, 0.002, 1, 1.5])).tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("fps", [16, Fraction(24000, 1001), 29.97], ids=str)
def test_written_videos_keep_frames_rate_and_colours(tmp_path, fps):
    frames = numbered_tensor(0, 50)
    # a mix of everything the stages hand over: uint8 and float, single frames and chunks
    data.write_video(tmp_path / "a.mp4", [frames[0], frames[1:30], data.to_float(frames[30:])], fps)
    assert b" mbtree=0 " in (tmp_path / "a.mp4").read_bytes(), "else its bytes now and then differ"
    video = data.probe(tmp_path / "a.mp4")
    assert video.fps == Fraction(fps).limit_denominator(1001) and video.frames == 50
    read = read_video(video.path)
    assert numbers(read) == list(range(50))
    assert (read.float() - frames).abs().mean() < 2
    with av.open(str(tmp_path / "a.mp4")) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range) == (1, 1, 1, 1)
        assert container.streams.video[0].codec_context.name == "h264"


def test_colours_come_back_as_they_were(tmp_path):
    data.write_video(tmp_path / "a.mp4", [torch.from_numpy(quadrants(64, 96)).permute(2, 0, 1)] * 8, 16)
    frame = next(data.read_frames(data.probe(tmp_path / "a.mp4")))
    for y, x in ((16, 24), (16, 72), (48, 24), (48, 72)):  # BT.601 would be 20 off
        assert (frame[:, y, x].int() - torch.tensor(quadrants(64, 96)[y, x].tolist())).abs().max() <= 4


def test_crf_trades_size_for_fidelity(tmp_path):
    noise = torch.randint(0, 256, (8, 3, 64, 64), generator=common.rng("noise"), dtype=torch.uint8)
    for crf in (10, 40):
        data.write_video(tmp_path / f"{crf}.mp4", noise, 16, crf=crf, preset="ultrafast")
    assert (tmp_path / "40.mp4").stat().st_size * 3 < (tmp_path / "10.mp4").stat().st_size
    with pytest.raises(common.UserError, match="preset quick"):
        data.write_video(tmp_path / "a.mp4", noise, 16, preset="quick")


TAGS = {"prompt": 'a "red" disc\nmoves left \\ na\u00efve \u901f\u3044 \U0001f642', "seed": 7,
        "solver": {"steps": 20, "w": 3.5}, "command": ["sample.py", "--prompt", "it's; `so`"],
        "long": "word " * 20_000}


def test_tags_come_back(tmp_path):
    data.write_video(tmp_path / "a.mp4", torch.zeros(2, 3, 32, 32), 16, TAGS)
    assert data.read_tags(tmp_path / "a.mp4") == TAGS
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.metadata["title"] == TAGS["prompt"], "players show it"
    assert data.read_tags(make(tmp_path / "b.mp4")) == {}
    for comment in ("a nice day", "7"):
        with av.open(str(tmp_path / "c.mp4"), "w") as container:
            container.metadata["comment"] = comment
            stream = container.add_stream("libx264", rate=16)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            container.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
            container.mux(stream.encode())
        assert data.read_tags(tmp_path / "c.mp4") == {}


def test_writing_streams(tmp_path):
    """A long video must never be held whole: most pieces are encoded before the last is made."""
    alive = set()
    most = 0

    def pieces():
        nonlocal most
        for n in range(120):
            piece = torch.zeros(4, 3, 32, 32)
            alive.add(n)
            weakref.finalize(piece, alive.discard, n)
            most = max(most, len(alive))
            yield piece
            del piece

    data.write_video(tmp_path / "a.mp4", pieces(), 16)
    assert data.probe(tmp_path / "a.mp4").frames == 480 and most <= 3


def test_a_video_appears_whole_or_not_at_all(tmp_path):
    def failing():
        yield from torch.rand(200, 3, 32, 32)  # more than the encoder looks ahead
        raise RuntimeError("out of memory")

    path = tmp_path / "a.mp4"
    with pytest.raises(RuntimeError, match="out of memory"):
        data.write_video(path, failing(), 16)
    assert list(tmp_path.iterdir()) == []
    data.write_video(path, torch.zeros(5, 3, 32, 32), 16)
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="out of memory"):
        data.write_video(path, failing(), 16)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


def test_odd_sizes_are_refused(tmp_path):
    with pytest.raises(common.UserError, match="even width and height, not 33x32"):
        data.write_video(tmp_path / "a.mp4", torch.zeros(5, 3, 32, 33), 16)
    with pytest.raises(common.UserError, match="cannot write .*No such file or directory"):
        data.write_video(tmp_path / "nowhere" / "a.mp4", torch.zeros(5, 3, 32, 32), 16)
    with pytest.raises(AssertionError, match="no frames"):
        data.write_video(tmp_path / "a.mp4", [], 16)
    with pytest.raises(AssertionError, match="size changed"):
        data.write_video(tmp_path / "a.mp4", [torch.zeros(3, 32, 32), torch.zeros(3, 64, 32)], 16)
    assert list(tmp_path.iterdir()) == []


def test_png_is_lossless_whatever_its_name(tmp_path):
    image = torch.randint(0, 256, (3, 31, 45), generator=common.rng("png"), dtype=torch.uint8)
    data.write_png(tmp_path / "a b", image)
    assert (tmp_path / "a b").read_bytes().startswith(b"\x89PNG")
    assert torch.equal(data.read_image(tmp_path / "a b")[0], image)


def test_film_strip_places_every_frame(tmp_path):
    rows = [torch.full((3, 3, 20, 30), 10, dtype=torch.uint8), torch.full((2, 3, 40, 60), -1.0)]
    data.film_strip(tmp_path / "a.png", rows, height=20, gap=4)
    [strip] = data.read_image(tmp_path / "a.png")
    assert strip.shape == (3, 2 * 24, 3 * 34)
    expected = torch.full((2 * 24, 3 * 34), 255)
    for column in range(3):
        expected[:20, 34 * column:34 * column + 30] = 10
        expected[24:44, 34 * column:34 * column + 30] = 0 if column < 2 else 255
    assert torch.equal(strip.int(), expected.expand(3, -1, -1).int())


# --------------------------------------------------------------------------------------- the clip store

def entry(n, kind="seed", **more):
    return {"id": f"c{n}", "file": f"clips/c{n}.safetensors", "prompt": f"number {n}", "kind": kind,
            "round": 0, "source": f"c{n}.mp4"} | more


def numbered_store(folder, n=4, **more):
    folder.mkdir(exist_ok=True)
    for i in range(n):
        data.write_clip(folder, f"c{i}", torch.full((3, 4, 2, 2), float(i)),
                        torch.full((i + 1, 8), float(i)), f"number {i}", f"c{i}.mp4")
    data.write_index(folder, [entry(i, **more) for i in range(n)])
    return data.Clips(folder)


def test_store_round_trip(tmp_path):
    clips = numbered_store(tmp_path / "agg_0")
    nasty = entry(4, "corrective", prompt='"kind": "seed" \u901f\u3044\n"kind', source='"kind')
    data.write_index(tmp_path / "agg_0", [*clips, nasty])
    meta = {"fps": 16, "size": [832, 480], "command": ["prepare.py", "--data", "\u00fc"]}
    common.claim(Path(tmp_path / "agg_0", "meta.json"), meta)
    assert len(clips) == 4, "a store is what it was when it was opened"
    clips = data.Clips(tmp_path / "agg_0")
    assert clips.kinds == ["seed"] * 4 + ["corrective"]
    assert [clips[i] for i in range(4)] == [entry(i) for i in range(4)] == list(clips)[:4]
    assert clips[4] == nasty
    loaded = clips.load(2)
    assert {k: v for k, v in loaded.items() if k not in ("latents", "text")} == entry(2)
    assert loaded["latents"].dtype == data.LATENT_DTYPE and loaded["latents"].shape == (3, 4, 2, 2)
    assert (loaded["latents"] == 2).all() and torch.equal(loaded["text"], torch.full((3, 8), 2.0))
    assert clips.meta() == meta
    _, about = common.open_weights(data.clip_file(tmp_path / "agg_0", "c2"))
    assert about.pop("crc32") and about == {"prompt": "number 2", "source": "c2.mp4"}
    data.write_index(tmp_path / "agg_0", [nasty, entry(0)])
    assert list(data.Clips(tmp_path / "agg_0")) == [nasty, entry(0)]
    with pytest.raises(common.UserError, match="is not a clip store"):
        data.Clips(tmp_path)


def test_lists_written_by_other_tools(tmp_path):
    lines = [json.dumps(entry(0, "corrective"), separators=(",", ":")), json.dumps(entry(1), sort_keys=True)]
    (tmp_path / "index.jsonl").write_text("\n".join(lines) + "\n")
    assert data.Clips(tmp_path).kinds == ["corrective", "seed"]
    (tmp_path / "index.jsonl").write_text("\n".join(lines) + '\n{"id": "kind"}\n')
    with pytest.raises(common.UserError, match="index.jsonl:3: a clip without a kind"):
        data.Clips(tmp_path)
    (tmp_path / "index.jsonl").write_text('{"kind": "seed", oops}\n')
    with pytest.raises(common.UserError, match="index.jsonl:1: not valid JSON"):
        data.Clips(tmp_path)[0]


def test_a_list_that_is_cut_off_is_refused(tmp_path):
    whole = "".join(json.dumps(entry(i, prompt="\u00fc\n\u901f")) + "\n" for i in range(2)).encode()
    (tmp_path / "index.jsonl").write_bytes(whole)
    assert len(data.Clips(tmp_path)) == 2
    for length in range(1, len(json.dumps(entry(2)))):
        (tmp_path / "index.jsonl").write_bytes(whole + json.dumps(entry(2)).encode()[:length])
        with pytest.raises(common.UserError, match="index.jsonl:3: the last line is cut off"):
            data.Clips(tmp_path)


def test_a_store_is_made_by_its_writer(tmp_path, ranks, monkeypatch):
    """Begun, gone on with, finished; until then nobody takes it for a store."""
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--out", "a b"])
    folder = tmp_path / "agg_0"
    entries = [data.index_entry(f"c{i}", f"number {i}", "seed", 0, "a.mp4") for i in range(20)]

    class Encoder:
        seen = []

        def encode(self, given):
            self.seen.append(len(given))
            return [torch.full((2, 8), float(text.split()[1])) for text in given]

    def make(upto):
        store = data.Writer(folder, ranks, {"fps": 16}, entries)
        todo = store.share(3)
        store.stage_texts(Encoder, "captions")
        for batch in todo:
            for id in batch:
                if int(id[1:]) >= upto:
                    return store, todo
                text = torch.ones(2, 8) if store.has(id) else store.staged_text(id)
                store.write(id, torch.zeros(3, 4, 2, 2), text)
        store.finish()
        return store, todo
    make(4)
    (folder / "clips/.c9.safetensors.12.tmp").write_text("half")
    with pytest.raises(common.UserError, match="agg_0 is not finished: .*\nprepare.py --out 'a b'"):
        data.Clips(folder)
    assert Encoder.seen == [16, 4] and len(list(folder.glob("text/*"))) == 16
    kept = data.clip_file(folder, "c3").stat().st_mtime_ns
    store, todo = make(20)
    assert todo[0] == ["c3", "c4", "c5"] and len(todo) == 6, "the batch that was begun, as a whole"
    assert Encoder.seen == [16, 4] and data.clip_file(folder, "c3").stat().st_mtime_ns == kept
    assert [clip["id"] for clip in data.Clips(folder)] == [f"c{i}" for i in range(20)]
    assert (data.Clips(folder).load(7)["text"] == 7).all()
    assert {p.name for p in folder.iterdir()} == {files.MARK, "clips", "meta.json", "index.jsonl"}
    assert len(list(folder.glob("clips/*"))) == 20 and not list(folder.rglob(".*.tmp"))
    with pytest.raises(common.UserError, match="was begun with fps = 16, not 24"):
        data.Writer(folder, ranks, {"fps": 24}, entries)
    with pytest.raises(common.UserError, match="no space(?s:.*)20 finished clips are kept in"):
        with store.keeping():
            raise OSError("no space")


def test_a_store_refers_to_its_neighbours_but_not_beyond_the_root(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    numbered_store(root / "agg_0")
    numbered_store(tmp_path / "outside")
    (root / "agg_1").mkdir()
    (root / "agg_1" / "sly").symlink_to(tmp_path / "outside")
    (root / "agg_1" / "near").symlink_to(root / "agg_0")
    files = ["../agg_0/clips/c1.safetensors", "near/clips/c2.safetensors",
             "../../outside/clips/c1.safetensors", str(tmp_path / "outside/clips/c1.safetensors"),
             str(root / "agg_0/clips/c1.safetensors"), "sly/clips/c1.safetensors",
             "../agg_0/clips/lost.safetensors"]
    data.write_index(root / "agg_1", [entry(i, file=file) for i, file in enumerate(files)])
    clips = data.Clips(root / "agg_1")
    assert (clips.load(0)["latents"] == 1).all() and (clips.load(1)["latents"] == 2).all()
    assert os.path.relpath(clips.locate(clips[1]), root) == "agg_0/clips/c2.safetensors"
    for i in range(2, 6):
        with pytest.raises(common.UserError, match="is not a relative path within") as error:
            clips.load(i)
        assert files[i] in str(error.value)
    with pytest.raises(common.UserError, match="no such file: .*lost"):
        clips.load(6)
    assert (data.Clips(root / "agg_1", root=tmp_path).load(2)["latents"] == 1).all()


def test_damaged_clips_say_so(tmp_path):
    clips = numbered_store(tmp_path / "agg_0", 2)
    cut(data.clip_file(tmp_path / "agg_0", "c0"), 0.9)
    with pytest.raises(common.UserError, match="c0.safetensors is truncated"):
        clips.load(0)
    common.save_tensors(data.clip_file(tmp_path / "agg_0", "c1"), {"latents": torch.zeros(1)})
    with pytest.raises(common.UserError, match="c1.safetensors has no tensor 'text'"):
        clips.load(1)


def test_a_paper_sized_index_opens_fast(tmp_path):
    prompt = "word " * 400  # MiraData's dense captions
    with open(tmp_path / "index.jsonl", "w") as f:
        f.writelines(json.dumps(entry(n, ("seed", "corrective")[n % 5 > 1], prompt=prompt)) + "\n"
                     for n in range(136_000))
    began = time.perf_counter()
    clips = data.Clips(tmp_path)
    seconds = time.perf_counter() - began
    (tmp_path / "part").mkdir()
    with open(clips.index) as f:  # counting memory is slow, so of a tenth
        (tmp_path / "part/index.jsonl").write_text("".join(itertools.islice(f, 13_600)))
    tracemalloc.start()
    part = data.Clips(tmp_path / "part")
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"\n136,000 clips, {clips.index.stat().st_size / 2**20:.0f} MiB: {seconds:.2f} s, "
          f"{10 * kept / 2**20:.1f} MiB kept, {10 * most / 2**20:.1f} MiB at most")
    assert len(part) == 13_600 and most < 2**20 and seconds < 2
    assert clips.kinds.count("seed") == 54_400 and clips[135_999]["id"] == "c135999"


def test_files_are_as_readable_as_the_user_wants(tmp_path):
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        folder = tmp_path / f"{mask:o}"
        with umask(mask):
            numbered_store(folder, 1)
            common.claim(Path(folder, "meta.json"), {})
            data.write_video(folder / "a.mp4", torch.zeros(2, 3, 32, 32), 16)
            data.write_png(folder / "a.png", torch.zeros(3, 8, 8))
        modes = {p.name: p.stat().st_mode & 0o777 for p in folder.rglob("*") if p.is_file()}
        assert modes == dict.fromkeys(["c0.safetensors", "index.jsonl", "meta.json", "a.mp4", "a.png"], mode)


# ------------------------------------------------------------------------------------------------ order

@pytest.mark.parametrize("n", [50, 5, 1])
def test_order(n):
    flat = [data.sample_order(n, 3, position) for position in range(240)]
    for epoch in range(len(flat) // n):
        assert sorted(flat[epoch * n:epoch * n + n]) == list(range(n)), "each sample once an epoch"
    if n > 1:
        assert flat[:n] != flat[n:2 * n], "shuffled anew"
        assert flat[:n] != [data.sample_order(n, 4, position) for position in range(n)], "by the seed"


def test_order_is_cheap():
    data.sample_order(136_000, 0, 0)
    began = time.perf_counter()
    for position in range(0, 10_000):
        data.sample_order(136_000, 0, position)
    assert time.perf_counter() - began < 1
