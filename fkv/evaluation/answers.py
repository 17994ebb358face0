"""`samples.jsonl` of an evaluation: a line for each answer, checked when it is read."""

import json
from pathlib import Path
from typing import Any

from fkv import files
from fkv.errors import UserError
from fkv.evaluation import math_answers

VERDICTS = (
    math_answers.RIGHT, math_answers.WRONG, math_answers.NO_ANSWER, math_answers.TIMEOUT,
    math_answers.FAILED,
)  # fmt: skip


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


# What each field may be; budget 0 is the full cache.
FIELDS = {
    "policy": _text,
    "budget": _count,
    "interval": _count,
    "problem": _text,
    "sample": _count,
    "verdict": lambda value: value in VERDICTS,
    "answer": lambda value: value is None or _text(value),
    "reference": _text,
    "tokens": _count,
    "truncated": lambda value: isinstance(value, bool),
    "evictions": _count,
    "text": _text,
}


def key(row: dict) -> tuple[str, int, str, int]:
    """What names an answer: no two of a file share it."""
    return row["policy"], row["budget"], row["problem"], row["sample"]


def right(row: dict) -> bool:
    """Whether it is counted as right."""
    return row["verdict"] == math_answers.RIGHT


def read(path: Path, interval: int | None = None) -> tuple[list[dict], int]:
    """The rows of a file, and how many bytes at its end belong to none.

    A killed run leaves such bytes, a line without its end; they are no row.

    Args:
      interval: that all rows must be of, if it is given.

    Raises:
      UserError: the file can't be read; or a line is no sample, is one that lacks a field or has
        one that is not what it may be, or answers what an earlier line does. The message names it.
    """
    data = files.read_bytes(path)
    whole, lines, rows = data[: data.rfind(b"\n") + 1], {}, []
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            row = json.loads(line.decode())
            wrong = _wrong(row)
        except (ValueError, RecursionError):
            row, wrong = None, "it is not JSON in UTF-8"
        if interval is not None and isinstance(row, dict):
            other = row.get("interval")
            if _count(other) and other != interval:
                raise UserError(
                    f"{path}, line {number} is of interval {other}, not {interval}: use another "
                    "--workdir"
                )
        if not wrong and key(row) in lines:
            wrong = f"it answers what line {lines[key(row)]} does"
        if wrong:
            raise UserError(f"{path}, line {number} is not a sample: delete that line ({wrong})")
        lines[key(row)] = number
        rows.append(row)
    return rows, len(data) - len(whole)


def _wrong(row: Any) -> str:
    """What is wrong with a row; empty if nothing is."""
    if not isinstance(row, dict):
        return "it is no JSON object"
    for name, fits in FIELDS.items():
        if name not in row:
            return f"it has no field {name!r}"
        if not fits(row[name]):
            return f"its field {name!r} is {_short(row[name])}"
    return ""


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."
