"""A store knows what it is made of: what is damaged, edited or another's is never used without a word."""

import json
import os
import random
import re
import shutil

import pytest
import torch
from worlds import tree

import common
import data
import toy
from common import UserError


@pytest.fixture
def filled(tmp_path, ranks):
    """A store of 6 clips, as its Writer makes it, and its entries."""
    entries = [data.index_entry(f"c{i}", f"number {i}", "seed", 0, f"c{i}.mp4") for i in range(6)]
    store = data.Writer(tmp_path / "agg_0", ranks, {"latents": [3, 4, 2, 2]}, entries)
    for i, id in enumerate(store.entries):
        store.write(id, torch.full((3, 4, 2, 2), float(i)), torch.full((i + 1, 8), float(i)))
    data.write_text_embedding(store.folder / "empty.safetensors", torch.ones(1, 8))
    store.finish()
    return store.folder, entries


def check(folder, code, capsys, said=""):
    assert data.main(data.Flags("check", str(folder))) == code
    output = capsys.readouterr()
    assert said in output.out + output.err


def flip(file, place, bit=0):
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.write_bytes(content)


def test_the_index_knows_size_and_checksum(filled):
    folder, entries = filled
    for i, (clip, entry) in enumerate(zip(data.Clips(folder), entries, strict=True)):
        file = data.clip_file(folder, clip["id"])
        loaded = data.Clips(folder).load(i)
        assert clip == entry | {"bytes": file.stat().st_size, "crc32": clip["crc32"]}
        assert clip["crc32"] == common.checksum(loaded["latents"], loaded["text"])


def test_every_flipped_bit_of_the_tensors_is_found(filled):
    """One in the header is found too, or changes nothing that is read."""
    folder, _ = filled
    clips = data.Clips(folder)
    file = data.clip_file(folder, "c3")
    whole, expected = file.read_bytes(), clips.load(3)
    header = 8 + int.from_bytes(whole[:8], "little")
    chance = random.Random(0)
    found = 0
    for n in range(300):
        place = chance.randrange(header, len(whole)) if n % 2 else chance.randrange(header)
        flip(file, place, chance.randrange(8))
        try:
            loaded = clips.load(3)
            assert place < header and all(torch.equal(loaded[k], expected[k]) for k in ("latents", "text"))
        except UserError as error:
            assert str(file) in str(error)
            found += 1
        file.write_bytes(whole)
    assert found > 200


def test_the_file_of_another_clip_is_refused(filled):
    folder, _ = filled
    shutil.copy(data.clip_file(folder, "c2"), data.clip_file(folder, "c3"))
    with pytest.raises(UserError, match="c3.safetensors is (truncated or another|damaged)"):
        data.Clips(folder).load(3)


def test_check_reports_all_that_is_wrong(filled, capsys):
    folder, _ = filled
    check(folder, 0, capsys, "none of 6 clips is damaged")
    flip(data.clip_file(folder, "c1"), -3)
    os.truncate(data.clip_file(folder, "c2"), 100)
    data.clip_file(folder, "c4").unlink()
    entries = list(data.Clips(folder))
    data.write_clip(folder, "c5", torch.full((3, 4, 2, 2), torch.nan), torch.zeros(1, 8), "nan")
    fresh = {k: v for k, v in entries[5].items() if k not in ("bytes", "crc32")}
    data.write_index(folder, [*entries[:5], fresh, entries[0]])
    assert data.main(data.Flags("check", str(folder))) == 2
    said = capsys.readouterr().out
    for line, what in ((2, "c1.safetensors is damaged"), (3, "c2.safetensors is truncated"),
                       (5, "no such file: .*c4"), (6, "c5 holds nan"), (7, "c0 is listed twice")):
        assert re.search(f"index.jsonl:{line}: .*{what}", said), what
    assert "5 of 7 clips are damaged" in said
    (folder / "empty.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="empty.safetensors"):
        data.main(data.Flags("check", str(folder)))


@pytest.mark.parametrize("id", ["../../evil", "/abs/evil", "", ".", "..", ".hidden", "a/b", "a\\b", "a\0b",
                                "a\nb", "x" * 221, "\u901f" * 74])
def test_what_cannot_name_a_file_is_no_id(tmp_path, ranks, id):
    before = tree(tmp_path)
    with pytest.raises(UserError, match="cannot be the name of a file"):
        data.Writer(tmp_path / "agg", ranks, {}, [data.index_entry(id, "", "seed", 0, "")])
    assert tree(tmp_path) == before
    for good in ("a b", "a.b", "caf\u00e9", "\u901f", "x" * 220):
        assert data.check_id(good, "") == good


def test_two_clips_of_one_id_are_refused(tmp_path, ranks):
    entries = [data.index_entry("a", "", "seed", 0, "")] * 2
    with pytest.raises(UserError, match="two clips have the id a"):
        data.Writer(tmp_path / "agg", ranks, {}, entries)


# ------------------------------------------------------------------------------------------ fingerprints

def test_a_fingerprint_covers_every_byte_and_the_tokenizer(tmp_path):
    toy.make_wan(tmp_path / "wan", trained=False)
    before = {network: data.fingerprint(tmp_path / "wan", network) for network in ("vae", "t5")}
    pieces = tmp_path / "wan/google/umt5-xxl/spiece.model"
    for file, network in (("vae.safetensors", "vae"), ("t5.safetensors", "t5"), (pieces, "t5")):
        file = tmp_path / "wan" / file
        flip(file, file.stat().st_size // 2)
        after = {network: data.fingerprint(tmp_path / "wan", network) for network in before}
        assert {name for name in before if after[name] != before[name]} == {network}
        flip(file, file.stat().st_size // 2)


def test_a_large_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "LARGE", 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for size, once in ((999, False), (1000, True)):
        file = tmp_path / "weights"
        file.write_bytes(bytes(size))
        time = file.stat().st_mtime_ns
        first = common.fingerprint(file)
        flip(file, 500)
        os.utime(file, ns=(time, time))
        assert (common.fingerprint(file) == first) == once
        os.utime(file, ns=(time, time + 1))
        assert common.fingerprint(file) != first
    for kept in (tmp_path / "cache/bagger").iterdir():
        kept.write_text("damaged")
    assert common.fingerprint(file) != first
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # no folder can be made there
    assert common.fingerprint(file) != first


def test_an_edited_meta_is_refused(filled, ranks):
    folder, entries = filled
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"latents": [3, 4, 2, 3]}))
    with pytest.raises(UserError, match="was begun with latents"):
        data.Writer(folder, ranks, {"latents": [3, 4, 2, 2]}, entries)
