"""Rows of Parquet and JSONL files, and of data sets on the hub."""

import collections
import contextlib
import dataclasses
import glob
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fkv import files
from fkv.errors import UserError

if TYPE_CHECKING:  # slow to import: with it come pandas, and all its formats
    import datasets

_KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


@dataclasses.dataclass(frozen=True)
class JsonRows:
    """Rows of a JSON file, with their values unchanged.

    `datasets` would read 10^30 + 1 as 1e30, 12 as 12.0, and some text as times.
    """

    rows: list[dict[str, Any]]

    @property
    def column_names(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> list[Any]:
        return [row.get(name) for row in self.rows]


Rows: TypeAlias = "datasets.Dataset | JsonRows"


def open_rows(path: str, split: str, subset: str = "") -> Rows:
    """Rows of a file, or of a data set on the hub; UserError if neither can be read."""
    if Path(path).suffix in _KINDS or files.expand(path).exists():
        return open_file(path)
    import datasets

    try:
        return datasets.load_dataset(path, subset or None, split=split)
    except Exception as error:  # whatever the hub's client raises
        raise UserError(
            f"{path}: not a .parquet or .jsonl file, and the hub has no such data set or can't be "
            f"reached ({type(error).__name__}: {_line(error)}); a gated one needs `hf auth login`"
        ) from error


def open_file(path: str) -> Rows:
    """Rows of a Parquet or JSONL file, or of all Parquet files of a directory, by name.

    Those of folders in it count if it has none itself; they take turns, file by file.

    Raises:
      UserError: the file is missing, of another kind, or can't be read.
    """
    place, file = files.expand(path), path
    parts = _parts(place) if place.is_dir() else [place]
    kind = "parquet" if place.is_dir() else _KINDS.get(place.suffix)
    if not parts:
        raise UserError(f"{path}: this directory has no .parquet files")
    if kind is None:
        raise UserError(f"{path}: rows are read from .parquet or .jsonl files, or a directory")
    if not place.is_dir() and not place.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if kind == "json":
            return JsonRows(_parse(place.read_bytes()))
        about = {}
        for file in parts:
            if not file.is_file():  # reading a pipe may never end
                raise ValueError("not a regular file")
            about[file] = pq.read_metadata(file)
            if about[file].schema.names != about[parts[0]].schema.names:
                raise ValueError(f"its columns differ from {parts[0]}")
        file, filled = path, [part for part in parts if about[part].num_rows]
        if not filled:
            raise ValueError("empty")
        _refuse_copies(filled)
        return _load(parts)
    except (pa.ArrowException, ValueError, OSError) as error:
        reason = _line(error.__cause__ or error)
        raise UserError(f"{file}: can't be read as {kind} ({reason})") from error


def _load(parts: Sequence[Path]) -> "datasets.Dataset":
    import datasets

    names = [glob.escape(str(part)) for part in parts]  # names are taken for patterns
    try:
        return datasets.load_dataset("parquet", data_files=names, split="train")
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(str(error)) from error.__cause__


def _parts(directory: Path) -> list[Path]:
    here = sorted(directory.glob("*.parquet"))
    return here or sorted(directory.glob("*/*.parquet"), key=lambda path: (path.name, path))


def _line(error: object) -> str:
    return str(error).strip().split("\n")[0]


def _refuse_copies(parts: Sequence[Path]) -> None:
    """Refuses files that share a trace (by the columns of `launch.traces`), or are identical."""
    seen: dict[str, Path] = {}
    sizes = collections.Counter(part.stat().st_size for part in parts)
    for part in parts:
        names = pq.read_schema(part).names
        if {"id", "sample"} <= set(names):
            wanted = [name for name in ("source", "id", "sample") if name in names]
            rows = pq.ParquetFile(part).read(columns=wanted).to_pylist()
            rows = [row for row in rows if None not in row.values()]
            keys = [(str(r), f"trace {r['id']!r}, sample {r['sample']!r},") for r in rows]
        elif sizes[part.stat().st_size] > 1:
            with part.open("rb") as file:
                keys = [(hashlib.file_digest(file, "sha256").hexdigest(), "its content")]
        else:
            keys = []
        for key, said in keys:
            if key in seen:
                raise UserError(
                    f"{part}: {said} is also in {seen[key].name}, and would count twice: move one "
                    "of them out of the directory"
                )
            seen[key] = part


def _parse(data: bytes) -> list[dict[str, Any]]:
    """JSON objects: one per line, in an array, or a single one; ValueError names the line."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    lines = {f"line {i}": line for i, line in enumerate(data.splitlines(), 1) if line.strip()}
    if not lines:
        raise ValueError("empty")
    try:
        found = {where: _json(line, f"{where}: ") for where, line in lines.items()}
    except ValueError as error:
        try:  # one value over several lines
            found = {"it": _json(data)}
        except ValueError:
            raise error from None
    rows = list(found.values())
    if len(rows) == 1 and isinstance(rows[0], list):
        (rows,) = rows
        found = {f"entry {i}": row for i, row in enumerate(rows)}
    for where, row in found.items():
        if not isinstance(row, dict):
            raise ValueError(f"{where} is not a JSON object")
    return rows


def _json(data: bytes, where: str = "") -> Any:
    try:
        found = json.loads(data.decode(), object_pairs_hook=_object)
        if b"\\ud" in data.lower():  # JSON may escape half of a surrogate pair, which is not text
            json.dumps(found, ensure_ascii=False, default=str).encode()
        return found
    except json.JSONDecodeError as error:
        reason = f"{error.msg} (column {error.colno})"
    except UnicodeDecodeError as error:
        reason = f"not UTF-8, as byte {error.start} is {data[error.start]:#04x}: convert it"
    except UnicodeEncodeError:
        reason = "half of a surrogate pair is not text"
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:
        reason = str(error)
    raise ValueError(where + reason)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; long lists of integers become arrays, at a fifth of the memory."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object repeats a name")
    for name, value in pairs:
        if isinstance(value, list) and len(value) > 64 and all(type(x) is int for x in value):
            with contextlib.suppress(OverflowError):
                found[name] = np.array(value, np.int64)
    return found


def column(rows: Rows, name: str, path: str) -> Sequence[Any]:
    """One column of the rows; UserError if it is missing or can't be read."""
    if name not in rows.column_names:
        there = ", ".join(rows.column_names) or "none"
        raise UserError(f"{path}: no column {name!r}; it has {there}")
    if isinstance(rows, JsonRows):
        return rows[name]
    try:
        for chunk in rows.data.column(name).chunks:
            chunk.validate(full=True)
    except pa.ArrowException as error:
        raise UserError(f"{path}: column {name!r} can't be read ({_line(error)})") from error
    if getattr(rows.features[name], "dtype", "") in ("float16", "float32"):
        # Printed in their own precision, 0.1 is 0.1 and not 0.10000000149.
        return [None if x is None else np.float32(x) for x in rows[name]]
    return rows[name]
