"""Files of results, such as `samples.jsonl`: one per line, validated on reading."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fkv import files, kinds
from fkv.errors import UserError
from fkv.evaluation.math_answers import FAILED, NO_ANSWER, RIGHT, TIMEOUT, WRONG
from fkv.runs import parallel, rundir

_COUNT = kinds.whole(0)
# Budget 0 is the full cache.
FIELDS = {
    "policy": kinds.TEXT,
    "budget": _COUNT,
    "interval": _COUNT,
    "problem": kinds.TEXT,
    "sample": _COUNT,
    "verdict": kinds.one_of((RIGHT, WRONG, NO_ANSWER, TIMEOUT, FAILED)),
    "answer": kinds.Kind("text or null", lambda value: value is None or isinstance(value, str)),
    "reference": kinds.TEXT,
    "tokens": _COUNT,
    "truncated": kinds.SWITCH,
    "evictions": _COUNT,
    "text": kinds.TEXT,
}


@dataclasses.dataclass(frozen=True)
class Form:
    """What the lines of a file look like.

    Attributes:
      what: a line is.
      fields: of every line.
      named: those that identify it.
    """

    what: str
    fields: Mapping[str, kinds.Kind]
    named: tuple[str, ...]

    def key(self, row: dict) -> tuple:
        """The fields that identify a line."""
        return tuple(row[name] for name in self.named)


SAMPLE = Form("a sample", FIELDS, ("policy", "budget", "problem", "sample"))
key = SAMPLE.key


def right(row: dict) -> bool:
    """Whether an answer counts as right."""
    return row["verdict"] == RIGHT


def read(path: Path, interval: int | None = None, form: Form = SAMPLE) -> tuple[list[dict], int]:
    """The rows of a file, and the bytes of an incomplete last line (of a killed run).

    Args:
      interval: required of all rows, if given.

    Raises:
      UserError: the file can't be read, or a line is not JSON, lacks a field, has a wrong one, or
        repeats the answer of an earlier line.
    """
    data = files.read_bytes(path)
    whole, lines, rows = data[: data.rfind(b"\n") + 1], {}, []
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            row = json.loads(line.decode())
            wrong = _wrong(row, form)
        except (ValueError, RecursionError):
            row, wrong = {}, "it is not JSON in UTF-8"
        found = row.get("interval") if isinstance(row, dict) else None
        if interval is not None and _COUNT.fits(found) and found != interval:
            raise UserError(
                f"{path}, line {number} is of interval {found}, not {interval}: use another "
                "--workdir"
            )
        if not wrong and form.key(row) in lines:
            wrong = f"it repeats the answer of line {lines[form.key(row)]}"
        if wrong:
            raise UserError(f"{path}, line {number} is not {form.what}: delete that line ({wrong})")
        lines[form.key(row)] = number
        rows.append(row)
    return rows, len(data) - len(whole)


def _wrong(row: Any, form: Form) -> str:
    """What is wrong with a row; empty if nothing is."""
    if not isinstance(row, dict):
        return "it is not a JSON object"
    for name, kind in form.fields.items():
        if name not in row:
            return f"it has no field {name!r}"
        if not kind.fits(row[name]):
            return f"its field {name!r} is {json.dumps(row[name])[:60]}"
    return ""


class Samples:
    """The lines of a file of an evaluation, appended as answers end.

    Every process holds all of them; process 0 writes.

    Attributes:
      rows: by their `Form.key`.
    """

    def __init__(self, path: Path, interval: int, form: Form = SAMPLE):
        self.path, self.form, found = path, form, []
        if path.exists():
            found, unfinished = read(path, interval, form)
            # An incomplete last line of a killed run is dropped, and answered again.
            if unfinished and parallel.first():
                files.write_text(path, _lines(found))
        self.rows = {form.key(row): row for row in found}

    def add(self, rows: Iterable[dict]) -> None:
        rows = list(rows)
        if parallel.first():
            files.append_text(self.path, _lines(rows))
        self.rows |= {self.form.key(row): row for row in rows}

    def settle(self, rank: Callable[[tuple], Any]) -> None:
        """Puts the rows into an order that does not depend on when each answer ended.

        Args:
          rank: of a key; rows of equal rank stay in their order.
        """
        keys = sorted(self.rows, key=rank)
        if keys != [*self.rows]:
            self.rows = {key: self.rows[key] for key in keys}
            if parallel.first():
                files.write_text(self.path, _lines([*self.rows.values()]))

    def check_references(self, references: Mapping[str, str]) -> None:
        """Refuses answers to other problems, also in runs that recorded no digests.

        Args:
          references: right answers by problem.
        """
        for row in self.rows.values():
            now = references.get(row["problem"], row["reference"])
            if now != row["reference"]:
                raise UserError(
                    f"{self.path}: the answer to problem {row['problem']} was compared with "
                    f"{row['reference']!r:.40}, which is now {now!r:.40}: use another --workdir"
                )


def _lines(rows: Sequence[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def forget(path: Path, names: Sequence[str], inputs: Mapping[str, Any]) -> list[str]:
    """Drops the answers of scorers that have changed, and returns the names of these.

    Args:
      path: the run directory.
      names: of scorers that may have changed.
      inputs: current digests.
    """
    keys = {rundir.answers_of(name): name for name in names}
    old = rundir.read_inputs(path)
    changed = sorted(keys[key] for key in keys if old.get(key, inputs[key]) != inputs[key])
    if not changed:
        return []

    def stays(line):
        try:
            return json.loads(line)["policy"] not in changed
        except (ValueError, TypeError, KeyError):
            return True  # refused later, with its line number

    file = path / "samples.jsonl"
    lines = files.read_text(file).splitlines(keepends=True) if file.exists() else []
    files.write_text(file, "".join(line for line in lines if stays(line)))
    rundir.write_inputs(path, {key: x for key, x in old.items() if keys.get(key) not in changed})
    return changed
