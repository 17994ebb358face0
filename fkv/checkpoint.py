"""Checkpoints of a run: the only file that names Orbax.

`<run_dir>/checkpoints/<step>/` holds `state/` (an Orbax checkpoint of host arrays, so it restores
on any device layout), `info.json` and `sha256.json` (the checksum of every other file).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from fkv import parallel
from fkv.errors import UserError


class Checkpoint(NamedTuple):
    """What was saved at `step`: a pytree of host arrays, and JSON data such as the run's config."""

    step: int
    state: Any
    info: dict[str, Any]


def save(
    run_dir: str | os.PathLike, step: int, state: Any, info: dict[str, Any], *, keep: int = 2
) -> None:
    """Save `state` at `step`, all or nothing, and delete all but the newest `keep` checkpoints.

    Every process calls this with the same state; process 0 writes, the others wait for it.

    Args:
      state: any pytree of non-empty arrays and numbers, the same on every device. PRNG keys go in
        as their data (`jax.random.key_data`).
      info: JSON data kept beside the state: `{"config": ...}`, the position in the data, ...
    """
    if keep < 1:
        raise UserError(f"cannot keep {keep} checkpoints: keep at least 1")
    if parallel.first():
        _write(run_dir, step, state, info, keep)
    parallel.barrier(f"checkpoint of step {step} in {run_dir}")


def _write(run_dir: str | os.PathLike, step: int, state: Any, info: dict, keep: int) -> None:
    root = _root(run_dir)
    temporary, final = root / f"{step}.tmp", root / str(step)
    _delete(root.glob("*.tmp"))  # what a killed save left
    with _checkpointer() as checkpointer:
        checkpointer.save(temporary / "state", traverse_util.unflatten_dict(_flatten(state)))
        checkpointer.wait_until_finished()
    (temporary / "info.json").write_text(json.dumps(info, indent=1))
    files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
    checksums = {str(path.relative_to(temporary)): _sha256(path) for path in files}
    (temporary / "sha256.json").write_text(json.dumps(checksums, indent=1))
    if final.exists():
        final.rename(root / f"{step}.old.tmp")
    temporary.rename(final)
    _delete([*root.glob("*.tmp"), *(root / str(old) for old in _steps(run_dir)[:-keep])])


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


def load(run_dir: str | os.PathLike, step: int | None = None) -> Checkpoint:
    """Read the checkpoint of `step`, by default the newest, as it was saved.

    Containers come back as nested dicts: the fields of a dataclass or NamedTuple under their names,
    the entries of a list or tuple under "0", "1", ...

    Raises:
      UserError: there is no such checkpoint, or it is corrupt.
    """
    steps = _steps(run_dir)
    if not steps:
        raise UserError(
            f"no checkpoint in {_root(run_dir)}: give the --workdir of a run that has saved one"
        )
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UserError(f"no checkpoint of step {step} in {_root(run_dir)}, only of {steps}")
    path = _root(run_dir) / str(step)
    _verify(path)
    with _checkpointer() as checkpointer:
        state = checkpointer.restore(path / "state")
    return Checkpoint(step, state, json.loads((path / "info.json").read_text()))


def restore(run_dir: str | os.PathLike, target: Any, step: int | None = None) -> Checkpoint:
    """Read the checkpoint of `step`, by default the newest, into the structure of `target`.

    Args:
      target: a pytree of arrays, `jax.ShapeDtypeStruct`s or Python numbers; only its structure,
        shapes and dtypes matter. Where it holds a Python number, so does the result.

    Raises:
      UserError: there is no such checkpoint, it is corrupt, or it differs from `target`; the
        message names the first leaf that does.
    """
    step, state, info = load(run_dir, step)
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


def _root(run_dir: str | os.PathLike) -> Path:
    return Path(run_dir).absolute() / "checkpoints"


def _steps(run_dir: str | os.PathLike) -> list[int]:
    root = _root(run_dir)
    return sorted(int(p.name) for p in root.iterdir() if p.name.isdigit()) if root.is_dir() else []


def _delete(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder)


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


def _verify(path: Path) -> None:
    # Orbax notices some damage but not a flipped bit in an array, so every file is compared with
    # its checksum before Orbax reads any.
    try:
        checksums = json.loads((path / "sha256.json").read_text())
        damaged = [name for name, sha in checksums.items() if _sha256(path / name) != sha]
    except (OSError, ValueError, AttributeError) as error:
        damaged = [str(error)]
    if damaged or not checksums:
        raise UserError(
            f"checkpoint {path} (step {path.name}) is corrupt ({', '.join(damaged)}): delete this "
            "folder to go on from the checkpoint before it, or start anew in another --workdir"
        )
