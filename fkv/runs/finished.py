"""Jobs that have finished: the same command, run again, prints their tables within a second.

What decides is the config, the version of the source, and the sizes and times of all files that the
run has read and written. Quick to import: neither JAX nor anything that needs it.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fkv import files
from fkv.errors import UserError
from fkv.runs.places import source_version

RECORD = "finished.json"
_MOST = 10_000  # files that are looked at


def record(workdir: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Records that the job of a run directory has finished.

    Args:
      config: the fields that the job reads.
    """
    path = files.expand(workdir)
    if path.is_dir() and (state := _state(path, config)):
        files.write_text(path / RECORD, json.dumps(state, indent=1) + "\n")


def tables(workdir: str | os.PathLike, config: Mapping[str, Any]) -> str | None:
    """The tables of a finished job; None if it has not finished, or if anything has changed."""
    path = files.expand(workdir)
    try:
        if not (path / RECORD).exists() or files.read_json(path / RECORD) != _state(path, config):
            return None
        own = [*path.glob("*.txt"), *path.glob("answers/*.txt")] or list(path.rglob("*.txt"))
        own = [x for x in own if x.name != "commit.txt"]
        own.sort(key=lambda x: (x.stat().st_mtime_ns, x))
        return "\n\n".join(files.read_text(x).rstrip() for x in own)
    except (UserError, OSError):  # damaged: the job tells
        return None


def duration(seconds: float) -> str:
    """Seconds in words: `4.2 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min"


def _state(path: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What must be the same for the job to have nothing to do."""
    stamps = {}
    for root in [path, *_paths(config)]:
        for file in _files(root):
            if file.name in (RECORD, ".lock") and file.is_relative_to(path):
                continue
            found = file.stat()
            stamps[str(file)] = [found.st_size, found.st_mtime_ns]
            if len(stamps) > _MOST:
                return None
    data = json.loads(json.dumps(config, sort_keys=True))
    return {"version": source_version(), "config": data, "files": stamps}


def _paths(value: Any) -> Iterator[Path]:
    """Files and directories that values of a config name, as `path` or `name=path`."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from _paths(one)
    elif isinstance(value, str):
        for part in {value, value.partition("=")[2]} - {""}:
            with contextlib.suppress(UserError):
                if (path := files.expand(part)).exists():
                    yield path


def _files(root: Path) -> Iterator[Path]:
    if not root.is_dir():
        yield root
    for folder, _, names in os.walk(root):
        yield from (Path(folder, name) for name in names)
