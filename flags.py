"""Flags: a stage's Config dataclass is its flags, its help, its defaults, their ranges and what gets
recorded.

A stage parses them before it imports torch, which takes a second or more: --help and a wrong flag answer at
once.
"""

import argparse
import dataclasses
import difflib
import functools
import inspect
import math
import os
import re
import sys
import types
import typing
from pathlib import Path
from typing import Annotated, Literal

import files
from files import UserError

Dtype = Literal["float32", "bfloat16"]
Solver = Literal["euler", "heun", "unipc", "unipc-diffusers", "renoise"]
HELD_OUT = 32  # seed clips kept out of training and rollouts by default

# types of fields: what a value must be, in words and as a test. No number may be nan or infinite
LARGEST = 2**31 - 1
Count = Annotated[int, "a whole number from 1 on", lambda n: 1 <= n <= LARGEST]
Whole = Annotated[int, "a whole number from 0 on", lambda n: 0 <= n <= LARGEST]
Amount = Annotated[float, "a number from 0 on", lambda x: x >= 0]
Positive = Annotated[float, "a number above 0", lambda x: x > 0]
Share = Annotated[float, "a number from 0 to 1", lambda x: 0 <= x <= 1]
Decay = Annotated[float, "a number from 0 on, below 1", lambda x: 0 <= x < 1]
LONGEST = 86400  # seconds of a video; all is planned, and its plan kept in memory, before it begins
Seconds = Annotated[float, f"seconds, above 0 and at most {LONGEST}, a day", lambda x: 0 < x <= LONGEST]
Size = Annotated[str, "WIDTHxHEIGHT, such as 832x480, each at most 16384",
                 lambda s: re.fullmatch(r"[1-9]\d*x[1-9]\d*", s, re.ASCII)
                 and all(len(n) < 6 and int(n) <= 16384 for n in s.split("x"))]
Device = Annotated[str, "cpu, cuda or cuda:N", lambda s: re.fullmatch(r"cpu|cuda(:\d{1,3})?", s, re.ASCII)]


def positional(**kwargs):
    """A Config field given by place instead of by flag."""
    return dataclasses.field(metadata={"positional": True}, **kwargs)


def name_of(field) -> str:
    """As the command line has it."""
    return field.name if "positional" in field.metadata else "--" + field.name.replace("_", "-")


@functools.cache
def kinds(config: type) -> dict:
    """{field: (its type without None, what a value must be in words or None, the test or None)}"""
    found = {}
    for name, kind in typing.get_type_hints(config, include_extras=True).items():
        if typing.get_origin(kind) in (types.UnionType, typing.Union):  # X | None
            kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
        words, test = getattr(kind, "__metadata__", (None, None))
        found[name] = typing.get_args(kind)[0] if words else kind, words, test
    return found


def in_range(cfg):
    """The __post_init__ of a Config: refuses values that are out of their range."""
    for field in dataclasses.fields(cfg):
        value, (kind, words, test) = getattr(cfg, field.name), kinds(type(cfg))[field.name]
        allowed, usual = TYPES.get(kind, (object, None))
        fits = isinstance(value, allowed) and not (kind is float and not math.isfinite(value))
        if value is not None and not (fits and (not test or test(value))):
            raise UserError(f"{name_of(field)} {value}: give {words or usual}")


# what a field of a type may hold: in Python, and from a video's tags, anything could come
TYPES = {int: (int, "a whole number"), float: (int | float, "a number"), str: (str | os.PathLike, "text"),
         bool: (bool, "true or false")}


class Parser(argparse.ArgumentParser):
    """One that says what is wrong in a line; --help says the rest."""

    def error(self, message):
        message = re.sub("^argument ", "", message)
        if len(message) > 400:
            message = message[:400] + " ..."
        raise UserError(f"{message}; --help lists the flags")

    def refuse_unknown(self, argv):
        """Before anything is said to be missing: it may be what was mistyped."""
        known = self._option_string_actions
        for word in before(argv, "--"):
            name = word.partition("=")[0]
            if re.match("--?[A-Za-z]", word) and " " not in word and name not in known:
                names = [flag.lstrip("-") for flag in known]
                near = difflib.get_close_matches(name.lstrip("-"), names, 1, 0.5)
                hint = f"did you mean --{near[0]}?" if near else "--help lists them"
                raise UserError(f"there is no flag {name[:80]}; {hint}")


def before(words: list[str], end: str) -> list[str]:
    return words[:words.index(end)] if end in words else words


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def parse(config: type, doc: str, argv: list[str] | None = None):
    """argv -> Config. The comment behind a field (or on the lines right above it) is its help. Its attribute
    `given` names the fields that were on the command line, be it at their default. Without argv it is a
    script's first act, which a wrong flag ends."""
    if argv is None:
        files.guard_screen()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            files.die_with_parent()
        try:
            return parse(config, doc, sys.argv[1:])
        except UserError as error:
            print(f"{Path(sys.argv[0]).name}: {files.plain(str(error))}", file=sys.stderr)
            sys.exit(2)
    parser = Parser(description=doc, formatter_class=Formatter, allow_abbrev=False)
    comments = field_comments(config)
    for field in dataclasses.fields(config):
        assert comments.get(field.name), f"{field.name} needs a comment, which is the flag's help"
        kind, *_ = kinds(config)[field.name]
        options = {"help": comments[field.name].replace("%", "%%")}
        if typing.get_origin(kind) is typing.Literal:
            options["choices"] = typing.get_args(kind)
        elif typing.get_origin(kind) is tuple:
            options |= {"nargs": "+", "type": typing.get_args(kind)[0], "action": Several}
        elif kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = kind
        required = field.default is dataclasses.MISSING
        if not required:
            options["default"] = field.default
        if required or field.default in (None, "", ()):  # nothing worth showing as "(default: ...)"
            options["default"] = argparse.SUPPRESS
        if "positional" in field.metadata:
            if not required:
                options["nargs"] = options.get("nargs", "?").replace("+", "*")
            parser.add_argument(field.name, **options)
        else:
            parser.add_argument(name_of(field), required=required, **options)
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS,
                        help="Show where in the code an error comes from")
    parser.refuse_unknown(argv)
    absent = dict.fromkeys((field.name for field in dataclasses.fields(config)), dataclasses.MISSING)
    given = vars(parser.parse_args(argv, argparse.Namespace(**absent)))
    given = {k: v for k, v in given.items() if v is not dataclasses.MISSING and k != "debug"}
    cfg = config(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    cfg.given = given.keys()
    return cfg


class Several(argparse.Action):
    """Collects the values of a flag that may be given several times, too."""

    def __call__(self, parser, namespace, values, option=None):
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*(before if isinstance(before, list) else ()), *values])


@functools.cache
def field_comments(config: type) -> dict[str, str]:
    comments, above = {}, []
    for line in inspect.getsource(config).splitlines():
        line = line.strip()
        if line.startswith("#"):
            above.append(line.lstrip("# "))
        elif match := re.match(r"(\w+)\s*:[^#]*(?:#\s*(.*))?$", line):
            comments[match[1]] = " ".join(above + [match[2] or ""]).strip()
            above = []
        else:
            above = []
    return comments
