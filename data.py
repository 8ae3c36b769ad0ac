"""Reading and writing videos, captions, the store of clips that the stages share, the order of training.

    python data.py check agg_1      reads every clip of a store; exit code 2 if one is damaged
"""

import contextlib
import csv
import functools
import itertools
import math
import os
import re
import shlex
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple

import av
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from safetensors import SafetensorError, safe_open

import common
import files
import flags
import locate
import records
from common import UserError, open_weights, rng, save_tensors
from files import as_json, escaped, replacing


def to_uint8(video: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> 0..255, rounded to the nearest level; uint8 passes through."""
    if video.dtype == torch.uint8:
        return video
    common.check_finite(video, "a video")
    return ((video.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_float(video: torch.Tensor) -> torch.Tensor:
    """0..255 -> fp32 in [-1, 1]."""
    return video.float() / 127.5 - 1


# ----------------------------------------------------------------------------------------------------
# reading videos: all times are exact fractions of a second, counted from the first frame

class Excerpt(NamedTuple):
    """A video within a file: a range of its time, or a member of a tar. Stands wherever a path may."""
    file: Path
    start: float = 0.0  # seconds from the first frame
    end: float | None = None  # None: to the end
    member: str = ""  # its name
    offset: int = 0  # of the member's first byte
    size: int | None = None  # of the member; None: the whole file

    @property
    def name(self) -> str:
        member = f"/{self.member}" if self.member else ""
        times = f"{self.start:.12g} s to " + ("the end" if self.end is None else f"{self.end:.12g} s")
        return self.file.name + member + (f" ({times})" if self.is_range else "")

    def __str__(self):
        return str(self.file.parent / self.name)

    @property
    def is_range(self) -> bool:
        return self.start > 0 or self.end is not None

    def is_file(self) -> bool:
        return self.file.is_file()

    def byte_count(self) -> int:
        return self.file.stat().st_size if self.size is None else self.size

    def url(self) -> str:
        """What FFmpeg opens."""
        if self.size is None:
            return str(self.file)
        return f"subfile,,start,{self.offset},end,{self.offset + self.size},,:{self.file}"


def as_excerpt(path) -> Excerpt:
    return path if isinstance(path, Excerpt) else Excerpt(Path(path))


def size(path) -> int | None:
    """The bytes of a video; None if it is not there."""
    return as_excerpt(path).byte_count() if path.is_file() else None


class Video(NamedTuple):
    path: Excerpt
    duration: Fraction  # of the video stream; the sound may be longer
    fps: Fraction  # on average
    width: int  # as displayed: upright, with square pixels
    height: int
    first: int  # timestamp of the file's first frame
    begin: Fraction = Fraction(0)  # of a range: the time of its first frame

    @property
    def frames(self) -> int:
        return round(self.duration * self.fps)


MOST_PIXELS = 2**26  # of a frame, twice an 8K video's: a small file may claim any size


@contextlib.contextmanager
def opened(path):
    """Yields (container, its video stream). What PyAV cannot read becomes a UserError."""
    path = as_excerpt(path)
    if not path.is_file():
        raise UserError(f"{path} is a folder, not a video" if path.file.is_dir() else f"no such file: {path}")
    if not path.byte_count():
        raise UserError(f"{path} is empty (0 bytes)")
    try:
        with av.open(path.url(), metadata_errors="replace") as container:
            # a cover picture is listed as a video stream too
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise UserError(f"{path} has no video stream")
            if not streams[0].codec_context:
                raise UserError(f"{path} cannot be read as a video: there is no decoder for it")
            streams[0].thread_type = "AUTO"
            streams[0].codec_context.options = {"max_pixels": str(MOST_PIXELS)}
            yield container, streams[0]
    except av.FFmpegError as error:
        raise UserError(f"{path} cannot be read as a video: {error.strerror}") from None
    except ArithmeticError as error:  # a rate of 0 / 0, a size of 0, a time beyond all numbers
        raise UserError(f"{path} cannot be read as a video: its sizes or times are not possible ({error})"
                        ) from None


def probe(path) -> Video:
    """The properties of a video. Decodes its first frame and reads the packets from the last key frame on, so
    that a truncated file is noticed."""
    with opened(path) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None or frame.pts is None:
            raise UserError(f"{path} cannot be read as a video: it has no frame with a time")
        claimed = Fraction(container.duration or 0, av.time_base)
        tick = stream.time_base
        known = bool(claimed and stream.average_rate)  # not in browsers' recordings: every packet is read
        container.seek(frame.pts + (math.ceil(claimed / tick) if known else 0), stream=stream)
        packets = [p for p in container.demux(stream) if p.pts is not None and not p.is_discard]
        if not packets or any(p.is_corrupt for p in packets):  # a packet cut short is corrupt
            raise UserError(f"{path} is truncated: the end of its {float(claimed):.1f} s cannot be read")
        last = max(packets, key=lambda p: p.pts)
        span = max(last.pts - frame.pts, 1) * tick
        fps = stream.average_rate if known else max(len(packets) - 1, 1) / span
        width, height = shown_size(frame, stream)
        if turns(frame) % 2:
            width, height = height, width
        duration = end(last, frame.pts, tick, fps)
        video = Video(as_excerpt(path), duration, fps, width, height, frame.pts)
        return within(video, container, stream) if video.path.is_range else video


def within(video: Video, container, stream) -> Video:
    """A video limited to the range of its path, as if it was cut there: it starts with the first frame that
    begins in the range, or at most 1 ms early, as times may be rounded."""
    start = Fraction(video.path.start)
    stop = video.duration if video.path.end is None else min(Fraction(video.path.end), video.duration)
    if start >= stop:
        raise UserError(f"{video.path} holds nothing: the video ends at {float(video.duration):.2f} s")
    tick = stream.time_base
    frames = decode_from(container, stream, video.first + math.floor(start / tick), video.first)
    times = ((frame.pts - video.first) * tick for frame in frames)
    begin = next((time for time in times if time >= start - Fraction(1, 1000)), stop)
    return video._replace(begin=begin, duration=max(stop - begin, Fraction(0)))


def end(shown, first: int, tick: Fraction, fps: Fraction) -> Fraction:
    """The time at which a frame or packet stops being shown. Few containers record it for the last one."""
    return (shown.pts - first) * tick + (shown.duration * tick if shown.duration else 1 / fps)


def slack(tick: Fraction) -> Fraction:
    """Timestamps are rounded to a tick, 1 ms in mkv: a frame counts as shown a tick, at most 1 ms, early."""
    return min(tick, Fraction(1, 1000))


def shown_size(frame, stream) -> tuple[int, int]:
    return round(frame.width * (stream.sample_aspect_ratio or 1)), frame.height


def turns(frame) -> int:
    """Quarter turns, counter-clockwise, that rotate a phone's video upright."""
    return round(frame.rotation / 90) % 4


def fit(frame, stream, size, scaler: VideoReformatter) -> torch.Tensor:
    """uint8 [3,H,W]: upright, resized to cover size = (width, height), cropped about the centre."""
    shown = shown_size(frame, stream)
    wanted = shown if size is None else size[::-1] if turns(frame) % 2 else size
    scale = max(w / s for w, s in zip(wanted, shown, strict=True))
    width, height = (max(w, round(s * scale)) for w, s in zip(wanted, shown, strict=True))
    # swscale widens its bicubic kernel when it shrinks an image, which avoids aliasing
    image = scaler.reformat(frame, width, height, "rgb24", interpolation="BICUBIC").to_ndarray()
    left = (width - wanted[0]) // 2
    top = (height - wanted[1]) // 2
    image = np.rot90(image[top:top + wanted[1], left:left + wanted[0]], turns(frame))
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def decode_from(container, stream, pts: int, first: int) -> Iterator[av.VideoFrame]:
    """Frames in order, from the last key frame at or before pts."""
    back = 0
    while True:
        container.seek(max(pts - back, first), stream=stream)
        frames = container.decode(stream)
        frame = next(frames, None)
        # mp4 looks up key frames by decoding time and may land after pts: try again, further back
        if frame is None or frame.pts <= pts or pts - back <= first:
            return itertools.chain([] if frame is None else [frame], frames)
        back = 2 * back + math.ceil(1 / stream.time_base)


def read_frames(video: Video, fps=None, size=None, start: int = 0) -> Iterator[torch.Tensor]:
    """Yields uint8 [3,H,W]: every frame, or with fps those shown at start / fps, (start + 1) / fps, ..."""
    with opened(video.path) as (container, stream):
        tick = stream.time_base
        scaler = VideoReformatter()  # one for all frames: its setup costs more than scaling a small frame
        if fps is None:
            assert not video.path.is_range, "a range needs an fps"
            yield from (fit(frame, stream, size, scaler) for frame in container.decode(stream))
            return
        due = video.begin + start / Fraction(fps)  # the time of the next frame to yield
        shown = None  # the frame on display
        frames = decode_from(container, stream, video.first + math.floor(due / tick), video.first)
        stop = video.begin + video.duration
        frames = itertools.takewhile(lambda frame: (frame.pts - video.first) * tick < stop, frames)
        for frame in itertools.chain(frames, [None]):
            if shown is not None:
                if frame and frame.pts <= shown.pts:
                    raise UserError(f"{video.path}: its frames have no usable times; convert it to mp4")
                if frame:
                    until = (frame.pts - video.first) * tick
                else:
                    until = end(shown, video.first, tick, video.fps)
                while due + slack(tick) < until:
                    yield fit(shown, stream, size, scaler)
                    due += 1 / Fraction(fps)
            shown = frame


def count_crops(video: Video, frames: int, fps) -> int:
    """The number of possible starts of a crop of this many frames. Refuses a video too slow or too short."""
    if video.fps < fps * 0.995:  # 15.98 fps is 16
        raise UserError(f"{video.path}: its {float(video.fps):.4g} fps is below {float(fps):.4g}")
    available = math.ceil((video.duration - Fraction(1, 1000)) * Fraction(fps))
    if available < frames:
        raise UserError(f"{video.path} is too short: {frames} frames at {float(fps):.4g} fps need "
                        f"{float(frames / fps):.2f} s, it has {float(video.duration):.2f} s")
    return available - frames + 1


def random_start(video: Video, frames: int, fps, *names) -> int:
    """A start for read_clip, determined by names, such as (seed, clip id)."""
    return int(torch.randint(count_crops(video, frames, fps), (), generator=rng("crop", *names)))


def read_clip(video: Video, frames: int = 81, fps=16, size=None, start: int = 0) -> torch.Tensor:
    """A crop, uint8 [T,3,H,W]; start counts frames at fps, from the end if negative. Decodes no further."""
    crops = count_crops(video, frames, fps)
    start = start if start >= 0 else crops + frames - 1 + start
    assert 0 <= start < crops, f"start {start} of {crops} possible ones"
    with contextlib.closing(read_frames(video, fps, size, start)) as stream:
        clip = list(itertools.islice(stream, frames))
    if len(clip) < frames:
        raise UserError(f"{video.path} is damaged: only {len(clip)} of {frames} frames can be read")
    return torch.stack(clip)


def read_image(path, size=None) -> torch.Tensor:
    """A png or jpg as a video of one frame, uint8 [1,3,H,W]."""
    with opened(path) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None:
            raise UserError(f"{path} cannot be read as an image")
        return fit(frame, stream, size, VideoReformatter())[None]


# ----------------------------------------------------------------------------------------------------
# writing videos and pictures

def write_video(path, pieces: Iterable[torch.Tensor], *args, **kwargs):
    """Writes a whole video; further arguments are those of writing()."""
    with writing(path, *args, **kwargs) as write:
        for piece in pieces:
            write(piece)


@contextlib.contextmanager
def writing(path, fps, tags: dict | None = None, crf: int = 18, preset: str = "medium"):
    """Yields a function that appends frames, [3,H,W] or [T,3,H,W], uint8 or in [-1, 1], to an h264 mp4 that
    carries tags. The file appears when all have been written."""
    tags = tags or {}
    try:
        with replacing(path) as temporary, av.open(str(temporary), "w", format="mp4",
                                                   container_options={"movflags": "+faststart"}) as container:
            # players show these two keys; what is set after the first packet would be lost
            container.metadata["title"] = escaped(str(tags.get("prompt", "")))
            container.metadata["comment"] = as_json(tags)
            stream = None
            scaler = VideoReformatter()

            def write(piece):
                nonlocal stream
                for frame in as_frames(piece):
                    stream = stream or new_stream(container, frame, fps, crf, preset)
                    assert (frame.width, frame.height) == (stream.width, stream.height), "the size changed"
                    frame = scaler.reformat(frame, format="yuv420p", dst_colorspace="ITU709")
                    container.mux(stream.encode(frame))
            yield write
            assert stream is not None, f"{path}: no frames to write"
            container.mux(stream.encode())
    except av.FFmpegError as error:
        raise UserError(f"cannot write {path} (crf {crf}, preset {preset}): {error.strerror}") from None


def as_frames(piece: torch.Tensor) -> Iterator[av.VideoFrame]:
    piece = to_uint8(piece).reshape(-1, *piece.shape[-3:])  # [T,3,H,W]
    for image in piece.permute(0, 2, 3, 1).contiguous().cpu().numpy():  # [H,W,3]
        yield av.VideoFrame.from_ndarray(image, format="rgb24")


def new_stream(container, frame, fps, crf, preset):
    if frame.width % 2 or frame.height % 2:
        raise UserError(f"h264 needs an even width and height, not {frame.width}x{frame.height}")
    # PyAV takes no float, and denominators up to 1001 cover all broadcast rates. With mbtree, x264 is not
    # deterministic: once in a few hundred times it encodes a small picture differently
    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={
        "crf": str(crf), "preset": preset, "x264-params": "mbtree=0"})
    stream.width = frame.width
    stream.height = frame.height
    stream.pix_fmt = "yuv420p"
    codec = stream.codec_context  # without these, players guess the colour matrix from the size
    codec.colorspace = codec.color_primaries = codec.color_trc = 1  # BT.709
    codec.color_range = 1  # 16..235
    return stream


# what tags hold that others read
TAGS = {"prompt": str, "prompts": [str], "times": [float], "seed": (int, None), "name": str, "id": int,
        "model": Path, "wan": Path, "extend": (Path, None), "image": (Path, None), "fingerprint": str,
        "context": (range(10**6), None)}


def read_tags(path) -> dict:
    """The tags that writing() stored; none for videos from elsewhere, and none that are of another kind."""
    with opened(path) as (container, _):
        try:
            tags = records.parse(container.metadata.get("comment", ""), path)
        except UserError:  # an ordinary comment
            return {}
    return {key: value for key, value in tags.items() if key not in TAGS or records.fits(value, TAGS[key])}


def write_png(path, image: torch.Tensor):
    """Writes an image [3,H,W], uint8 or in [-1, 1]."""
    [frame] = as_frames(image)
    codec = av.CodecContext.create("png", "w")
    codec.width = frame.width
    codec.height = frame.height
    codec.pix_fmt = "rgb24"
    codec.time_base = Fraction(1)
    with replacing(path) as temporary:
        temporary.write_bytes(b"".join(bytes(packet) for packet in codec.encode(frame) + codec.encode()))


def film_strip(path, rows: list[torch.Tensor], height: int | None = None, gap: int = 4):
    """Writes a PNG with a row of frames for each video [T,3,H,W], resized to this height; short rows are
    filled with white."""
    strips = []
    for row in rows:
        if height:
            shape = height, round(row.shape[3] * height / row.shape[2])
            row = to_uint8(F.interpolate(to_float(to_uint8(row)), shape, mode="bicubic", antialias=True))
        row = F.pad(to_uint8(row).cpu(), (0, gap, 0, gap), value=255)  # [T,3,h,w]
        strips.append(row.permute(1, 2, 0, 3).flatten(2))  # [3,h,T*w]
    width = max(strip.shape[2] for strip in strips)
    write_png(path, torch.cat([F.pad(s, (0, width - s.shape[2]), value=255) for s in strips], 1))


# ----------------------------------------------------------------------------------------------------
# lists of videos and of prompts; sources.py says which videos and captions they name

VIDEO_SUFFIXES = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"}


CAPTION = 100_000  # the most bytes or characters of one; networks see 512 tokens


def list_folder(folder: Path) -> Iterator[tuple[Path, str | None, str | None]]:
    """(video, caption, why it has none), the caption from clip.txt beside clip.mp4. A link to nowhere is
    listed, too, so that somebody says so."""
    for path in folder.rglob("*"):
        # macOS writes ._clip.mp4 beside clip.mp4 on other file systems
        named = path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith(".")
        if named and (path.is_file() or path.is_symlink() and not path.exists()):
            yield path, *read_caption(path.with_suffix(".txt"))


def read_caption(file: Path) -> tuple[str | None, str | None]:
    """(the text, None), or (None, why there is none)."""
    try:
        if not file.is_file():
            return None, None
        if (size := file.stat().st_size) > CAPTION:
            return None, f"{file} has {size} bytes; {CAPTION} are the most for a caption"
        return records.read_text(file), None
    except (UserError, OSError) as error:
        return None, str(error)


def read_rows(table: Path, example: str) -> Iterator[tuple[int, dict]]:
    """(line number, row) of a .csv with a header or a .jsonl, whose rows look like the example."""
    if table.suffix.lower() == ".csv":
        csv.field_size_limit(records.LONGEST)  # the default refuses captions over 128 KB
        with open(table, encoding=encoding_of(table)) as lines:
            reader = csv.DictReader(lines, strict=True)
            try:
                yield from ((reader.line_num, row) for row in reader if any(row.values()))
            except csv.Error as error:
                raise UserError(f"{table}:{reader.line_num}: {error}") from None
        return
    for number, line in records.lines(table):
        if line.strip():
            yield number, records.parse(line, f"{table}:{number}", example=example)


def encoding_of(table: Path) -> str:
    """That of a csv: UTF-8 if it can be that, else what Windows writes, or Latin-1."""
    for encoding in ("utf-8-sig", "cp1252", "latin-1"):
        try:
            with open(table, encoding=encoding) as f:
                if any("\0" in piece for piece in iter(lambda f=f: f.read(2**20), "")):
                    raise UserError(f"{table} is UTF-16, or no text; save it as UTF-8")
        except UnicodeDecodeError:
            continue
        return encoding


# ----------------------------------------------------------------------------------------------------
# the clip store: index.jsonl lists the clips, meta.json says how they were made, clips/ID.safetensors holds
# their latents and text embeddings

LATENT_DTYPE = torch.float16  # 11 bits of precision for values about 1, where bfloat16 has 8
TEXT_DTYPE = torch.bfloat16  # as umT5 is published
KIND = re.compile(rb'"kind"\s*:\s*"(\w+)"')
MADE_OF = ("prompt", "source", "source_bytes")  # what a clip's file records; a clip of another is made anew
ID = re.compile(r"[^./\\\0-\37\177][^/\\\0-\37\177]*")  # what a file name may be
# what an entry of the index holds, and meta.json, as far as it is there
ENTRY = {"id": str, "file": Path, "prompt": str, "kind": str, "round": int, "source": str, "bytes": int,
         "crc32": int}
META = {"latents": [records.SIZE] * 4, "width": records.SIZE, "height": records.SIZE, "frames": records.SIZE,
        "fps": records.SIZE, "wan": Path, "vae": str, "t5": str, "seed": int, "round": int, "command": [str]}
# what all stores of a run have in common: entries of meta.json
SHARED = ("latents", "width", "height", "frames", "fps", "vae", "t5")


def clip_file(folder, id: str) -> Path:
    return Path(folder) / "clips" / f"{id}.safetensors"


def write_clip(folder, id: str, latents: torch.Tensor, text: torch.Tensor, *made_of):
    """latents [F,C,H,W] and text [n,text_dim]. made_of: the values of MADE_OF."""
    assert latents.ndim == 4 and text.ndim == 2, f"latents {latents.shape}, text {text.shape}"
    clip_file(folder, id).parent.mkdir(parents=True, exist_ok=True)
    tensors = {"latents": latents.to(LATENT_DTYPE), "text": text.to(TEXT_DTYPE)}
    write_checked(clip_file(folder, id), tensors, **dict(zip(MADE_OF, made_of, strict=False)))


def write_text_embedding(path, text: torch.Tensor, prompt: str = ""):
    write_checked(path, {"text": text.to(TEXT_DTYPE)}, prompt=prompt)


def write_checked(path, tensors: dict[str, torch.Tensor], **about):
    tensors = {name: tensors[name].cpu() for name in sorted(tensors)}
    save_tensors(path, tensors, **about, crc32=common.checksum(*tensors.values()))


def read_checked(path, names, crc32: int | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a file of write_checked, whose checksum must be the one in it and the one given."""
    weights, about = open_weights(path)
    for name in names:
        if name not in weights:
            raise UserError(f"{path} has no tensor {name!r}")
    tensors = {name: weights[name].read() for name in sorted(names)}
    crc = common.checksum(*tensors.values())
    if crc != about.get("crc32") or crc != (crc if crc32 is None else crc32):
        raise UserError(f"{path} is damaged: its tensors have another checksum; remove it, and run the "
                        "command that made it again")
    return tensors


def made_of(file: Path) -> dict | None:
    """What a file of write_checked was made of; None if it is not there, or cut off."""
    try:
        with safe_open(file, "pt") as f:
            return records.parse((f.metadata() or {}).get("json", "{}"), file)
    except (SafetensorError, OSError, UserError):
        return None


def read_text_embedding(path) -> torch.Tensor:
    return read_checked(path, ["text"])["text"]


class Geometry(NamedTuple):
    width: int
    height: int
    frames: int
    fps: int


def geometry(wan, size: str | None = None, frames: int | None = None, fps: int | None = None) -> Geometry:
    """The size of clips: as given, or as the Wan directory's config.json says (a toy's), or the paper's."""
    config = Path(wan) / "config.json"
    preset = records.check(locate.read_config(config), config, {"geometry": dict}).get("geometry", {})
    records.check(preset, f"{config}: geometry", {"size": str, "frames": records.SIZE, "fps": records.SIZE})
    wanted = size or preset.get("size", "832x480")
    match = re.fullmatch(r"([1-9][0-9]{,4})x([1-9][0-9]{,4})", wanted)
    if not match:
        raise UserError(f"{'--size' if size else config}: {wanted!r} is not WIDTHxHEIGHT, such as 832x480")
    return Geometry(int(match[1]), int(match[2]), frames or preset.get("frames", 81),
                    fps or preset.get("fps", 16))


def read_seed_clip(path, id: str, geometry: Geometry, seed: int, frames: int | None = None) -> torch.Tensor:
    """The crop of a video that is this seed clip, uint8 [T,3,H,W], or the first frames of it."""
    width, height, length, fps = geometry
    video = probe(path)
    start = random_start(video, length, fps, seed, id)
    return read_clip(video, frames or length, fps, (width, height), start)


def fingerprint(wan, network: str) -> str:
    """Identifies a Wan directory's VAE ("vae"), or its text encoder with its tokenizer ("t5")."""
    tokenizer = [file for file in locate.tokenizer_files(wan) if network == "t5" and file.is_file()]
    return common.fingerprint(*locate.find(wan, network), *tokenizer[:1])


def write_index(folder, entries: Iterable[dict]):
    """Replaces the index. Entries are written one by one: there may be 100,000s."""
    with replacing(Path(folder, "index.jsonl")) as temporary, open(temporary, "w", encoding="utf-8") as f:
        for entry in entries:
            f.write(as_lines([entry]))


def as_lines(entries: Iterable[dict]) -> str:
    return "".join(as_json(entry) + "\n" for entry in entries)


def index_entry(id: str, prompt: str, kind: str, round: int, source: str) -> dict:
    """kind: seed, rollout or corrective. round: the first that trains on the clip, or that of the rollout.
    The Writer adds the bytes and the checksum of the file."""
    return {"id": id, "file": f"clips/{id}.safetensors", "prompt": prompt, "kind": kind, "round": round,
            "source": source}


class Writer:
    """A clip store that all ranks write together. The index is written last: a store that has it is whole."""

    def __init__(self, folder, ranks, meta: dict, entries: Iterable[dict], source_bytes=lambda id: None):
        """meta: how all clips of the store are made; a folder begun with another meta is refused. entries: of
        the clips to be made. source_bytes(id): the size of the file a clip is made of, if that is there."""
        self.folder = Path(folder)
        self.ranks = ranks
        self.source_bytes = source_bytes
        self.entries = {}
        for entry in entries:
            if entry["id"] in self.entries:
                raise UserError(f"{folder}: two clips have the id {entry['id']}")
            self.entries[check_id(entry["id"], folder)] = entry

        def begin():
            files.own(folder, "clips")
            common.claim(self.folder / "meta.json", meta, command=sys.argv)
            for part in ("clips", "text"):
                (self.folder / part).mkdir(exist_ok=True)
        common.lead(ranks, begin)

    def has(self, id: str) -> bool:
        """Whether the clip is there, whole, and made of what it is to be made of."""
        return self.fits(clip_file(self.folder, id), id, self.source_bytes)

    def fits(self, file: Path, id: str, source_bytes=lambda id: None) -> bool:
        about = made_of(file)
        return about is not None and about.get("prompt") == self.entries[id]["prompt"] and (
            source_bytes(id) in (None, about.get("source_bytes")))

    def share(self, batch: int = 1) -> list[list[str]]:
        """This rank's batches of ids in which a clip is missing."""
        return common.my_share(common.batched(list(self.entries), batch), self.ranks, self.has)

    def stage_texts(self, load_encoder, what: str):
        """Keeps the embeddings of prompts in text/ until their clips are written: only one large network is
        in memory at a time. The batches, of 16 prompts, stay the same after a restart."""
        def done(id):
            return self.has(id) or self.fits(self.text_file(id), id)

        todo = common.my_share(common.batched(list(self.entries), 16), self.ranks, done)
        with common.progress(sum(map(len, todo)), what, self.ranks) as bar:
            encoder = load_encoder() if todo else None
            for batch in todo:
                prompts = [self.entries[id]["prompt"] for id in batch]
                for id, text in zip(batch, encoder.encode(prompts), strict=True):
                    if not done(id):
                        write_text_embedding(self.text_file(id), text, self.entries[id]["prompt"])
                bar.update(len(batch))
        dist.barrier()  # the clip may be written by another rank

    def text_file(self, id: str) -> Path:
        return self.folder / "text" / f"{id}.safetensors"

    def staged_text(self, id: str) -> torch.Tensor:
        return read_text_embedding(self.text_file(id))

    def write(self, id: str, latents, text):
        entry, size = self.entries[id], self.source_bytes(id)
        if not self.has(id):
            common.check_finite(latents.to(LATENT_DTYPE), f"the latents of clip {id}")
            about = (entry["prompt"], entry["source"]) + (() if size is None else (size,))
            write_clip(self.folder, id, latents, text, *about)
        self.text_file(id).unlink(missing_ok=True)

    @contextlib.contextmanager
    def keeping(self):
        """On a file error, such as a full disk, reports how many finished clips are kept."""
        try:
            yield
        except OSError as error:
            kept = sum(1 for _ in self.folder.glob("clips/*.safetensors"))
            raise UserError(f"{error}\n{kept} finished clips are kept in {self.folder}; mend that and run "
                            "the same command to continue") from None

    def finish(self, before: Iterable[dict] = (), skipped=()):
        """Writes the index, once all ranks have written their clips: the entries before, then those of the
        clips that were made."""
        dist.barrier()
        if self.ranks.rank == 0:
            files.remove_clips(self.folder / "text")
            made = common.ahead(self.seal, (id for id in self.entries if id not in skipped), workers=8)
            write_index(self.folder, itertools.chain(before, (entry for _, entry in made)))
        dist.barrier()

    def seal(self, id: str) -> dict:
        """The entry of a clip that was made, with the size of its file and the checksum of its tensors."""
        file = clip_file(self.folder, id)
        about = made_of(file)
        if about is None:
            raise UserError(f"{file} is damaged or gone; run the same command to make it again")
        return self.entries[id] | {"bytes": file.stat().st_size, "crc32": about.get("crc32")}


def check_id(id: str, where) -> str:
    """Refuses what cannot be part of a file's name in a folder."""
    if not ID.fullmatch(id) or len(id.encode("utf-8", "surrogatepass")) > 220:
        raise UserError(f"{where}: the id {id[:80]!r} cannot be the name of a file")
    return id


class Clips:
    """A store opened for reading. Each clip's offset and kind are in memory; the rest is read on demand."""

    def __init__(self, folder, root=None):
        self.folder = Path(folder)
        self.index = self.folder / "index.jsonl"
        if not self.index.exists():
            if not (self.folder / "meta.json").exists():
                raise UserError(f"{folder} is not a clip store: it has no index.jsonl")
            command = shlex.join(self.meta().get("command", ()))
            raise UserError(f"{folder} is not finished: its index.jsonl comes last; run again\n{command}")
        self.root = Path(root or self.folder.resolve().parent).resolve()
        self.offsets = array("q")
        self.kinds = []
        offset = 0
        with open(self.index, "rb") as f:
            while line := f.readline(records.LONGEST):
                if not line.endswith(b"\n"):
                    what = "too long" if len(line) == records.LONGEST else "cut off"
                    raise UserError(f"{self.index}:{len(self) + 1}: the last line is {what}")
                # much faster than parsing, and as safe: inside a JSON string these quotes would be escaped
                kind = KIND.search(line)
                if not kind:
                    raise UserError(f"{self.index}:{len(self) + 1}: a clip without a kind")
                self.offsets.append(offset)
                self.kinds.append(sys.intern(kind[1].decode()))
                offset += len(line)

    def __len__(self):
        return len(self.offsets)

    def __iter__(self) -> Iterator[dict]:
        with open(self.index, "rb") as f:
            yield from map(self.parse, range(len(self)), f)

    def __getitem__(self, i: int) -> dict:
        with open(self.index, "rb") as f:  # opened each time: threads must not share a file position
            f.seek(self.offsets[i])
            return self.parse(i, f.readline())

    def parse(self, i: int, line: bytes) -> dict:
        entry = records.parse(line, f"{self.index}:{i + 1}", ENTRY)
        check_id(entry["id"], entry.where)
        return entry

    def meta(self) -> dict:
        return records.read(self.folder / "meta.json", META)

    def wan(self, given=None, networks=("vae",)) -> str:
        """The Wan directory that made the clips, there or moved beside them, or the one given; it must hold
        the same networks."""
        meta = self.meta()
        wan = locate.local(given, *networks) if given else locate.named(meta["wan"], self.folder)
        for network in networks:
            if fingerprint(wan, network) != meta[network]:
                raise UserError(f"{wan} has another {network} than {self.folder} was made with; give --wan "
                                f"{meta['wan']}")
        return wan

    def empty_prompt(self) -> Path:
        """The file with the embedding of the empty prompt, which guidance and dropped prompts need."""
        file = self.folder / "empty.safetensors"
        if not file.exists():
            raise UserError(f"{file} is missing, the embedding of the empty prompt; run prepare.py again, or "
                            "copy it from agg_0")
        return file

    def locate(self, entry: dict) -> Path:
        """The file of an entry's tensors, which must be inside the data root, even through links."""
        with contextlib.suppress(RuntimeError, OSError, ValueError):  # a loop of links, a name that cannot be
            path = (self.folder / entry["file"]).resolve()
            if not Path(entry["file"]).is_absolute() and path.is_relative_to(self.root):
                return path
        raise UserError(f"{self.index}: {entry['file']!r} is not a relative path within {self.root}")

    def load(self, i: int) -> dict:
        """The entry, with its latents [F,C,H,W] and text [n,text_dim]."""
        entry = self[i]
        file = self.locate(entry)
        if "bytes" in entry and file.is_file() and file.stat().st_size != entry["bytes"]:
            raise UserError(f"{file} is truncated or another: it has {file.stat().st_size:,} bytes, not the "
                            f"{entry['bytes']:,} of {self.index}:{i + 1}")
        return entry | read_checked(file, ["latents", "text"], entry.get("crc32"))


def origin(entry: dict) -> str:
    """The id of the seed clip that a rollout or corrective clip was made from; a seed clip's own id."""
    return entry["id"] if entry["kind"] == "seed" else entry["id"].rpartition("-round")[0]


def held_out(clips: Clips, count: int) -> list[int]:
    """The indices of the seed clips that no round trains on or rolls out. They are the same in every round,
    since every index begins with the same seed clips; a larger count adds to them."""
    seeds = [i for i, kind in enumerate(clips.kinds) if kind == "seed"]
    return sorted(seeds[int(k)] for k in permutation(len(seeds), "held out", 0)[:count])


# ----------------------------------------------------------------------------------------------------
# the order of training: one endless sequence of samples, independent of the number of ranks and of restarts

def sample_order(n: int, seed: int, position: int) -> int:
    """The sample at a position of the sequence. Each of the n occurs once per epoch, shuffled for each."""
    epoch, place = divmod(position, n)
    return int(permutation(n, seed, epoch)[place])


@functools.lru_cache(maxsize=2)
def permutation(n: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(n, generator=rng(seed, "order", epoch))


# ----------------------------------------------------------------------------------------------------
# command line: python data.py check FOLDER

@dataclass
class Flags:
    command: Literal["check"] = flags.positional()  # check: reads every clip and compares checksums
    folder: str = flags.positional()  # A store of clips (agg_k or rollout_k)


def main(cfg: Flags) -> int:
    clips = Clips(cfg.folder)
    shape = clips.meta().get("latents")

    def load(i: int) -> dict | str:
        try:
            return clips.load(i)
        except (UserError, OSError) as error:
            return common.first_line(error)

    ids, problems = set(), []
    if "seed" in clips.kinds:  # rollouts need no empty prompt
        read_text_embedding(clips.empty_prompt())
    with common.progress(len(clips), "clips", common.Ranks(0, 1, torch.device("cpu"))) as bar:
        for i, clip in common.ahead(load, range(len(clips)), workers=os.cpu_count()):
            problem = clip if isinstance(clip, str) else fault(clip, shape, ids)
            if problem:
                problems.append(f"{clips.index}:{i + 1}: {problem}")
                bar.write(problems[-1])
            bar.update()
    print(f"{cfg.folder}: {len(problems) or 'none'} of {len(clips)} clips "
          + ("is damaged" if len(problems) < 2 else "are damaged"))
    return 2 if problems else 0


def fault(clip: dict, shape: list[int], ids: set) -> str | None:
    """What is wrong with a clip whose checksum is right."""
    if clip["id"] in ids:
        return f"{clip['id']} is listed twice"
    ids.add(clip["id"])
    if list(clip["latents"].shape) != shape:
        return f"{clip['id']} has latents {list(clip['latents'].shape)}, not {shape} as meta.json says"
    if not all(clip[name].isfinite().all() for name in ("latents", "text")):
        return f"{clip['id']} holds nan or infinite values"


if __name__ == "__main__":
    common.run(main, flags.parse(Flags, __doc__))
