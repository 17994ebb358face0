"""Jobs that have finished: the same command, run again, prints their tables within a second.

What decides is the config, the source, and the sizes and times of the files that the config names
and of those in the run directory. What is on the hub or in a pip package is taken to stay as it is.
Quick to import: neither JAX nor anything that needs it.
"""

import contextlib
import dataclasses
import glob
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fkv import files
from fkv.errors import UserError
from fkv.runs.places import source_version

RECORD = "finished.json"
_MOST = 10_000  # files that are looked at
_SOURCE = Path(__file__).parents[1]
Stamps = dict[str, list[int]]  # sizes and times of files


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a job finds when it starts.

    Attributes:
      inputs: the source, the user's modules, and files that the config names.
      own: files in the run directory.
    """

    inputs: Stamps
    own: Stamps


def look(workdir: str | os.PathLike, config: Mapping[str, Any]) -> Seen | None:
    """Looks at the files that decide, once the recipe is loaded; None if there are too many, or
    some come and go.

    Args:
      config: the fields that the job reads.
    """
    path = files.expand(workdir)
    outside = [x for x in (_SOURCE, *_modules(), *_paths(config)) if not x.is_relative_to(path)]
    try:
        inputs = _stamps(x for root in outside for x in _files(root) if not x.is_relative_to(path))
        return Seen(inputs, _own(path))
    except OSError:
        return None


def record(workdir: str | os.PathLike, config: Mapping[str, Any], before: Seen | None) -> None:
    """Records that the job of a run directory has finished; not if its inputs changed meanwhile.

    Args:
      before: from `look`, when it started.
    """
    path = files.expand(workdir)
    if before is None or not path.is_dir():
        return
    try:
        if _stamps(map(Path, before.inputs)) != before.inputs:
            return
        own = _own(path)
    except OSError:
        return
    # Others are of earlier runs, with other options.
    written = [x for x in map(Path, own) if own[str(x)] != before.own.get(str(x))]
    written = [x for x in written if x.suffix == ".txt" and x.name not in ("commit.txt", "log.txt")]
    main = [x for x in written if x.parent in (path, path / "answers")]
    tables = sorted(main or written, key=lambda x: (own[str(x)][1], x))
    state = {**_state(config, before.inputs, own), "tables": list(map(str, tables))}
    files.write_text(path / RECORD, json.dumps(state, indent=1) + "\n")


def tables(workdir: str | os.PathLike, config: Mapping[str, Any], now: Seen | None) -> str | None:
    """The tables of a finished job; None if it has not finished, or if anything has changed.

    Args:
      now: from `look`.
    """
    path = files.expand(workdir)
    if now is None or not (path / RECORD).exists():
        return None
    try:
        known = files.read_json(path / RECORD)
        written = known.pop("tables", [])
        if known != _state(config, now.inputs, now.own):
            return None
        return "\n\n".join(files.read_text(Path(x)).rstrip() for x in written)
    except (UserError, OSError, TypeError):  # damaged: the job tells
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


def _state(config: Mapping[str, Any], inputs: Stamps, own: Stamps) -> dict[str, Any]:
    """What must be the same for the job to have nothing to do."""
    data = json.loads(json.dumps(config, sort_keys=True))
    return {"version": source_version(), "config": data, "inputs": inputs, "files": own}


def _stamps(some: Iterable[Path]) -> Stamps:
    found: Stamps = {}
    for file in some:
        stat = file.stat()
        found[str(file)] = [stat.st_size, stat.st_mtime_ns]
        if len(found) > _MOST:
            raise OSError(f"more than {_MOST} files")
    return found


def _own(path: Path) -> Stamps:
    return _stamps(x for x in _files(path) if x.name not in (RECORD, ".lock"))


def _modules() -> list[Path]:
    """Files of loaded modules that are not installed: recipes, and the policies they import."""
    installed = tuple({sys.prefix, sys.base_prefix, sys.exec_prefix, str(_SOURCE)})
    places = [getattr(x, "__file__", None) for x in list(sys.modules.values())]
    return sorted({Path(x) for x in places if x and not x.startswith(installed)})


def _paths(value: Any) -> Iterator[Path]:
    """Files and directories that values of a config name, as `path`, `name=path` or a pattern."""
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
                elif any(x in part for x in "*?["):
                    yield from map(Path, glob.glob(str(path), recursive=True))


def _files(root: Path) -> Iterator[Path]:
    if root.is_file():
        yield root
    for folder, _, names in os.walk(root, followlinks=True):
        if Path(folder).name != "__pycache__":
            yield from (Path(folder, name) for name in names)
