"""Flags: a stage's Config dataclass is its flags, its help, its defaults and what gets recorded.

A stage parses them before it imports torch, which takes a second or more: --help and a wrong flag answer at
once.
"""

import argparse
import dataclasses
import inspect
import re
import types
import typing
from typing import Literal

Dtype = Literal["float32", "bfloat16"]
Solver = Literal["euler", "heun", "unipc", "unipc-diffusers", "renoise"]
HELD_OUT = 32  # seed clips kept out of training and rollouts by default


class UserError(ValueError):
    """Something the user can mend; `common.run` shows it as a line or two, without a traceback."""


def positional(**kwargs):
    """A Config field given by place instead of by flag."""
    return dataclasses.field(metadata={"positional": True}, **kwargs)


def parse(config: type, doc: str, argv: list[str] | None = None):
    """argv -> Config. The comment behind a field (or on the lines right above it) is its help. Its attribute
    `given` names the fields that were on the command line, be it at their default."""
    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        pass

    parser = argparse.ArgumentParser(description=doc, formatter_class=Formatter, allow_abbrev=False)
    comments, hints = field_comments(config), typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        assert comments.get(field.name), f"{field.name} needs a comment, which is the flag's help"
        kind, options = hints[field.name], {"help": comments[field.name].replace("%", "%%")}
        if typing.get_origin(kind) in (types.UnionType, typing.Union):  # X | None
            kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
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
            parser.add_argument("--" + field.name.replace("_", "-"), required=required, **options)
    absent = dict.fromkeys((field.name for field in dataclasses.fields(config)), dataclasses.MISSING)
    given = vars(parser.parse_args(argv, argparse.Namespace(**absent)))
    given = {k: v for k, v in given.items() if v is not dataclasses.MISSING}
    cfg = config(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    cfg.given = given.keys()
    return cfg


class Several(argparse.Action):
    """Collects the values of a flag that may be given several times, too."""

    def __call__(self, parser, namespace, values, option=None):
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*(before if isinstance(before, list) else ()), *values])


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
