"""Checkpoints of a run: the only file that names Orbax.

`<run_dir>/checkpoints/<step>/` holds `state/` (an Orbax checkpoint of host arrays, so it restores
on any device layout), `info.json` and `sha256.json` (the checksum of every other file).
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from fkv import files
from fkv.errors import UserError
from fkv.runs import parallel


class Checkpoint(NamedTuple):
    """What was saved at `step`: a pytree of host arrays, and JSON data such as the run's config."""

    step: int
    state: Any
    info: dict[str, Any]


def save(
    run_dir: str | os.PathLike, step: int, state: Any, info: dict[str, Any], *, keep: int = 2
) -> None:
    """Save `state` at `step`, all or nothing, and delete all but the newest `keep` checkpoints.

    Damaged checkpoints do not count among these; they go when they are older than the oldest kept.
    Every process calls this with the same state; process 0 writes, the others wait for it.

    Args:
      state: any pytree of non-empty arrays and numbers, the same on every device. PRNG keys go in
        as their data (`jax.random.key_data`).
      info: JSON data kept beside the state: `{"config": ...}`, the position in the data, ...

    Raises:
      UserError: the file system refused to write, say because the disk is full.
    """
    if keep < 1:
        raise UserError(f"cannot keep {keep} checkpoints: keep at least 1")
    wrong = None
    if parallel.first():
        try:
            _write(run_dir, step, state, info, keep)
        except UserError as error:
            wrong = error
    parallel.barrier(f"checkpoint of step {step} in {run_dir}")
    if parallel.anywhere(wrong is not None):
        raise wrong or UserError(f"process 0 can't save step {step} in {run_dir}: see its log")


def _write(run_dir: str | os.PathLike, step: int, state: Any, info: dict, keep: int) -> None:
    root = _root(run_dir)
    temporary, final = root / f"{step}.tmp", root / str(step)
    leaves = _flatten(state)
    try:
        _delete(root.glob("*.tmp"))  # what a killed save left
        _ask_for_room(temporary, leaves)
        with _quiet(), _checkpointer() as checkpointer:
            checkpointer.save(temporary / "state", traverse_util.unflatten_dict(leaves))
            checkpointer.wait_until_finished()
        (temporary / "info.json").write_text(json.dumps(info, indent=1))
        files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
        checksums = {str(path.relative_to(temporary)): _sha256(path) for path in files}
        (temporary / "sha256.json").write_text(json.dumps(checksums, indent=1))
        if final.exists():
            final.rename(root / f"{step}.old.tmp")
        temporary.rename(final)
        intact = [old for old in _steps(run_dir) if old == step or not _damage(root / str(old))]
        oldest = intact[-keep:][0]
        outdated = [root / str(old) for old in _steps(run_dir) if old < oldest]
        _delete([*root.glob("*.tmp"), *outdated])
    except Exception as error:
        reason = _refusal(error)
        if reason is None:
            raise
        shutil.rmtree(temporary, ignore_errors=True)  # half a checkpoint takes room, too
        before = latest_step(run_dir)
        raise UserError(
            f"checkpoint of step {step} can't be written to {root} ({reason}): make room or mend "
            "that, and run the same command again; it goes on from "
            + ("the start" if before is None else f"step {before}")
        ) from error


def _checkpointer() -> ocp.StandardCheckpointer:
    """Of this process alone: a run's state is the same on all, and needs no one else."""
    if jax.process_count() == 1:
        return ocp.StandardCheckpointer()
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process_{index}"
    )
    return ocp.StandardCheckpointer(multiprocessing_options=alone)


def latest_step(run_dir: str | os.PathLike) -> int | None:
    """The newest step that was saved, or None."""
    return max(_steps(run_dir), default=None)


def newest_info(run_dir: str | os.PathLike) -> dict[str, Any]:
    """The JSON data of the newest intact checkpoint; none if there is no such checkpoint."""
    for step in reversed(_steps(run_dir)):
        path = _root(run_dir) / str(step)
        if not _damage(path):
            return json.loads((path / "info.json").read_text())
    return {}


def load(run_dir: str | os.PathLike, step: int | None = None) -> Checkpoint:
    """Read the checkpoint of `step`, by default the newest, as it was saved.

    Containers come back as nested dicts: the fields of a dataclass or NamedTuple under their names,
    the entries of a list or tuple under "0", "1", ...

    Raises:
      UserError: there is no such checkpoint, or it is damaged. There is no falling back to an older
        one: whoever asks for what a run has learned would get something else.
    """
    steps = _steps(run_dir)
    if not steps:
        raise _none(run_dir)
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UserError(f"no checkpoint of step {step} in {_root(run_dir)}, only of {steps}")
    path = _root(run_dir) / str(step)
    if damage := _damage(path):
        raise UserError(
            f"checkpoint {path} is damaged ({damage}): run the job that made it again, with the "
            "same --workdir; it goes on from the newest that is intact"
        )
    try:
        with _quiet(), _checkpointer() as checkpointer:
            state = checkpointer.restore(path / "state")
    except Exception as error:  # whole, but nothing that Orbax wrote
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"checkpoint {path} can't be read ({type(error).__name__}: {reason}): delete it"
        ) from error
    return Checkpoint(step, state, json.loads((path / "info.json").read_text()))


def restore(run_dir: str | os.PathLike, target: Any, step: int | None = None) -> Checkpoint:
    """Read the checkpoint of `step`, by default the newest intact, into the structure of `target`.

    Damaged checkpoints that are passed over are named in a line of warning each. Every process
    calls this; process 0 decides which checkpoint it is.

    Args:
      target: a pytree of arrays, `jax.ShapeDtypeStruct`s or Python numbers; only its structure,
        shapes and dtypes matter. Where it holds a Python number, so does the result.

    Raises:
      UserError: there is no such checkpoint, none is intact, or it differs from `target`; the
        message names the first leaf that does.
    """
    step, state, info = load(run_dir, _newest_intact(run_dir) if step is None else step)
    saved = _flatten(state)
    paths_leaves, treedef = jax.tree.flatten_with_path(target)
    wanted = {_names(path): leaf for path, leaf in paths_leaves}
    for name in [*wanted, *saved]:
        there, here = (_describe(leaves.get(name)) for leaves in (saved, wanted))
        if there != here:
            raise UserError(
                f"checkpoint {_root(run_dir) / str(step)} does not fit this config: "
                f"{'/'.join(name)} is {there} there, {here} here; "
                "use the config it was saved with, or another --workdir"
            )
    leaves = [
        saved[name] if hasattr(leaf, "dtype") else saved[name].item()
        for name, leaf in wanted.items()
    ]
    return Checkpoint(step, jax.tree.unflatten(treedef, leaves), info)


def _newest_intact(run_dir: str | os.PathLike) -> int:
    """The newest step whose checkpoint is intact; names those that are not."""
    found = -1
    damaged = []
    if parallel.first():
        for step in reversed(_steps(run_dir)):
            path = _root(run_dir) / str(step)
            if not (damage := _damage(path)):
                found = step
                break
            damaged.append(f"{path} is damaged ({damage})")
        for line in damaged if found >= 0 else ():
            print(f"warning: checkpoint {line}: going on from step {found}", flush=True)
    found, damaged = parallel.share([[found, damaged]])[0]
    if found < 0:
        if not _steps(run_dir):
            raise _none(run_dir)
        raise UserError(
            f"no checkpoint in {_root(run_dir)} is intact ({'; '.join(damaged)}): delete this "
            "folder to start anew, or use another --workdir"
        )
    return found


def _none(run_dir: str | os.PathLike) -> UserError:
    return UserError(
        f"no checkpoint in {_root(run_dir)}: give the --workdir of a run that has saved one"
    )


def _root(run_dir: str | os.PathLike) -> Path:
    return files.expand(run_dir).absolute() / "checkpoints"


def _steps(run_dir: str | os.PathLike) -> list[int]:
    """Of the folders that `save` made: others, empty ones and files of such names are not ours."""
    root = _root(run_dir)
    found = root.glob("*") if root.is_dir() else ()
    found = [p for p in found if re.fullmatch("0|[1-9][0-9]*", p.name)]
    return sorted(int(p.name) for p in found if p.is_dir() and any(p.iterdir()))


def _delete(folders: Iterable[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        else:
            folder.unlink()


def _names(path: tuple) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _flatten(tree: Any) -> dict[tuple[str, ...], np.ndarray]:
    return {
        _names(path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(jax.device_get(tree))
    }


def _describe(leaf: Any) -> str:
    if leaf is None:
        return "absent"
    # JAX holds Python numbers, which are saved in 64 bits, in 32.
    return f"{jax.dtypes.canonicalize_dtype(jnp.result_type(leaf))}{list(np.shape(leaf))}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _object(path: Path) -> dict:
    """What a JSON file of a checkpoint holds."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name}: not a JSON object")
    return found


def _damage(path: Path) -> str:
    """What is wrong with a checkpoint; empty if it is intact."""
    # Orbax notices some damage but not a flipped bit in an array, so every file is compared with
    # its checksum before Orbax reads any. A pipe or a device would never end.
    try:
        odd = [x for x in path.rglob("*") if not x.is_file() and not x.is_dir()]
        if odd:
            return f"{odd[0].relative_to(path)}: not a regular file"
        checksums = _object(path / "sha256.json")
        outside = [x for x in checksums if ".." in Path(x).parts or Path(x).is_absolute()]
        if outside:
            return f"sha256.json names {outside[0]!r}, which is outside"
        if "info.json" not in checksums:
            return "sha256.json does not name info.json"
        absent = [name for name in checksums if not (path / name).is_file()]
        if absent:
            return f"{', '.join(absent)}: No such file"
        names = [name for name, sha in checksums.items() if _sha256(path / name) != sha]
        if not names:
            _object(path / "info.json")
    except OSError as error:
        missing = Path(error.filename or path)
        name = missing.relative_to(path) if missing.is_relative_to(path) else missing
        return f"{name}: {error.strerror or error}"
    except (ValueError, RecursionError) as error:
        return " ".join(str(error).split())
    return f"{', '.join(names)}: not what was written" if names else ""


def _ask_for_room(folder: Path, leaves: dict[tuple[str, ...], np.ndarray]) -> None:
    """Makes the folder, and sure that these arrays fit on its disk, and into one file.

    Orbax notices that, too, but late.

    Raises:
      OSError: they don't.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not hasattr(os, "posix_fallocate"):
        return
    files = 4096 * (16 + len(leaves))  # what Orbax writes around the arrays
    with (folder / "room").open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, sum(x.nbytes for x in leaves.values()) + files)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
    (folder / "room").unlink()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax from logging, in hundreds of lines, what it raises anyway."""

    def is_minor(record):
        return record.levelno < logging.ERROR

    logger = logging.getLogger("absl")
    logger.addFilter(is_minor)
    try:
        yield
    finally:
        logger.removeFilter(is_minor)


def _refusal(error: Exception) -> str | None:
    """What the file system said, if it was the file system; Orbax wraps it in errors of its own."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else None
