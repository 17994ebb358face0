"""Rows from where users have them: Parquet and JSONL files, and data sets on the hub."""

import glob
from pathlib import Path

import datasets

from fkv.errors import UserError

_KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


def is_file(path: str) -> bool:
    """Whether the name is that of a file or directory of rows, and not a hub id."""
    return Path(path).suffix in _KINDS or Path(path).is_dir()


def open_file(path: str) -> datasets.Dataset:
    """Rows of a Parquet or JSONL file, or of all Parquet files of a directory, by name.

    Raises:
      UserError: the file is missing, of another kind, or can't be read.
    """
    files, kind = [path], _KINDS.get(Path(path).suffix)
    if Path(path).is_dir():
        files, kind = sorted(map(str, Path(path).glob("*.parquet"))), "parquet"
        if not files:
            raise UserError(f"{path}: this directory has no .parquet files")
    elif kind is None:
        raise UserError(f"{path}: rows are read from .parquet or .jsonl files, or a directory")
    elif not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        # A name is no pattern, though `datasets` takes it for one.
        names = [glob.escape(name) for name in files]
        return datasets.load_dataset(kind, data_files=names, split="train")
    except StopIteration:
        raise UserError(f"{path}: can't be read as {kind} (empty)") from None
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path}: can't be read as {kind} ({reason})") from error


def open_rows(path: str, split: str, subset: str = "") -> datasets.Dataset:
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


def column(rows: datasets.Dataset, name: str, path: str) -> datasets.Column:
    """One column of the rows.

    Raises:
      UserError: there is no such column; the message lists those there are.
    """
    if name not in rows.column_names:
        raise UserError(f"{path}: no column {name!r}; it has {', '.join(rows.column_names)}")
    return rows[name]
