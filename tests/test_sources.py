"""Which videos and captions are found: in folders, lists and tar shards."""

import csv
import gzip
import io
import json
import re
import shutil
import sys
import tarfile

import pytest

import common
import data
import sources
from sources import find_clips

# --------------------------------------------------------------------------------------- folders, lists

NAMES = ["plain.mp4", "plain.mov", "a/b.mp4", "a_b.mp4", "a b.mp4", "a-b.mp4", "a'b\".MP4",
         "gr\u00fcn/\u901f\u3044.mkv", "a.b.mp4", "x" * 150 + ".mp4", "x" * 151 + ".mp4",
         "c.webm", "c.avi", "c.m4v", "-rf.mp4"]


def put(folder, name, caption=None):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def test_a_folder_of_clips_and_texts(tmp_path):
    for name in NAMES:
        put(tmp_path, name, f"  caption of {name.rsplit('.', 1)[0]}\n")
    put(tmp_path, "bare.mp4")
    put(tmp_path, "blank.mp4", " \n")
    put(tmp_path, "long.mp4", "word " * 20_000)
    put(tmp_path, "._plain.mp4", "not a clip")
    put(tmp_path, "notes.txt")
    (tmp_path / "folder.mp4").mkdir()
    clips = find_clips(tmp_path)
    expected = [tmp_path / name for name in [*NAMES, "bare.mp4", "blank.mp4", "long.mp4"]]
    assert sorted(c.path for c in clips) == sorted(expected)
    assert [c.id for c in clips] == sorted({c.id for c in clips})
    for clip in clips:
        assert re.fullmatch("[A-Za-z0-9_-]{1,100}", clip.id)
    by_name = {c.path.relative_to(tmp_path).as_posix(): c for c in clips}
    assert all(by_name[n].caption == f"caption of {n.rsplit('.', 1)[0]}" for n in NAMES)
    assert by_name["plain.mp4"].id == "plain" and by_name["long.mp4"].caption == ("word " * 20_000).strip()
    assert by_name["bare.mp4"].caption is None and by_name["blank.mp4"].caption is None
    # an id is a matter of its own path only, not of the company
    put(tmp_path / "other", "a/b.mp4", "x")
    assert find_clips(tmp_path / "other")[0].id == by_name["a/b.mp4"].id


@pytest.mark.parametrize("video", sources.VIDEO_COLUMNS)
@pytest.mark.parametrize("caption", sources.CAPTION_COLUMNS)
def test_lists_in_the_usual_words(tmp_path, video, caption):
    put(tmp_path, "a.mp4")
    absolute = put(tmp_path / "elsewhere", "b.mp4")
    text = 'a, "quoted"\nname: na\u00efve\u2028\u901f\u3044'
    rows = [{video: "a.mp4", caption: text}, {video: str(absolute), caption: "two"},
            {video: "lost.mp4", caption: "x"}, {video: "bare.mp4", caption: ""}]
    for suffix in ("jsonl", "csv"):
        table = tmp_path / f"metadata.{suffix}"
        with open(table, "w", encoding="utf-8", newline="") as f:
            if suffix == "csv":
                f.write("\ufeff")  # as Excel does
                writer = csv.DictWriter(f, [video, caption])
                writer.writeheader()
                writer.writerows(rows)
            else:
                f.writelines(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows)
        clips = {c.path: c.caption for c in find_clips(tmp_path)}
        assert clips == {tmp_path / "a.mp4": text, absolute: "two", tmp_path / "lost.mp4": "x",
                         tmp_path / "bare.mp4": None}
        assert find_clips(table) == find_clips(tmp_path)
        table.unlink()


def test_miradata(tmp_path):
    header = "index,video_id,file_path,short_caption,dense_caption,background_caption\n"
    row = '7,x,clips/7.mp4,a disc,"a red disc, seen from above",black\n'
    (tmp_path / "metadata.csv").write_text(header + row)
    assert find_clips(tmp_path)[0].caption == "a red disc, seen from above"
    assert find_clips(tmp_path, "short_caption")[0].caption == "a disc"
    with pytest.raises(common.UserError, match="metadata.csv:2: no 'nonsense'; it has index, video_id"):
        find_clips(tmp_path, "nonsense")


def test_bad_folders_and_lists(tmp_path):
    def refused(reason, table=None, text=None, key=None):
        folder = tmp_path / "d"
        if table:
            (folder / table).write_bytes(text)
        with pytest.raises(common.UserError, match=reason):
            find_clips(folder, key)
        if table:
            (folder / table).unlink()

    refused("no such folder")
    (tmp_path / "d").mkdir()
    refused("no videos in")
    put(tmp_path / "d", "a.mp4")
    refused("none of the 1 videos in .* has a caption: put clip.txt")
    refused("--caption-key dense needs a metadata.jsonl or metadata.csv", key="dense")
    refused("a.txt is not UTF-8", "a.txt", b"\xff\xfe\x00")
    refused("metadata.jsonl:2: not valid JSON", "metadata.jsonl", b'{"video": "a.mp4", "text": "x"}\n{"vid\n')
    refused("metadata.jsonl:1: not .* but 7", "metadata.jsonl", b"7\n")
    refused("metadata.jsonl:1: no video; name it in one of file_name", "metadata.jsonl", b'{"text": "x"}\n')
    refused("metadata.jsonl:1: a caption must be text", "metadata.jsonl", b'{"path": "a.mp4", "text": 7}\n')
    refused("a.mp4 is listed twice", "metadata.jsonl", b'{"path": "a.mp4", "text": "x"}\n' * 2)
    refused("metadata.csv:.: unexpected end", "metadata.csv", b'path,text\na.mp4,"never closed\n')
    put(tmp_path / "d", "a.mp4", "a caption")
    assert find_clips(tmp_path / "d")[0].caption == "a caption"


# ---------------------------------------------------------------------------------------- ranges, choice

def write_list(table, rows):
    """rows as a list of the kind that its suffix says."""
    if table.suffix == ".jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif table.suffix == ".csv":
        with open(table, "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), table)
    return table


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_rows_may_name_a_range(tmp_path, suffix):
    put(tmp_path, "raw.mp4")
    rows = [{"file_name": "raw.mp4", "text": f"row {i}", "start": start, "end": end}
            for i, (start, end) in enumerate([("0", "5.5"), ("5.5", "0:00:11"), ("1:02:03.5", ""), ("", "2"),
                                              ("", "")])]
    write_list(tmp_path / f"metadata.{suffix}", rows)
    clips = {c.caption: c for c in find_clips(tmp_path)}
    for i, times in enumerate([(0, 5.5), (5.5, 11), (3723.5, None), (0, 2)]):
        assert clips[f"row {i}"].path == data.Excerpt(tmp_path / "raw.mp4", *times)
    assert (clips["row 4"].path, clips["row 4"].id) == (tmp_path / "raw.mp4", "raw")
    write_list(tmp_path / f"metadata.{suffix}", rows[1:2])
    [clip] = find_clips(tmp_path)
    assert clip == clips["row 1"] and re.fullmatch("raw-mp4-5-5-to-11-0-[0-9a-f]{10}", clip.id)


@pytest.mark.parametrize("start, end", [*zip(sources.START_COLUMNS, sources.END_COLUMNS, strict=True)])
def test_ranges_in_the_usual_words(tmp_path, start, end):
    write_list(tmp_path / "a.jsonl", [{"video": "a.mp4", "caption": "x", start: 0, end: 2.5}])
    [clip] = find_clips(tmp_path / "a.jsonl")
    assert clip.path == data.Excerpt(tmp_path / "a.mp4", 0, 2.5)
    for time in ("soon", "-1", "nan", "1:inf", [1], True):
        write_list(tmp_path / "a.jsonl", [{"video": "a.mp4", "caption": "x", start: time}])
        with pytest.raises(common.UserError, match="a.jsonl:1: the range .* is not in seconds, as 12.5 is"):
            find_clips(tmp_path / "a.jsonl")


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_where(tmp_path, suffix):
    table = write_list(tmp_path / f"list.{suffix}", [
        {"video": f"{source}{fps}.mp4", "caption": "x", "source": source, "fps": fps}
        for source in ("pexels", "pexels_nature", "youtube", None) for fps in (24, 30)])

    def names(where):
        return [c.path.stem for c in find_clips(table, where=where)]
    assert names("source=pexels") == ["pexels24", "pexels30"]
    assert names("source=pexels*, fps = 30") == ["pexels30", "pexels_nature30"]
    assert names("source=") == ["None24", "None30"] and len(names(None)) == 8
    for where, reason in (
            ("source=Pexels", r"no row of .* has source=Pexels; they have source=pexels \(2\), source=pexe"),
            ("source=you*,fps=25", r"has source=you\*,fps=25; they have source=pexels,fps=24 \(1\), "),
            ("sauce=pexels", r"list.\w+:\d: no 'sauce'; it has video, caption, source, fps"),
            ("pexels", "--where 'pexels' is not KEY=VALUE, such as source=pexels, or several"),
            ("source=pexels,", "--where 'source=pexels,' is not KEY=VALUE"), ("=x", "--where '=x' is not")):
        with pytest.raises(common.UserError, match=reason):
            names(where)


def test_a_list_looks_for_videos_in_its_roots(tmp_path):
    table = write_list(tmp_path / "a.csv", [{"video": name, "caption": name} for name in (
        "b/first.mp4", "second.mp4", "nowhere.mp4", str(tmp_path / "r1/absolute.mp4"))])
    for name in ("r1/b/first.mp4", "r2/b/first.mp4", "r2/second.mp4", "r1/absolute.mp4"):
        put(tmp_path, name)
    clips = {c.path.relative_to(tmp_path).as_posix(): c.id for c in
             find_clips(table, roots=[str(tmp_path / "r1"), tmp_path / "r2"])}
    assert sorted(clips) == ["r1/absolute.mp4", "r1/b/first.mp4", "r1/nowhere.mp4", "r2/second.mp4"]
    assert {clips["r1/absolute.mp4"], clips["r2/second.mp4"]} == {"absolute", "second"}
    assert {c.id for c in find_clips(table)} >= {"second", "nowhere", clips["r1/b/first.mp4"]}, "as without"
    put(tmp_path / "loose", "a.mp4", "x")
    for flags in ({"roots": ["r1"]}, {"where": "a=b"}, {"caption_key": "text"}):
        with pytest.raises(common.UserError, match="--[a-z-]+ .* needs a metadata.jsonl or metadata.csv in"):
            find_clips(tmp_path / "loose", **flags)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "latin-1"])
def test_csv_files_of_any_encoding(tmp_path, encoding):
    text = {"cp1252": "\u201ccaf\u00e9\u201d", "latin-1": "caf\u00e9\u0081"}.get(encoding, "caf\u00e9 \u901f")
    (tmp_path / "a.csv").write_bytes(f"file_name,text\r\na.mp4,\"{text},\r\n2\"\r\n".encode(encoding))
    assert [c.caption for c in find_clips(tmp_path / "a.csv")] == [f"{text},\n2"]
    (tmp_path / "a.csv").write_bytes("file_name,text\na.mp4,x\n".encode("utf-16"))
    with pytest.raises(common.UserError, match="a.csv is UTF-16, or no text; save it as UTF-8"):
        find_clips(tmp_path / "a.csv")


# ------------------------------------------------------------------------------------------------- kinds

def test_parquet_needs_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "metadata.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(common.UserError, match="reading parquet needs pyarrow; run pip install pyarrow"):
        find_clips(tmp_path)


def test_parquet_that_is_none(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "metadata.parquet").write_text("file_name,text\n")
    with pytest.raises(common.UserError, match="metadata.parquet cannot be read as parquet"):
        find_clips(tmp_path)


MIRADATA = "index,video_id,start_frame,end_frame,short_caption,dense_caption,fps,start_timestep,,\n"


def test_miradata_as_published_in_april_2024(tmp_path):
    """Its own csv beside what its download script makes: clips that are cut, or the uncut videos."""
    rows = ["000000008783_AJp_ANX-GoM-000114,AJp_ANX-GoM,163272,166872,cars,a caf\u00e9,30,1:30:42,,",
            "000000008783_AJp_ANX-GoM-000115,AJp_ANX-GoM,300,600,more cars,more,30,0:00:10,,",
            "000000000005_x-000000,x,30,60,a disc,a red disc,29.97,0:00:01,,",
            "000000000006_y-000000,y,30,60,a ring,a red ring,nan,,,"]
    table = tmp_path / "miradata_v0.csv"
    table.write_bytes((MIRADATA + "\n".join(rows) + "\n,,,,,,,,,\n").encode("latin-1"))
    cut = put(tmp_path / "clip_video", "000000008/000000008783_AJp_ANX-GoM-000114.mp4")
    raw = put(tmp_path / "raw_video", "000000008/000000008783_AJp_ANX.mp4")
    roots = [tmp_path / "clip_video", tmp_path / "raw_video"]
    lost = [roots[0] / "000000000" / f"{id}.mp4" for id in ("000000000005_x-000000", "000000000006_y-000000")]
    clips = find_clips(table, "dense_caption", roots)
    assert [c.path for c in clips] == [*lost, cut, data.Excerpt(raw, 10, 20)]
    assert [c.id for c in clips] == [row.split(",")[0] for row in sorted(rows)]
    assert [c.caption for c in clips][2:] == ["a caf\u00e9", "more"]
    x = put(roots[1], "000000000/000000000005_x.mp4")
    put(roots[1], "000000000/000000000006_y.mp4")
    assert find_clips(table, "dense_caption", roots)[1].path == lost[1], "its fps is nan"
    [clip] = find_clips(table, "short_caption", ["r", roots[1]], "fps=29.97")
    assert clip[:3] == ("000000000005_x-000000", data.Excerpt(x, 30 / 29.97, 60 / 29.97), "a disc")


def test_miradata_as_published_in_july_2024(tmp_path):
    header = "clip_id,source,video_url,video_id,fps,timestamp,framestamp,file_path,short_caption," \
        "dense_caption\n"
    times = "\"['0:00:01.500', '0:01:02.000']\",\"[45, 1860]\""
    rows = [f"{number},{source},https://x,{name},30.0,{times},{name}/clip.mp4,a,b of {name}"
            for number, source, name in (("1234.0", "pexels", "one"), ("1234.1", "pexels", "two"),
                                         ("77.0", "youtube", "three"), ("78.0", "pexels", "four"))]
    table = tmp_path / "miradata_v1.csv"
    table.write_text(header + "\n".join(rows) + "\n")
    raw = put(tmp_path, "raw/000000001/000000001234.mp4")
    two = put(tmp_path, "two/clip.mp4")
    clips = find_clips(table, "dense_caption", [tmp_path, tmp_path / "raw"], "source=pexels")
    assert {c.caption: c.path for c in clips} == {
        "b of one": data.Excerpt(raw, 1.5, 62), "b of two": two, "b of four": tmp_path / "four/clip.mp4"}
    raw.unlink()  # ids do not depend on which files there are
    assert [c.id for c in find_clips(table, "dense_caption", where="source=pexels")] == [c.id for c in clips]


def write_shard(shard, members):
    shard.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(shard, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return shard


def test_shards(tmp_path):
    first = write_shard(tmp_path / "00000.tar", {
        "a.mp4": b"video a", "a.txt": b"caption a\n", "._a.mp4": b"mac", "c.jpg": b"image", "c.txt": b"c",
        "sub.d/b.x.mp4": b"video b", "sub.d/b.json": b'{"text": "b", "dense_caption": "dense"}',
        "d.mov": b"video d", "d.json": b'{"caption": "hidden"}', "d.txt": "gr\u00fcn".encode()})
    write_shard(tmp_path / "deep/00001.tar", {"a.txt": b"other a", "a.mp4": b"other video"})
    clips = {c.caption: c for c in find_clips(tmp_path)}
    assert sorted(clips) == ["b", "caption a", "gr\u00fcn", "other a"]
    for caption, content in (("b", b"video b"), ("caption a", b"video a"), ("gr\u00fcn", b"video d"),
                             ("other a", b"other video")):
        file, *_, offset, size = clips[caption].path
        assert file.read_bytes()[offset:offset + size] == content
    assert re.fullmatch("deep-00001-tar-a-mp4-[0-9a-f]{10}", clips["other a"].id)
    assert str(clips["b"].path) == str(first / "sub.d/b.x.mp4")
    of_first = [c for c in clips.values() if c.path.file == first]
    assert sorted(find_clips(first)) == sorted(of_first)
    both = find_clips([tmp_path / "deep/00001.tar", str(first)])
    assert len(both) == 4 and set(of_first) < set(both)


def test_the_json_of_a_shard_is_a_row(tmp_path):
    shard = write_shard(tmp_path / "a.tar", {
        "a.mp4": b"a", "a.json": b'{"caption": "a", "dense_caption": "dense a", "source": "pexels"}',
        "b.json": b'{"caption": "b", "dense_caption": "dense b", "source": "youtube"}', "b.mp4": b"b"})
    assert [c.caption for c in find_clips(shard, "dense_caption", where="source=pex*")] == ["dense a"]


def test_bad_shards(tmp_path):
    def refused(reason, members=None, **flags):
        if members:
            write_shard(tmp_path / "a.tar", members)
        with pytest.raises(common.UserError, match=reason):
            find_clips(tmp_path / "a.tar", **flags)

    refused("a.tar: a: its text is not UTF-8", {"a.mp4": b"x", "a.txt": b"\xff\xfe"})
    refused("a.tar: a: not valid JSON", {"a.mp4": b"x", "a.json": b"{"})
    refused("a.tar: a: not {.caption", {"a.mp4": b"x", "a.json": b"[7]"})
    refused("a.tar: a: a caption must be text, not 7", {"a.mp4": b"x", "a.json": b'{"caption": 7}'})
    refused("a.tar: a: no 'dense'; it has caption", {"a.mp4": b"x", "a.txt": b"x"}, caption_key="dense")
    refused("a.tar: a: no 'source'; it has caption", where="source=x")
    refused("no videos in .*a.tar", {"a.jpg": b"x", "a.txt": b"x"})
    refused("none of the 1 videos in .* has a caption", {"a.mp4": b"x"})
    whole = write_shard(tmp_path / "a.tar", {"a.txt": b"x", "a.mp4": bytes(100_000)}).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:50_000])
    refused("a.tar cannot be read as a tar without compression: unexpected end of data")
    (tmp_path / "a.tar").write_bytes(gzip.compress(whole))
    refused("a.tar cannot be read as a tar without compression")
    shutil.copy(tmp_path / "a.tar", tmp_path / "a.tar.gz")
    with pytest.raises(common.UserError, match="a.tar.gz cannot be read as a tar without compression"):
        find_clips(tmp_path / "a.tar.gz")
    with pytest.raises(common.UserError, match="a.mp4 is a video; give its folder, a list"):
        find_clips(put(tmp_path, "a.mp4"))
