"""Which videos and captions there are: in a folder, in a list (.csv, .jsonl, .parquet) or in tar shards.

A list names its videos, and maybe a range of their time, in the columns below; MiraData's csv files are read
as published. A tar shard holds KEY.mp4 beside KEY.txt or KEY.json, as WebDataset has it.
"""

import hashlib
import itertools
import math
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import data
import records
from common import UserError
from data import Excerpt

LISTS = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # looked for in a folder, in this order
VIDEO_COLUMNS = ("file_name", "video", "path", "file_path")  # the last is MiraData's
CAPTION_COLUMNS = ("caption", "text", "prompt", "dense_caption")
START_COLUMNS = ("start", "start_sec", "start_time")  # seconds, or H:M:S
END_COLUMNS = ("end", "end_sec", "end_time")

# name, video, caption, why its caption cannot be used
Listed = Iterator[tuple[str, Path | Excerpt, str | None, str | None]]


class Source(NamedTuple):
    id: str
    path: Path | Excerpt
    caption: str | None
    problem: str | None = None  # with its caption


def find_clips(videos, caption_key: str | None = None, roots=(), where: str | None = None) -> list[Source]:
    """The videos of one or several folders, lists and tars, by id. Videos are not opened and may be missing.
    In a list, roots are the folders of its paths, and where selects rows."""
    places = [Path(place) for place in ([videos] if isinstance(videos, str | Path) else videos)]
    shown = " ".join(map(str, places))
    selection = Selection(where)
    clips = {}
    for place in places:
        for name, path, caption, problem in list_videos(place, caption_key, roots, selection):
            clip = Source(clip_id(name), path, (caption or "").strip() or None, problem)
            if clip.id in clips:
                raise UserError(f"{place}: {name} is listed twice")
            clips[clip.id] = clip
    if not clips and selection.others:
        raise UserError(f"no row of {shown} has {where}; they have {selection.most()}")
    if not clips:
        raise UserError(f"no videos in {shown} ({' '.join(sorted(data.VIDEO_SUFFIXES))})")
    if not any(clip.caption for clip in clips.values()):
        problem = next((clip.problem for clip in clips.values() if clip.problem), None)
        raise UserError(f"none of the {len(clips)} videos in {shown} has a caption: " + (
            problem or "put clip.txt beside clip.mp4, or list both in metadata.jsonl or metadata.csv"))
    return [clips[id] for id in sorted(clips)]


def clip_id(name: str) -> str:
    """An id that is a valid file name, depends on the name alone and differs between names."""
    if re.fullmatch(r"\w[\w-]{,99}\.mp4", name, re.ASCII):
        return name.removesuffix(".mp4")
    slug = re.sub(r"[^A-Za-z0-9]+", "-", name)[:60].strip("-")
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{slug}-{digest[:10]}"


def list_videos(place: Path, caption_key, roots, selection) -> Listed:
    """What a folder, a list or a tar holds. Ids are made from names."""
    if not place.exists():
        raise UserError(f"no such folder: {place}")
    if place.is_file() and place.suffix.lower() in data.VIDEO_SUFFIXES:
        raise UserError(f"{place} is a video; give its folder, a list (.csv, .jsonl, .parquet) or a .tar")
    if place.is_file() and (".tar" in place.suffixes or place.suffix == ".tgz"):
        return list_shard(place, place.name, caption_key, selection)
    tables = [place] if place.is_file() else [place / name for name in LISTS]
    table = next((table for table in tables if table.exists()), None)
    if table:
        return list_rows(table, caption_key, roots, selection)
    loose = [(path.relative_to(place).as_posix(), path, *text) for path, *text in data.list_folder(place)]
    flags = {"caption-key": caption_key, "where": selection.text, "root": " ".join(map(str, roots))}
    for flag, value in flags.items():
        if loose and value:
            raise UserError(f"--{flag} {value} needs a metadata.jsonl or metadata.csv in {place}")
    shards = [] if loose else sorted(place.rglob("*.tar"))
    names = [shard.relative_to(place).as_posix() for shard in shards]
    return itertools.chain(loose, *(list_shard(shard, name, caption_key, selection)
                                    for shard, name in zip(shards, names, strict=True)))


class Selection:
    """The rows that --where selects: KEY=VALUE,KEY=VALUE, in which * stands for anything."""

    def __init__(self, text: str | None):
        self.text = text
        self.wanted = {}
        self.others = Counter()  # what the other rows have
        for condition in text.split(",") if text else []:
            key, equals, pattern = condition.partition("=")
            if not key or not equals:
                raise UserError(f"--where {text!r} is not KEY=VALUE, such as source=pexels, or several of "
                                "them with commas between")
            self.wanted[key.strip()] = pattern.strip()

    def takes(self, row: dict, place: str) -> bool:
        for key in self.wanted:
            if key not in row:
                raise UserError(f"{place}: no {key!r}; it has {', '.join(map(str, row))}")
        values = {key: str("" if row[key] is None else row[key]) for key in self.wanted}
        taken = all(fnmatchcase(values[key], pattern) for key, pattern in self.wanted.items())
        if not taken:
            self.others[",".join(f"{key}={value[:40]}" for key, value in values.items())] += 1
        return taken

    def most(self) -> str:
        shown = [f"{values} ({count})" for values, count in self.others.most_common(8)]
        return ", ".join(shown) + (", ..." if len(self.others) > 8 else "")


# ----------------------------------------------------------------------------------------------------
# lists

def list_rows(table: Path, caption_key, roots, selection) -> Listed:
    roots = [Path(root) for root in roots] or [table.parent]
    for number, row in read_table(table):
        place = f"{table}:{number}"
        if selection.takes(row, place):
            name, video = locate(row, roots, place)
            yield name, video, *caption_of(row, caption_key, place)


def read_table(table: Path) -> Iterator[tuple[int, dict]]:
    """(its number, row) of each row of a list."""
    if table.suffix.lower() != ".parquet":
        yield from data.read_rows(table, '{"video": ..., "caption": ...}')
        return
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{table}: reading parquet needs pyarrow; run pip install pyarrow") from None
    try:
        rows = (row for batch in parquet.ParquetFile(table).iter_batches() for row in batch.to_pylist())
        yield from enumerate(rows, 1)
    except ValueError as error:  # pyarrow's errors are ValueErrors
        raise UserError(f"{table} cannot be read as parquet: {str(error)[:200]}") from None


def locate(row: dict, roots: list[Path], place: str) -> tuple[str, Path | Excerpt]:
    """(name, video) of a row. The first of the files where the video may be that is there, else the first."""
    video = first_of(row, VIDEO_COLUMNS)
    files = [(video, *range_of(row, place))] if isinstance(video, str) else []
    files += miradata_files(row)
    for file, *_ in files:
        records.check({"video": str(file)}, place, {"video": Path})
    if not files:
        raise UserError(f"{place}: no video; name it in one of {', '.join(VIDEO_COLUMNS)}")
    excerpts = [Excerpt(root / file, *times) for file, *times in files for root in roots]
    excerpt = next((e for e in excerpts if e.is_file()), excerpts[0])
    file, start, end = files[0]
    within = (path.relative_to(root) for root in roots if (path := root / file).is_relative_to(root))
    name = next(within, Path(file))
    name = name.as_posix() if isinstance(video, str) else name.name  # the latter is MiraData's index
    if start or end is not None:
        name += f" {start} to {end}"  # a video may have many ranges, each a clip
    return name, excerpt if excerpt.is_range else excerpt.file


def miradata_files(row: dict) -> list[tuple[str, float, float | None]]:
    """(path, start, end) of what MiraData's download scripts make of a row: in the release of April 2024 the
    clip, and the uncut video; in that of July 2024, where file_path is the clip, the uncut video."""
    index = str(row.get("index" if "start_frame" in row else "clip_id"))
    number = re.match("[0-9]{1,15}", index)
    if not number:
        return []
    folder = f"{int(number[0]) // 1000:09}"
    try:
        if "start_frame" in row:
            clip = [(f"{folder}/{index}.mp4", 0.0, None)]
            fps = float(row["fps"])
            start, end = (seconds(float(row[key]) / fps) for key in ("start_frame", "end_frame"))
            return [*clip, (f"{folder}/{index.split('-')[0]}.mp4", start, end)]
        clip = []
        start, end = map(seconds, re.findall("[0-9:.]+", row["timestamp"]))  # "['0:00:01.500', '0:01:02']"
        return [(f"{folder}/{int(number[0]):012}.mp4", start, end)]
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return clip  # without its times, the uncut video is of no use


def range_of(row: dict, place: str) -> tuple[float, float | None]:
    """The seconds of its video that a row names, (0, None) if it names none."""
    times = [first_of(row, columns) for columns in (START_COLUMNS, END_COLUMNS)]
    try:
        start, end = (None if time is None else seconds(time) for time in times)
    except ValueError:
        raise UserError(f"{place}: the range {times[0]} to {times[1]} is not in seconds, as 12.5 is, or "
                        "0:00:12.5") from None
    return start or 0.0, end


def seconds(time) -> float:
    """12.5, "12.5" or "0:00:12.5", from 0 on."""
    total = 0.0
    for part in str(time).split(":"):
        total = 60 * total + float(part)
    if not 0 <= total < math.inf:
        raise ValueError(time)
    return total


def caption_of(row: dict, caption_key: str | None, place: str) -> tuple[str | None, str | None]:
    """(the caption, why it cannot be used)."""
    if caption_key and caption_key not in row:
        raise UserError(f"{place}: no {caption_key!r}; it has {', '.join(map(str, row))}")
    caption = first_of(row, [caption_key] if caption_key else CAPTION_COLUMNS)
    if not isinstance(caption, str | None):
        return None, f"{place}: a caption must be text, not {str(caption)[:40]}"
    if caption and len(caption) > data.CAPTION:
        return None, f"{place}: a caption of {len(caption)} characters; {data.CAPTION} are the most"
    return caption, None


def first_of(row: dict, columns):
    return next((row[c] for c in columns if row.get(c)), None)


# ----------------------------------------------------------------------------------------------------
# tar shards

def list_shard(shard: Path, name: str, caption_key, selection) -> Listed:
    """The samples of a tar: its members that are called alike up to their first dot."""
    try:
        with tarfile.open(shard, "r:") as tar:
            for key, members in samples_of(tar).items():
                video = next((members[suffix] for suffix in members if suffix in data.VIDEO_SUFFIXES), None)
                if not video:
                    continue
                excerpt = Excerpt(shard, member=video.name, offset=video.offset_data, size=video.size)
                row, problem = read_sample(tar, members, f"{shard}: {key}")
                if problem:
                    yield f"{name}/{key}.mp4", excerpt, None, problem
                elif selection.takes(row, f"{shard}: {key}"):
                    yield f"{name}/{key}.mp4", excerpt, *caption_of(row, caption_key, f"{shard}: {key}")
    except tarfile.TarError as error:
        raise UserError(f"{shard} cannot be read as a tar without compression: {error}") from None


def samples_of(tar: tarfile.TarFile) -> dict[str, dict[str, tarfile.TarInfo]]:
    """{key: {suffix: member}}. The bytes of videos are not read."""
    samples = {}
    for member in tar:
        folder, slash, file = member.name.rpartition("/")
        key, _, suffixes = file.partition(".")
        if member.isreg() and key:  # a hidden file has none
            suffix = "." + suffixes.rpartition(".")[2].lower()
            samples.setdefault(folder + slash + key, {})[suffix] = member
    return samples


def read_sample(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], place: str) -> tuple:
    """(the row of a sample, what is wrong with it or None). Its .txt is the caption, its .json the rest."""
    try:
        present = [suffix for suffix in (".json", ".txt") if suffix in members]
        if any(members[suffix].size > 10 * data.CAPTION for suffix in present):
            return {}, f"{place}: its text is too long for a caption"
        texts = {suffix: tar.extractfile(members[suffix]).read().decode("utf-8-sig") for suffix in present}
        row = records.parse(texts.get(".json", "{}"), place, example='{"caption": ...}')
    except UnicodeDecodeError as error:
        return {}, f"{place}: its text is not UTF-8: {error}"
    except UserError as error:
        return {}, str(error)
    return row | ({"caption": texts[".txt"]} if ".txt" in texts else {}), None
