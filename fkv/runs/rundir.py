"""The directory of a run: its config, its inputs, its commit, its metrics and its checkpoints."""

import dataclasses
import fcntl
import json
import math
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import ml_collections

import fkv
from fkv.errors import UserError
from fkv.files import append_text, expand, read_bytes, write_text, writing
from fkv.runs import checkpoint, parallel

PROVENANCE = "provenance.json"


@dataclasses.dataclass
class Run:
    """An open run directory; `open_run` makes one. Only process 0 writes to it.

    Attributes:
      path: `config.json`, `provenance.json`, `commit.txt`, `metrics.jsonl`, `tb/` and
        `checkpoints/` lie here.
      config: the resolved config as plain JSON data.
    """

    path: Path
    config: dict[str, Any]
    _board: Any = None
    _held: Any = None

    def resume(self, target: Any) -> checkpoint.Checkpoint | None:
        """Restore the newest intact checkpoint into the structure of `target`, if there is any.

        Metrics of later steps (of all steps, if there is no checkpoint) are forgotten, since those
        steps will run again.

        Raises:
          UserError: see `checkpoint.restore`.
        """
        restored = None
        if checkpoint.latest_step(self.path) is not None:
            restored = checkpoint.restore(self.path, target)
        if parallel.first():
            last_step = -1 if restored is None else restored.step
            _trim_metrics(self.path / "metrics.jsonl", last_step)
            # TensorBoard reads the old event files too, and hides what the purge step tells it to.
            with writing(self.path / "tb"):
                self._board = _Board(self.path / "tb", purge_step=last_step + 1)
        return restored

    def save(self, step: int, state: Any, *, keep: int = 2, **info: Any) -> None:
        """Save a checkpoint whose info is the run's config and `info`; see `checkpoint.save`."""
        checkpoint.save(self.path, step, state, {"config": self.config, **info}, keep=keep)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write one line to `metrics.jsonl`, and the scalars among `metrics` to TensorBoard.

        Values may be numbers, arrays, strings, or lists and dicts of them. NaN and infinity, which
        JSON cannot express, become null.
        """
        if not parallel.first():
            return
        record = {"step": int(step), **_plain(metrics)}
        path = self.path / "metrics.jsonl"
        append_text(path, json.dumps(record, allow_nan=False) + "\n")
        scalars = {name: record[name] for name in metrics if isinstance(record[name], int | float)}
        with writing(self.path / "tb"):
            self._board = self._board or _Board(self.path / "tb")
            self._board.add(int(step), scalars)

    def close(self) -> None:
        """Close the TensorBoard file, and wait for the other processes."""
        if self._board is not None:
            self._board.close()
        parallel.barrier(f"end of the run in {self.path}")


def open_run(
    workdir: str | os.PathLike,
    config: ml_collections.ConfigDict,
    may_differ: Sequence[str] = (),
    inputs: Mapping[str, str | list[str]] | None = None,
) -> Run:
    """Create the run directory `workdir`, or open it again to go on with the same config.

    Every process calls this; process 0 creates it.

    Args:
      may_differ: dotted names of fields, or of groups of fields, that may change between openings
        because no result depends on them; `config.json` takes their newest values.
      inputs: digests (see `fkv.runs.provenance`) of what results depend on beside the config, by
        the words that name it in errors; a list may grow. `provenance.json` holds all there were.

    Raises:
      UserError: `workdir` cannot be written, holds a run (or checkpoints) of another config or of
        other inputs, or is in use by another process.
    """
    path, data = check_path(workdir), _as_json(config)
    parallel.barrier(f"start of the run in {path}")
    held = by_the_first(path, lambda: _create(path, data, may_differ, inputs or {}))
    return Run(path, data, _held=held)


def check_run(
    workdir: str | os.PathLike,
    config: ml_collections.ConfigDict,
    may_differ: Sequence[str] = (),
    inputs: Mapping[str, str | list[str]] | None = None,
) -> None:
    """Refuses what `open_run` will refuse of a config and inputs, and writes nothing."""
    path, data = check_path(workdir), _as_json(config)
    by_the_first(path, lambda: _check(path, data, may_differ, inputs or {}))


def _as_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    return json.loads(json.dumps(config.to_dict()))  # tuples become lists, as in config.json


def by_the_first(path: Path, act: Callable[[], Any]) -> Any:
    """What process 0 gets from it; a refusal is all processes'."""
    found = wrong = None
    if parallel.first():
        try:
            found = act()
        except UserError as error:
            wrong = error
    if parallel.anywhere(wrong is not None):
        raise wrong or UserError(f"process 0 can't open {path}: see what it said")
    return found


def _create(
    path: Path, data: dict[str, Any], may_differ: Sequence[str], inputs: Mapping[str, Any]
) -> IO:
    """What process 0 does to open a run directory; returns its lock."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        held = lock(path)
        old = _check(path, data, may_differ, inputs)
        write_text(path / "config.json", json.dumps(data, indent=1) + "\n")
        if new := {**old, **{name: _longer(old.get(name), x) for name, x in inputs.items()}}:
            write_inputs(path, new)
        _note_commit(path / "commit.txt")
    except OSError as error:
        raise UserError(
            f"cannot write run directory {path}: {error.strerror}; choose another --workdir"
        ) from error
    _trim_metrics(path / "metrics.jsonl")
    return held


def check_path(workdir: str | os.PathLike) -> Path:
    """The path with `~` filled in; refuses `gs://...` and the like, which are no file system.

    It refuses an empty name, too, as an unset variable of a shell leaves it.
    """
    if not os.fspath(workdir).strip():
        raise UserError("--workdir is empty: name a directory")
    if match := re.match(r"(\w+)://", os.fspath(workdir)):
        raise UserError(
            f"{workdir}: {match[1]}:// is no file system: mount the bucket (gcsfuse; --bucket of "
            "launch.sweep does) and give the directory where it is"
        )
    return expand(workdir)


def lock(path: Path, shared: bool = False) -> IO:
    """Keeps other processes off a directory for as long as this one lives or the file is open.

    Args:
      shared: let in others that share, too.

    Raises:
      UserError: another process is at work there.
    """
    file = (path / ".lock").open("a+")
    try:
        fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"another process is at work in {path}: wait for it, or use another --workdir"
        ) from None
    except OSError:
        pass  # a file system without locks
    return file


class _Board:
    """TensorBoard's file of events, written at once.

    The thread with which tensorboardX's `SummaryWriter` writes ends on a full disk, and the run
    would wait for it for ever.
    """

    def __init__(self, path: Path, purge_step: int | None = None):
        # Slow where torch is installed, which tensorboardX imports.
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        self._scalar, self._event = summary.scalar, event_pb2.Event
        path.mkdir(exist_ok=True)
        # The suffix keeps two openings within one second from sharing a file.
        self._file = event_file_writer.EventsWriter(str(path / "events"), f".{time.time_ns()}")
        if purge_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(step=purge_step, session_log=start)
        self._file.flush()

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one step's values."""
        for name, value in scalars.items():
            self._write(step=step, summary=self._scalar(name, value))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, **fields) -> None:
        self._file.write_event(self._event(wall_time=time.time(), **fields))


def _check(
    path: Path, data: dict[str, Any], may_differ: Sequence[str], inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """Refuses another config and other inputs than those of before; returns the latter."""
    old = read_inputs(path)
    wrong = []
    if differing := _config_differs(path / "config.json", data, may_differ):
        wrong.append(f"with another config ({'; '.join(differing)})")
    if differing := [
        name + _where(old[name], new)
        for name, new in inputs.items()
        if name in old and _longer(old[name], new) is None
    ]:
        wrong.append(f"of other inputs, which have changed since ({'; '.join(differing)})")
    if wrong:
        raise UserError(f"{path} holds a run {' and '.join(wrong)}: use another --workdir")
    return old


def read_inputs(path: Path) -> dict[str, Any]:
    """Digests of the inputs of the run in a directory, as `open_run` got them.

    Raises:
      UserError: its record is damaged.
    """
    record = path / PROVENANCE
    try:
        if record.exists():
            found = json.loads(read_bytes(record))
            if not all(isinstance(x, str | list) for x in found.values()):
                raise TypeError("not digests")
            return found
        record = path / "scorers.json"  # what evaluations wrote before there was more to record
        found = json.loads(read_bytes(record)) if record.exists() else {}
        return {answers_of(name): str(one["sha256"]) for name, one in found.items()}
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{record}: not the record of what a run has used ({error!r}): use another --workdir"
        ) from error


def answers_of(name: str) -> str:
    """Words for what answers under this name: scorers or a policy with its settings."""
    return f"evaluate.scorers or .policies: {name!r}"


def write_inputs(path: Path, inputs: Mapping[str, str | list[str]]) -> None:
    """Writes the record that `read_inputs` reads."""
    write_text(path / PROVENANCE, json.dumps(dict(inputs), indent=1) + "\n")


def _longer(old: str | list[str] | None, new: str | list[str]) -> str | list[str] | None:
    """The longer of two lists of which one goes on with the other, or what both are; else None."""
    if isinstance(old, list) and isinstance(new, list):
        shared = min(len(old), len(new))
        return max(old, new, key=len) if old[:shared] == new[:shared] else None
    return new if old is None or old == new else None


def _where(old: Any, new: Any) -> str:
    """Which entries of lists have changed."""
    if not (isinstance(old, list) and isinstance(new, list)):
        return ""
    changed = [i for i, pair in enumerate(zip(old, new, strict=False), 1) if len(set(pair)) > 1]
    return f", number {changed[0]}" + (f" and {len(changed) - 1} more" if changed[1:] else "")


def _config_differs(path: Path, new: dict[str, Any], may_differ: Sequence[str]) -> list[str]:
    """The fields in which a run's config is another, if there is one."""
    old = checkpoint.newest_info(path.parent).get("config")
    if path.exists():
        try:
            old = dict(json.loads(read_bytes(path)))
        except (ValueError, TypeError, RecursionError) as error:
            advice = "delete it, as the checkpoints know the config, too; or " if old else ""
            raise UserError(
                f"{path} is not the JSON of a config ({error}): {advice}use another --workdir"
            ) from error
    if old is None:
        return []
    old_fields = dict(_fields(old))
    new_fields = dict(_fields(new))
    return [
        f"{name}: {old_fields.get(name, 'absent')} -> {new_fields.get(name, 'absent')}"
        for name in sorted({*old_fields, *new_fields})
        if old_fields.get(name, ...) != new_fields.get(name, ...)
        and not any(f"{name}.".startswith(f"{prefix}.") for prefix in may_differ)
    ]


def _fields(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _note_commit(path: Path) -> None:
    # A run that goes on under newer code has a line for each.
    text = read_bytes(path).decode(errors="backslashreplace") if path.exists() else ""
    commits = text.splitlines()
    if (commit := source_version()) not in commits[-1:]:
        write_text(path, "".join(f"{line}\n" for line in [*commits, commit]))


def source_version() -> str:
    """The git commit of fkv's source, with "-dirty" if it was changed since, or fkv's version."""
    here = Path(__file__)
    try:
        for command in (
            # An fkv installed inside another project's checkout is not tracked by it.
            ["git", "ls-files", "--error-unmatch", here.name],
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        ):
            done = subprocess.run(
                command, cwd=here.parent, check=True, capture_output=True, text=True
            )
    except (OSError, subprocess.CalledProcessError):
        return f"fkv {fkv.__version__}"
    return done.stdout.strip()


def _trim_metrics(path: Path, last_step: float = math.inf) -> None:
    """Drop the records of later steps, and a last line that was cut off when the run was killed."""
    lines = read_bytes(path).decode(errors="replace").splitlines() if path.exists() else []
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            stays = json.loads(line)["step"] <= last_step
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number} is not a record: delete that line") from error
        if stays:
            kept.append(line + "\n")
    if lines:
        write_text(path, "".join(kept))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
