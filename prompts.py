"""The prompts of sample.py: from its flags, a .txt or a .jsonl, and how they change within a video."""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import data
import records
from common import UserError

# what a line of a .jsonl may hold
KINDS = {"prompt": (str, [str]), "times": list, "seed": int, "seconds": float, "name": str, "extend": Path}


def read_prompts(cfg, before: dict) -> list[tuple[str, dict]]:
    """For each prompt, its place and a row such as {"prompt": ..., "id": ...}. before: the tags of --like."""
    if cfg.prompt is not None and cfg.prompts:
        raise UserError("--prompt and --prompts are both given; choose one")
    if cfg.prompt is not None:
        return [("--prompt", {"prompt": cfg.prompt, "id": before.get("id", 0)})]
    if cfg.prompts:
        rows = list(read_file(Path(cfg.prompts)))
        if not rows:
            raise UserError(f"{cfg.prompts} holds no prompts")
        return [(where, row | {"id": id}) for id, (where, row) in enumerate(rows)]
    if before:
        return [(cfg.like, {"prompt": before["prompts"]} | {k: before[k] for k in ("times", "name", "id")})]
    raise UserError('no prompt: give --prompt "a red disc moves left", or --prompts FILE')


def read_file(file: Path) -> Iterator[tuple[str, dict]]:
    """(FILE:LINE, row) of each prompt in a .txt or .jsonl."""
    if not file.is_file():
        raise UserError(f"--prompts {file}: no such file")
    if file.suffix not in (".txt", ".jsonl"):
        raise UserError(f"--prompts {file}: is no .txt or .jsonl")
    if file.suffix == ".txt":
        for number, line in enumerate(records.read_text(file).split("\n"), 1):
            if line.strip():
                yield f"{file}:{number}", {"prompt": line.strip()}
        return
    for number, row in data.read_rows(file, '{"prompt": ...}'):
        for key, value in ({"prompt": None} | row).items():  # None: a line without a prompt is refused too
            if not records.fits(value, KINDS.get(key, ())):
                raise UserError(f"{file}:{number}: {key[:40]} = {records.shown(value)}; a line may hold "
                                "prompt (a text or a list), times (a list), seed, seconds, name and extend "
                                "(a path)")
        if "extend" in row:
            row["extend"] = str(file.resolve().parent / row["extend"])
        yield f"{file}:{number}", row


def texts_and_times(row: dict, seconds: float, where: str) -> tuple[list[str], list[float]]:
    """The texts of a video of this length, and the second from which each applies."""
    texts = row["prompt"]
    times = row.get("times")
    if isinstance(texts, str) and "|" in texts:
        # a number and a colon before a text are its time, but 10:30 is a time of day
        parts = [re.fullmatch(r"(?:(\d+(?:\.\d+)?)\s*:(?!\d))?(.*)", part.strip(), re.DOTALL).groups()
                 for part in texts.split("|")]
        texts = [text.strip() for _, text in parts]
        if any(second for second, _ in parts[1:]):
            times = [float(parts[0][0] or 0), *(float(second) for second, _ in parts[1:] if second)]
    elif isinstance(texts, str):
        texts = [texts.strip()]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"{where}: an empty prompt")
    if any(len(text) > data.CAPTION for text in texts):
        raise UserError(f"{where}: a prompt of over {data.CAPTION} characters")
    if times is None:
        times = [i * seconds / len(texts) for i in range(len(texts))]
    rising = records.fits(times, [float]) and all(a < b for a, b in pairwise(times))
    if len(times) != len(texts) or times[0] != 0 or not rising:
        raise UserError(f"{where}: {len(texts)} prompts need the second from which each holds, first 0 and "
                        f"then rising, not {times}")
    return texts, times
