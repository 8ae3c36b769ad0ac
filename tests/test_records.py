"""Records of other people's making: what is wrong is named by file, line and key, and takes no memory."""

import json
import os

import pytest

import data
import model
import records
from common import UserError

KINDS = {"name": str, "count": int, "size": records.SIZE, "share": float, "shape": [records.SIZE] * 2,
         "words": [str], "route": (records.SIZE, None), "on": bool}


@pytest.mark.parametrize("value", [
    {}, {"name": "x", "count": -3, "size": 7, "share": 0.5, "shape": [1, 2], "words": ["a"], "route": None},
    {"share": 3, "route": 4, "words": [], "on": True, "unknown": object}])
def test_what_fits(value):
    assert records.check(value, "f", KINDS) == value


@pytest.mark.parametrize("key,value,wanted", [
    ("name", 7, "a text"), ("name", None, "a text"), ("count", 1.0, "a whole number"), ("count", "1", "a"),
    ("count", True, "a whole number"), ("count", 2**63, "a whole number"), ("size", 0, "from 1 to 999999"),
    ("size", 10**6, "from 1 to 999999"), ("share", float("nan"), "a number"), ("share", 1e999, "a number"),
    ("share", 10**400, "a number"), ("shape", [1], "a list of 2"), ("shape", [1, 2, 3], "a list of 2"),
    ("shape", [1, 0], "a list of 2"), ("words", "abc", "a list: a text"), ("words", ["a", 1], "a list: a"),
    ("route", 0, "from 1 to 999999 or null"), ("on", 1, "true or false")])
def test_what_does_not_fit_is_named(key, value, wanted):
    with pytest.raises(UserError, match=f"f.json: {key} = .* is not .*{wanted}") as error:
        records.check({key: value}, "f.json", KINDS)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("content,message", [
    (b"", "not valid JSON"), (b"{", "not valid JSON"), (b"[1]", r"not \{...\} but \[1\]"),
    (b"null", "but null"), (b"[" * 10**6, "nested too deeply"), (b'{"a":' * 10**5, "nested too deeply"),
    (b"\xff\xfe{}", "not UTF-8"), (b"1" * 5000, "not valid JSON")])
def test_what_is_no_record(tmp_path, content, message):
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(UserError, match=f"f.json.*{message}"):
        records.read(tmp_path / "f.json")


def test_sizes_are_looked_at_first(tmp_path):
    file = tmp_path / "f.json"
    file.write_text("{}")
    os.truncate(file, 10**12)  # takes no space, and would take all memory
    with pytest.raises(UserError, match="f.json has 1,000,000,000,000 bytes"):
        records.read(file)
    with pytest.raises(UserError, match="f.json:1: the line has over"):
        list(records.lines(file))
    for reads in (records.read, records.read_text, data.read_text_embedding):
        os.mkfifo(tmp_path / f"pipe-{reads.__name__}")
        with pytest.raises(UserError, match="no such file"):  # instead of waiting for somebody to write
            reads(tmp_path / f"pipe-{reads.__name__}")


def test_what_is_missing_is_missed_by_name(tmp_path):
    (tmp_path / "f.json").write_text('{"a": 1}')
    record = records.read(tmp_path / "f.json")
    assert record == {"a": 1} and record["a"] == 1 and record.get("b") is None
    with pytest.raises(UserError, match="f.json has no 'b'"):
        record["b"]


@pytest.mark.parametrize("line,message", [
    ('{"kind": "seed"}', "has no 'id'"), ('{"kind": "seed", "id": 7}', "id = 7 is not a text"),
    ('{"kind": "seed", "id": null}', "id = null is not"), ('{"kind": "seed", "id": "../x"}', "'../x' cannot"),
    ('{"kind": "seed", "id": "a", "bytes": "1"}', 'bytes = "1" is not'),
    ('{"kind": "seed", "id": "a"}', "has no 'file'"),
    ('{"kind": "seed", "id": "a", "file": "a\\u0000"}', "is not a path")])
def test_a_line_of_an_index(tmp_path, line, message):
    (tmp_path / "index.jsonl").write_text(f"{line}\n")
    with pytest.raises(UserError, match=f"index.jsonl.*{message}"):
        data.Clips(tmp_path).load(0)


def test_a_store_missing_a_key_of_its_meta(tmp_path):
    (tmp_path / "index.jsonl").touch()
    (tmp_path / "meta.json").write_text('{"latents": [1, 2]}')
    with pytest.raises(UserError, match=r"meta.json: latents = \[1, 2\] is not a list of 4"):
        data.Clips(tmp_path).meta()
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(UserError, match="meta.json has no 'wan'"):
        data.Clips(tmp_path).wan()


@pytest.mark.parametrize("key,value", [("wan", 1), ("held_out", "x"), ("window", 10**9), ("route", -1),
                                       ("mode", 0), ("base_loras", [["a"]])])
def test_settings_of_a_model(tmp_path, key, value):
    (tmp_path / "config.json").write_text(json.dumps({key: value}))
    with pytest.raises(UserError, match=f"config.json: {key} = "):
        model.settings(tmp_path)
