"""Rows from where users have them: Parquet and JSONL files, and data sets on the hub."""

import dataclasses
import glob
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fkv import files
from fkv.errors import UserError

_KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
_UNREADABLE = (
    datasets.exceptions.DatasetGenerationError, pa.ArrowException, ValueError, OSError,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class JsonRows:
    """Rows of a JSON file, with its values as they stand there.

    `datasets` reads JSON, too, but makes 1e30 of 10^30 + 1, 12.0 of 12, and times of text.
    """

    rows: list[dict[str, Any]]

    @property
    def column_names(self) -> list[str]:
        """Those of all rows."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> list[Any]:
        """One column, None where a row has none."""
        return [row.get(name) for row in self.rows]


Rows = datasets.Dataset | JsonRows


def is_file(path: str) -> bool:
    """Whether the name is that of a file or directory of rows, and not a hub id."""
    return Path(path).suffix in _KINDS or files.expand(path).exists()


def open_file(path: str) -> Rows:
    """Rows of a Parquet or JSONL file, or of all Parquet files of a directory, by name.

    Raises:
      UserError: the file is missing, of another kind, or can't be read.
    """
    place, kind = files.expand(path), _KINDS.get(Path(path).suffix)
    parts = [place]
    if place.is_dir():
        parts, kind = sorted(place.glob("*.parquet")), "parquet"
        if not parts:
            raise UserError(f"{path}: this directory has no .parquet files")
    elif kind is None:
        raise UserError(f"{path}: rows are read from .parquet or .jsonl files, or a directory")
    elif not place.is_file():
        raise UserError(f"{path}: no such file")
    file = path
    try:
        if kind == "json":
            return JsonRows(_parse(place.read_bytes()))
        about = {}
        for file in parts:
            if not Path(file).is_file():  # a pipe would never end
                raise ValueError("not a regular file")
            about[file] = pq.read_metadata(file)
            if about[file].schema.names != about[parts[0]].schema.names:
                raise ValueError(f"other columns than in {parts[0]}")
        if not any(one.num_rows for one in about.values()):
            raise ValueError("empty")
        _refuse_copies([file for file, one in about.items() if one.num_rows])
        file = path
        # A name is no pattern, though `datasets` takes it for one.
        names = [glob.escape(str(part)) for part in parts]
        return datasets.load_dataset(kind, data_files=names, split="train")
    except _UNREADABLE as error:
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        raise UserError(f"{file}: can't be read as {kind} ({reason})") from error


def _refuse_copies(parts: Sequence[Path]) -> None:
    """Refuses files of which two have a trace in common, which would count double in silence.

    Traces are told apart by where their question is from, `id` and `sample`, as `launch.traces`
    writes them; files without these by their bytes.
    """
    seen: dict[str, Path] = {}
    sizes = [part.stat().st_size for part in parts]
    for part, size in zip(parts, sizes, strict=True):
        names = pq.read_schema(part).names
        if {"id", "sample"} <= set(names):
            wanted = [name for name in ("source", "id", "sample") if name in names]
            columns = pq.ParquetFile(part).read(columns=wanted).to_pydict()
            rows = [row for row in zip(*map(columns.get, wanted), strict=True) if None not in row]
            keys = [(f"trace {row[-2]!r}, sample {row[-1]!r},", repr(row)) for row in rows]
        elif sizes.count(size) == 1:  # not to read all there is
            continue
        else:
            with part.open("rb") as file:
                keys = [("the same", hashlib.file_digest(file, "sha256").hexdigest())]
        for said, key in keys:
            if key in seen:
                raise UserError(
                    f"{part}: {said} is in {seen[key].name}, too, and would count twice: move one "
                    "of them out of the directory"
                )
            seen[key] = part


def _parse(data: bytes) -> list[dict[str, Any]]:
    """Objects of JSON: one a line, or all in an array, or a single one.

    Raises:
      ValueError: the data are something else; the message names the line.
    """
    data = data.removeprefix(b"\xef\xbb\xbf")
    lines = [(i, line) for i, line in enumerate(data.splitlines(), 1) if line.strip()]
    if not lines:
        raise ValueError("empty")
    try:
        return [_compact(_object(line, f"line {i}")) for i, line in lines]
    except ValueError as error:
        try:  # what ends in another line than it begins in must be all there is
            whole = _json(data)
        except ValueError:
            raise error from None
    rows = whole if isinstance(whole, list) else [whole]
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"entry {i} is no JSON object")
    return [_compact(row) for row in rows]


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = _json(line)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no JSON object")
    return row


def _json(data: bytes) -> Any:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is {data[error.start]:#04x}"
        raise ValueError(f"not UTF-8, as {byte}: convert it") from None
    try:
        found = json.loads(text, object_pairs_hook=_no_twins)
        if "\\ud" in text.lower():  # half of a character may be said in JSON, but is no text
            json.dumps(found, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} (column {error.colno})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is no text") from None
    return found


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("one name twice in an object")
    return found


def _compact(row: dict[str, Any]) -> dict[str, Any]:
    """The row with long lists of whole numbers as arrays, a fifth of the memory."""
    for name, value in row.items():
        if isinstance(value, list) and len(value) > 64 and all(type(x) is int for x in value):
            try:
                row[name] = np.array(value, np.int64)
            except OverflowError:
                pass
    return row


def open_rows(path: str, split: str, subset: str = "") -> Rows:
    """Rows of a file, or of a data set on the hub.

    Raises:
      UserError: there is no such file or data set, or it can't be read.
    """
    if is_file(path):
        return open_file(path)
    try:
        return datasets.load_dataset(path, subset or None, split=split)
    except Exception as error:  # whatever the hub's client raises
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{path}: not a .parquet or .jsonl file, and the hub has no such data set or can't be "
            f"reached ({type(error).__name__}: {reason}); a gated one needs `hf auth login`"
        ) from error


def column(rows: Rows, name: str, path: str) -> Sequence[Any]:
    """One column of the rows.

    Raises:
      UserError: there is no such column, and the message lists those there are; or its text is not
        UTF-8.
    """
    if name not in rows.column_names:
        there = ", ".join(rows.column_names) or "none"
        raise UserError(f"{path}: no column {name!r}; it has {there}")
    if isinstance(rows, datasets.Dataset):
        try:
            for chunk in rows.data.column(name).chunks:
                chunk.validate(full=True)
        except pa.ArrowException as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"{path}: column {name!r} can't be read ({reason})") from error
        if getattr(rows.features[name], "dtype", "") in ("float16", "float32"):
            # In the precision that they have, 0.1 is 0.1 and not 0.10000000149.
            return [None if x is None else np.float32(x) for x in rows[name]]
    return rows[name]
