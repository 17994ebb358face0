"""The directory of a run: its config, inputs, commits, metrics and checkpoints."""

import dataclasses
import fcntl
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from fkv import files
from fkv.errors import UserError
from fkv.runs import checkpoint, parallel
from fkv.runs.places import check_path, source_version

PROVENANCE = "provenance.json"
_LOGS = "metrics.jsonl", "times.jsonl"
Inputs = Mapping[str, str | list[str]]  # name: digest, or a list of digests that may grow


@dataclasses.dataclass
class Run:
    """An open run directory, from `open_run`. Only process 0 writes to it.

    It holds `config.json`, `provenance.json`, `commit.txt`, `metrics.jsonl`, `times.jsonl`, `tb/`
    and `checkpoints/`; `config` is the resolved config as JSON data.
    """

    path: Path
    config: dict[str, Any]
    _board: Any = None
    _held: Any = None

    def resume(self, target: Any, step: int | None = None) -> checkpoint.Checkpoint | None:
        """Restores a checkpoint, if there is one, into the structure of `target`.

        Metrics of later steps are dropped, as those steps run again.

        Args:
          step: of the checkpoint, by default the newest intact; 0 starts over.
        """
        restored = None
        if step != 0 and checkpoint.latest_step(self.path) is not None:
            restored = checkpoint.restore(self.path, target, step)
        if parallel.first():
            last_step = -1 if restored is None else restored.step
            for name in _LOGS:
                _trim_metrics(self.path / name, last_step)
            # TensorBoard also reads the old event files, and hides their steps from this one on.
            self._write_events([{"step": last_step + 1, "session_log": {"status": 1}}])
        return restored

    def save(self, step: int, state: Any, *, keep: int = 2, **info: Any) -> None:
        """Saves a checkpoint with the run's config and `info`; see `checkpoint.save`."""
        checkpoint.save(self.path, step, state, {"config": self.config, **info}, keep=keep)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends a line to `metrics.jsonl`, and the scalars among `metrics` to TensorBoard.

        Values are numbers, arrays, strings, or lists and dicts of these; NaN and infinity become
        null.
        """
        self._log("metrics.jsonl", step, metrics)

    def log_times(self, step: int, times: Mapping[str, float]) -> None:
        """Appends a line to `times.jsonl`: what differs from run to run; and to TensorBoard."""
        self._log("times.jsonl", step, times)

    def _log(self, name: str, step: int, metrics: Mapping[str, Any]) -> None:
        if not parallel.first():
            return
        text = json.dumps({"step": int(step), **metrics}, default=lambda x: x.tolist())
        record = json.loads(text, parse_constant=lambda _: None)
        files.append_text(self.path / name, json.dumps(record) + "\n")
        from tensorboardX import summary

        scalars = {name: record[name] for name in metrics if isinstance(record[name], int | float)}
        self._write_events(
            [{"step": int(step), "summary": summary.scalar(*x)} for x in scalars.items()]
        )

    def _write_events(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Writes to TensorBoard synchronously: `SummaryWriter`'s thread dies on a full disk."""
        # A slow import where torch is installed, which tensorboardX imports.
        from tensorboardX import event_file_writer
        from tensorboardX.proto import event_pb2

        path = self.path / "tb"
        with files.writing(path):
            if self._board is None:
                path.mkdir(exist_ok=True)
                own = f".{time.time_ns()}"  # two within a second would share a file
                self._board = event_file_writer.EventsWriter(str(path / "events"), own)
            for event in events:
                self._board.write_event(event_pb2.Event(wall_time=time.time(), **event))
            self._board.flush()

    def close(self) -> None:
        """Closes the TensorBoard file, and waits for the other processes."""
        if self._board is not None:
            self._board.close()
        parallel.barrier(f"close {self.path}")


def resume_together(runs: Sequence[Run], targets: Sequence[Any]) -> list[checkpoint.Checkpoint]:
    """Resumes runs that train side by side from the newest step of which all have a checkpoint.

    A kill between two saves leaves some a step ahead of others: both keep the one before. Returns
    an empty list, and all runs start over, where there is no such step.
    """
    if len(runs) == 1:  # which names damage that leaves it without a checkpoint
        found = [run.resume(x) for run, x in zip(runs, targets, strict=True)]
    else:
        step = checkpoint.common_step([run.path for run in runs])
        found = [run.resume(x, step) for run, x in zip(runs, targets, strict=True)]
    return [one for one in found if one is not None]


def open_run(
    workdir: str | os.PathLike,
    config: ConfigDict,
    may_differ: Sequence[str] = (),
    inputs: Inputs | None = None,
) -> Run:
    """Creates the run directory `workdir`, or opens it to resume a run with the same config.

    Args:
      may_differ: dotted names of fields, or of groups of fields, that may change on resuming, as no
        result depends on them; `config.json` holds their newest values.
      inputs: digests (see `fkv.runs.provenance`) of what results depend on besides the config.
        `provenance.json` accumulates them.

    Raises:
      UserError: `workdir` can't be written, is in use by another process, or holds a run or
        checkpoints with another config or other inputs.
    """
    path, data = check_path(workdir), _json_data(config)
    held = parallel.on_first(lambda: _create(path, data, may_differ, inputs or {}), f"open {path}")
    return Run(path, data, _held=held)


def check_run(
    workdir: str | os.PathLike,
    config: ConfigDict,
    may_differ: Sequence[str] = (),
    inputs: Inputs | None = None,
) -> None:
    """Refuses a config and inputs that `open_run` would refuse; writes nothing."""
    path, data = check_path(workdir), _json_data(config)
    parallel.on_first(lambda: _check(path, data, may_differ, inputs or {}), f"open {path}")


def lock(path: Path, shared: bool = False) -> IO:
    """Locks a directory until the process ends or the file is closed; `shared` locks coexist."""
    file = (path / ".lock").open("a+")
    try:
        fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        told = f"another process is using {path}: wait for it, or use another --workdir"
        raise UserError(told) from None
    except OSError:
        pass  # a file system without locks
    return file


def read_inputs(path: Path) -> dict[str, str | list[str]]:
    """The inputs recorded in a run directory; refuses a damaged record."""
    older = path / "scorers.json"  # of older evaluations, which recorded nothing else
    record = older if older.exists() and not (path / PROVENANCE).exists() else path / PROVENANCE
    try:
        found = files.read_json(record) if record.exists() else {}
        if record == older:
            found = {answers_of(name): entry["sha256"] for name, entry in found.items()}
        if not all(isinstance(x, str | list) for x in found.values()):
            raise TypeError("not digests")
    except (UserError, TypeError, KeyError) as error:
        raise UserError(
            f"{record}: not a record of a run's inputs ({error}): use another --workdir"
        ) from error
    return found


def answers_of(name: str) -> str:
    """The name of the input behind these answers: scorers, or a policy and its settings."""
    return f"evaluate.scorers or .policies: {name!r}"


def write_inputs(path: Path, inputs: Inputs) -> None:
    """Writes the record read by `read_inputs`."""
    files.write_text(path / PROVENANCE, json.dumps(dict(inputs), indent=1) + "\n")


def _create(path: Path, data: dict[str, Any], may_differ: Sequence[str], inputs: Inputs) -> IO:
    """Opens a run directory on process 0; returns its lock."""
    with files.writing(path):
        path.mkdir(parents=True, exist_ok=True)
        held = lock(path)
        old = _check(path, data, may_differ, inputs)
        files.write_text(path / "config.json", json.dumps(data, indent=1) + "\n")
        if new := old | {n: max(x, old.get(n, x), key=len) for n, x in inputs.items()}:
            write_inputs(path, new)
        record = path / "commit.txt"  # one line per version that opened the run
        text = files.read_bytes(record).decode(errors="backslashreplace") if record.exists() else ""
        if (commit := source_version()) not in text.splitlines()[-1:]:
            files.write_text(record, "\n".join([*text.splitlines(), commit, ""]))
    for name in _LOGS:
        _trim_metrics(path / name)
    return held


def _check(path: Path, data: dict[str, Any], may_differ: Sequence[str], inputs: Inputs) -> dict:
    """Refuses a config or inputs other than those recorded; returns the recorded inputs."""
    old, before, wrong = read_inputs(path), _old_config(path), []
    if before is not None and (differing := _changed_fields(before, data, may_differ)):
        wrong.append(f"with another config ({'; '.join(differing)})")
    conflicts = {n: _conflict(old[n], x) for n, x in inputs.items() if n in old}
    if named := [name + where for name, where in conflicts.items() if where is not None]:
        wrong.append(f"with other inputs, which have changed since ({'; '.join(named)})")
    if wrong:
        raise UserError(f"{path} holds a run {' and '.join(wrong)}: use another --workdir")
    return old


def _old_config(path: Path) -> dict[str, Any] | None:
    """The config of the run in a directory; its checkpoints have a copy."""
    file = path / "config.json"
    try:
        return files.read_json(file) if file.exists() else checkpoint.newest_info(path)["config"]
    except KeyError:
        return None
    except UserError as error:
        known = "config" in checkpoint.newest_info(path)
        advice = "delete it, as the checkpoints have a copy; or " if known else ""
        raise UserError(f"{error}: {advice}use another --workdir") from error


def _changed_fields(old: dict, new: dict, may_differ: Sequence[str]) -> list[str]:
    old, new = (flatten_dict(x, sep=".") for x in (old, new))
    # A field that one of the two versions did not have: turned off, it changes nothing.
    old, new = ({n: x for n, x in a.items() if n in b or x} for a, b in ((old, new), (new, old)))
    return [
        f"{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}"
        for name in sorted({*old, *new})
        if old.get(name, ...) != new.get(name, ...)
        and not any(f"{name}.".startswith(f"{prefix}.") for prefix in may_differ)
    ]


def _conflict(old: Any, new: Any) -> str | None:
    """Where an input differs; None if it is the same, or one list is a prefix of the other."""
    if not (isinstance(old, list) and isinstance(new, list)):
        return None if old == new else ""
    changed = [i for i, (a, b) in enumerate(zip(old, new, strict=False), 1) if a != b]
    more = f" and {len(changed) - 1} more" if changed[1:] else ""
    return f", number {changed[0]}{more}" if changed else None


def _trim_metrics(path: Path, last_step: float = math.inf) -> None:
    """Drops the records of later steps, and an incomplete last line of a killed run."""
    lines = files.read_bytes(path).decode(errors="replace").splitlines() if path.exists() else []
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
        files.write_text(path, "".join(kept))


def _json_data(config: ConfigDict) -> dict[str, Any]:
    return json.loads(json.dumps(config.to_dict()))  # tuples become lists, as in config.json
