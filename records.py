"""Where records are read: JSON files, lists of JSON lines, texts. What is wrong with one is said by its file,
its line and its key; sizes are looked at before memory is taken.

A kind says what a value must be: str, bool, int, float (finite, or whole), dict; a range for a whole number
within it; Path for a text that can be one; None; [kind] for a list of such; [kind, kind] for one of so many;
(kind, kind) for either.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

from files import UserError, as_json

LARGEST = 2**26  # bytes of a text or a JSON file
LONGEST = 2**22  # bytes of a line in a list, or of a caption
SIZE = range(1, 10**6)  # of anything that memory is taken for


class Record(dict):
    """A dict that knows where it was read: what is not in it is missed by name."""

    def __init__(self, values: dict, where):
        super().__init__(values)
        self.where = where

    def __missing__(self, key):
        raise UserError(f"{self.where} has no {key!r}")


def read(path, kinds: dict | None = None) -> Record:
    """A JSON file that holds a record."""
    return parse(read_text(path), path, kinds)


def read_text(path, most: int = LARGEST) -> str:
    """UTF-8, with or without the byte order mark of Windows editors."""
    path = Path(path)
    if not path.is_file():  # of a pipe one would wait forever
        raise UserError(f"no such file: {path}")
    if path.stat().st_size > most:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes; such a file has {most:,} at most")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from None


def lines(path) -> Iterator[tuple[int, str]]:
    """(number, line) of a text of any size."""
    with open(path, "rb") as f:
        number = 0
        while line := f.readline(LONGEST + 1):
            number += 1
            if len(line) > LONGEST:
                raise UserError(f"{path}:{number}: the line has over {LONGEST:,} bytes")
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise UserError(f"{path} is not UTF-8 text (line {number}); save it as UTF-8") from None


def parse(text: str | bytes, where, kinds: dict | None = None, example: str = "{...}") -> Record:
    """The record that a text holds."""
    values = value(text, where)
    if not isinstance(values, dict):
        raise UserError(f"{where}: not {example} but {shown(values)}")
    return check(values, where, kinds or {})


def value(text: str | bytes, where):
    """Whatever JSON a text holds."""
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{where}: not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None


def check(values: dict, where, kinds: dict) -> Record:
    """The record, whose values must be of these kinds as far as they are there."""
    for key, kind in kinds.items():
        if key in values and not fits(values[key], kind):
            raise UserError(f"{where}: {key} = {shown(values[key])} is not {named(kind)}")
    return Record(values, where)


def fits(value, kind) -> bool:
    if isinstance(kind, tuple):
        return any(fits(value, k) for k in kind)
    if isinstance(kind, list):
        each = kind * len(value) if isinstance(value, list) and len(kind) == 1 else kind
        return isinstance(value, list) and len(value) == len(each) and all(map(fits, value, each))
    if isinstance(kind, range):
        return type(value) is int and value in kind
    if kind is int:
        return type(value) is int and abs(value) < 2**63
    if kind is float:
        return fits(value, int) or type(value) is float and math.isfinite(value)
    if kind is Path:
        return isinstance(value, str) and can_be_path(value)
    return value is None if kind is None else isinstance(value, kind)


def can_be_path(text: str) -> bool:
    try:
        return "\0" not in text and len(os.fsencode(text)) < 4096 and all(
            len(os.fsencode(name)) < 256 for name in text.split("/"))
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def named(kind) -> str:
    if isinstance(kind, tuple):
        return " or ".join(map(named, kind))
    if isinstance(kind, list):
        return f"a list of {len(kind)}: {named(kind[0])}" if len(kind) > 1 else f"a list: {named(kind[0])}"
    if isinstance(kind, range):
        return f"a whole number from {kind[0]} to {kind[-1]}"
    names = {str: "a text", Path: "a path", bool: "true or false", int: "a whole number", float: "a number",
             dict: "a record"}
    return names.get(kind, "null")


def shown(value) -> str:
    text = as_json(value)
    return text if len(text) < 60 else text[:57] + "..."
