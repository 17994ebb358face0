"""Checkpoints of a run; the only module that names Orbax.

`<run_dir>/checkpoints/<step>/` holds `state/` (an Orbax checkpoint of host arrays, so it restores
to any device layout), `info.json` and `sha256.json` (the checksums of all other files).
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from fkv import files
from fkv.errors import UserError
from fkv.runs import parallel


class Checkpoint(NamedTuple):
    """A checkpoint at `step`: a pytree of host arrays, and JSON data such as the run's config."""

    step: int
    state: Any
    info: dict[str, Any]


def save(
    run_dir: str | os.PathLike, step: int, state: Any, info: dict[str, Any], *, keep: int = 2
) -> None:
    """Saves `state` at `step` atomically, and deletes all but the newest `keep` intact checkpoints.

    Every process calls this with the same state; process 0 writes, the others wait.

    Args:
      state: any pytree of non-empty arrays and numbers, the same on every device. PRNG keys are
        saved as their data (`jax.random.key_data`).
      info: JSON data, such as `{"config": ...}` or the state of the data iterator.
    """
    if keep < 1:
        raise UserError(f"cannot keep {keep} checkpoints: keep at least 1")
    what = f"save step {step} in {run_dir}"
    parallel.on_first(lambda: _write(run_dir, step, state, info, keep), what)


def _write(run_dir: str | os.PathLike, step: int, state: Any, info: dict, keep: int) -> None:
    root, leaves = _root(run_dir), _flatten(state)
    with files.writing(root):
        files.delete(*root.glob("*.tmp"))  # left by killed saves
        with files.whole(root / str(step), directory=True) as folder:
            # Orbax writes some files around the arrays.
            size = sum(x.nbytes for x in leaves.values()) + 4096 * (16 + len(leaves))
            _check_space(folder / "space", size)
            with _checkpointer() as checkpointer:
                checkpointer.save(folder / "state", traverse_util.unflatten_dict(leaves))
                checkpointer.wait_until_finished()
            (folder / "info.json").write_text(json.dumps(info, indent=1))
            written = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            checksums = {str(path.relative_to(folder)): _sha256(path) for path in written}
            (folder / "sha256.json").write_text(json.dumps(checksums, indent=1))
        steps = _steps(run_dir)
        intact = [old for old in steps if old == step or not _damage(root / str(old))]
        files.delete(*(root / str(old) for old in steps if old < intact[-keep:][0]))


def latest_step(run_dir: str | os.PathLike) -> int | None:
    """The newest saved step, or None."""
    return max(_steps(run_dir), default=None)


def common_step(run_dirs: Sequence[str | os.PathLike]) -> int:
    """The newest step of which all runs have an intact checkpoint, 0 without one.

    Every process calls this; process 0 looks, and warns of damaged ones.
    """
    found = []
    if parallel.first():
        steps = set.intersection(*(set(_steps(run_dir)) for run_dir in run_dirs))
        while steps:
            roots = [_root(run_dir) / str(max(steps)) for run_dir in run_dirs]
            damaged = [(path, why) for path in roots if (why := _damage(path))]
            if not damaged:
                break
            for path, why in damaged:
                print(f"warning: checkpoint {path} is damaged ({why}): not used", flush=True)
            steps.discard(max(steps))
        found = [max(steps, default=0)]
    return parallel.share(found)[0]


def newest_info(run_dir: str | os.PathLike) -> dict[str, Any]:
    """The JSON data of the newest intact checkpoint; empty if there is none."""
    step, _ = _newest_intact(run_dir)
    return {} if step < 0 else files.read_json(_root(run_dir) / str(step) / "info.json")


def load(run_dir: str | os.PathLike, step: int | None = None) -> Checkpoint:
    """Reads the checkpoint of `step`, by default the newest, without a target structure.

    Containers become nested dicts: the fields of a dataclass or NamedTuple under their names, the
    entries of a list or tuple under "0", "1", ... A damaged checkpoint is refused: there is no
    fallback to an older one.
    """
    root, steps = _root(run_dir), _steps(run_dir)
    if not steps:
        raise UserError(f"no checkpoint in {root}: give the --workdir of a run that has saved one")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UserError(f"no checkpoint of step {step} in {root}, only of {steps}")
    path = root / str(step)
    if damage := _damage(path):
        raise UserError(
            f"checkpoint {path} is damaged ({damage}): rerun the job that made it with the same "
            "--workdir, which resumes from the newest intact one"
        )
    try:
        with _checkpointer() as checkpointer:
            state = checkpointer.restore(path / "state")
    except Exception as error:  # intact, but not written by Orbax
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"checkpoint {path} can't be read ({type(error).__name__}: {reason}): delete it"
        ) from error
    return Checkpoint(step, state, files.read_json(path / "info.json"))


def restore(run_dir: str | os.PathLike, target: Any, step: int | None = None) -> Checkpoint:
    """Reads the checkpoint of `step`, by default the newest intact, into the structure of `target`.

    Every process calls this; process 0 chooses the step, and warns of skipped damaged ones.

    Args:
      target: a pytree of arrays, `jax.ShapeDtypeStruct`s or Python numbers, which gives the
        structure, shapes and dtypes. Where it has a Python number, so does the result.

    Raises:
      UserError: no checkpoint is intact, or it differs from `target` (names the first such leaf).
    """
    if step is None and latest_step(run_dir) is not None:
        found = [_newest_intact(run_dir)] if parallel.first() else []
        step, damaged = parallel.share(found)[0]
        if step < 0:
            raise UserError(
                f"no checkpoint in {_root(run_dir)} is intact ({'; '.join(damaged)}): delete this "
                "folder to start over, or use another --workdir"
            )
        for line in damaged if parallel.first() else ():
            print(f"warning: checkpoint {line}: resuming from step {step}", flush=True)
    step, state, info = load(run_dir, step)
    # Before all have read it, none may go on and save a newer one, for which it would be deleted.
    parallel.barrier(f"read checkpoint {step} in {run_dir}")
    saved = _flatten(state)
    wanted = {_names(path): leaf for path, leaf in jax.tree.leaves_with_path(target)}
    for name in [*wanted, *saved]:
        there, here = (_describe(leaves.get(name)) for leaves in (saved, wanted))
        if there != here:
            raise UserError(
                f"checkpoint {_root(run_dir) / str(step)} does not fit this config: "
                f"{'/'.join(name)} is {there} there, {here} here; "
                "use the config it was saved with, or another --workdir"
            )
    leaves = [saved[n] if hasattr(x, "dtype") else saved[n].item() for n, x in wanted.items()]
    return Checkpoint(step, jax.tree.unflatten(jax.tree.structure(target), leaves), info)


def _newest_intact(run_dir: str | os.PathLike) -> tuple[int, list[str]]:
    """The newest intact step, or -1, and the damage of newer ones."""
    damaged = []
    for step in reversed(_steps(run_dir)):
        path = _root(run_dir) / str(step)
        if not (damage := _damage(path)):
            return step, damaged
        damaged.append(f"{path} is damaged ({damage})")
    return -1, damaged


def _root(run_dir: str | os.PathLike) -> Path:
    return files.expand(run_dir).absolute() / "checkpoints"


def _steps(run_dir: str | os.PathLike) -> list[int]:
    """Sorted steps of the folders made by `save`; other entries are ignored."""
    root = _root(run_dir)
    found = root.glob("*") if root.is_dir() else ()
    found = [p for p in found if re.fullmatch("0|[1-9][0-9]*", p.name)]
    return sorted(int(p.name) for p in found if p.is_dir() and any(p.iterdir()))


def _names(path: tuple) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _flatten(tree: Any) -> dict[tuple[str, ...], np.ndarray]:
    leaves = jax.tree.leaves_with_path(jax.device_get(tree))
    return {_names(path): np.asarray(leaf) for path, leaf in leaves}


def _describe(leaf: Any) -> str:
    if leaf is None:
        return "absent"
    # Python numbers are saved with 64 bits, where JAX has 32.
    return f"{jax.dtypes.canonicalize_dtype(jnp.result_type(leaf))}{list(np.shape(leaf))}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damage(path: Path) -> str:
    """What is wrong with a checkpoint; empty if it is intact.

    Orbax does not notice a flipped bit in an array, so checksums are compared before it reads.
    """
    try:
        for file in path.rglob("*"):  # reading a pipe or device may never end
            if not file.is_file() and not file.is_dir():
                return f"{file.relative_to(path)}: not a regular file"
        checksums = files.read_json(path / "sha256.json")
        if "info.json" not in checksums:
            return "sha256.json does not name info.json"
        for name, sha in checksums.items():
            if ".." in Path(name).parts or Path(name).is_absolute():
                return f"sha256.json names {name!r}, which is outside the checkpoint"
            if not (path / name).is_file():
                return f"{name!r}: no such file"
            if _sha256(path / name) != sha:
                return f"{name}: does not match its checksum"
        files.read_json(path / "info.json")
    except (UserError, OSError) as error:
        return str(error)
    return ""


def _check_space(path: Path, size: int) -> None:
    """Raises OSError if a file of `size` bytes does not fit on the disk.

    Orbax notices late, and then logs tracebacks from its threads.
    """
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except AttributeError:  # not on every system
            pass
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
    path.unlink()


@contextlib.contextmanager
def _checkpointer() -> Iterator[Any]:
    """Orbax for this process alone, without the hundreds of lines it logs per error."""
    import orbax.checkpoint as ocp  # slow to import

    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process_{index}"
    )
    logger, is_minor = logging.getLogger("absl"), lambda record: record.levelno < logging.ERROR
    logger.addFilter(is_minor)
    try:
        with ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer:
            yield checkpointer
    except Exception as error:
        # Of the file system's error only its text survives.
        if code := re.search(r"os_error_code='(\d+)'", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
        raise
    finally:
        logger.removeFilter(is_minor)
