"""Devices and processes; the only module that names them.

A mesh of devices has two axes. The rows of a batch are sharded over `data`; steps communicate over
it with collectives such as `lax.pmean`. The language model is sharded over `model`, by heads, MLP
width and vocabulary; XLA derives the rest. A replica of the model never spans processes.
"""

import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fkv.errors import UserError
from fkv.models.decoder import MODEL

AXIS = "data"
DEADLINE = 1800.0  # seconds that a process waits for others by default

# ---- devices


def platform() -> str:
    """The platform that programs are compiled for: `cpu`, `gpu` or `tpu`."""
    return jax.default_backend()


def describe() -> str:
    """The devices, and the number of processes, as text."""
    count, processes = jax.device_count(), jax.process_count()
    kind = jax.devices()[0].device_kind
    devices = f"{count} {'CPU' if kind == 'cpu' else kind} device{'s' * (count > 1)}"
    return devices + (f" in {processes} processes" if processes > 1 else "")


def make_mesh(model_axis: int = 1, span: str = "all", devices: Sequence[jax.Device] = ()) -> Mesh:
    """Devices as [data, model], with `model_axis` devices per replica of the language model.

    Args:
      span: `all` devices, those of this `process`, or those of its first `copy` of the model.
      devices: to compile for, of any processes; by default those that are here.
    """
    if not devices:
        devices = jax.devices() if span == "all" else jax.local_devices()
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    each = sum(device.process_index == devices[0].process_index for device in devices)
    if model_axis < 1 or each % model_axis:
        raise UserError(
            f"model_axis = {model_axis} must divide the {each} devices of a process: a copy of the "
            "language model is shared by devices of one process"
        )
    rows = np.reshape(devices, (-1, model_axis))
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    return Mesh(rows[:1] if span == "copy" else rows, (AXIS, MODEL), axis_types=axis_types)


def device_count(mesh: Mesh) -> int:
    """Replicas of the language model: the number of shards of a batch."""
    return mesh.shape[AXIS]


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies a pytree to every device, laid out as `pmap` returns it, so that it compiles once."""
    return jax.tree.map(lambda x: _put(x, NamedSharding(mesh, PartitionSpec())), tree)


def view(params: Any, mesh: Mesh) -> Any:
    """Views a language model on all devices of this process as arrays of another mesh; no copy."""

    def one(x):
        shards = [part.data for part in x.addressable_shards if part.device in mesh.local_devices]
        there = NamedSharding(mesh, x.sharding.spec)
        return jax.make_array_from_single_device_arrays(x.shape, there, shards)

    return jax.tree.map(one, params)


def pmap(step: Callable[..., tuple[Any, Any]], mesh: Mesh, constants: int, batched: int):
    """Maps a per-device step over the axis `data`; takes batches [devices * b, ...].

    The step takes `constants` arguments, replicated (or a language model, sharded over `model`),
    then `batched` ones, sharded along their first axis. Its results must be the same on every
    device, by collectives over `AXIS`.
    """
    mapped, rows = (
        _program(step, mesh, constants, batched),
        NamedSharding(mesh, PartitionSpec(AXIS)),
    )

    def split(x):
        return _put(np.asarray(x)[None] if _alone(mesh) else x, rows)

    return lambda *args: mapped(*args[:constants], *jax.tree.map(split, args[constants:]))


def lower(
    step: Callable[..., tuple[Any, Any]], mesh: Mesh, constants: Sequence, batched: Sequence
) -> jax.stages.Lowered:
    """The program of `pmap` for arguments of such shapes, those without a sharding replicated."""
    mapped, rows = _new_program(step, mesh, len(constants), len(batched)), PartitionSpec(AXIS)

    def split(x):
        shape = (1, *x.shape) if _alone(mesh) else x.shape
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=NamedSharding(mesh, rows))

    return mapped.lower(*replicated(constants, mesh), *jax.tree.map(split, batched))


def replicated(tree: Any, mesh: Mesh) -> Any:
    """Shapes with their sharding, or replicated if they have none."""

    def one(x):
        there = getattr(x, "sharding", None) or NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there)

    return jax.tree.map(one, tree)


def _alone(mesh: Mesh) -> bool:
    return device_count(mesh) == 1 and mesh.size > 1


def _program(step: Callable[..., tuple[Any, Any]], mesh: Mesh, constants: int, batched: int):
    """The jitted function behind `pmap`, of arrays that are on the devices already."""
    if isinstance(step, functools.partial):
        # Partials are never equal, but the step of a plan, made again, is compiled already.
        return _known_program(
            step.func, step.args, tuple(step.keywords.items()), mesh, constants, batched
        )
    return _new_program(step, mesh, constants, batched)


@functools.lru_cache(maxsize=4)  # what it holds lives as long as the process
def _known_program(function, args, keywords, mesh, constants, batched):
    step = functools.partial(function, *args, **dict(keywords))
    return _new_program(step, mesh, constants, batched)


def _new_program(step: Callable[..., tuple[Any, Any]], mesh: Mesh, constants: int, batched: int):
    if _alone(mesh):  # XLA can't map a `data` axis of one device next to a `model` axis of several
        in_axes = (*[None] * constants, *[0] * batched)
        mapped = jax.vmap(step, in_axes, out_axes=None, axis_name=AXIS)
    else:
        mapped = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(*[PartitionSpec()] * constants, *[PartitionSpec(AXIS)] * batched),
            out_specs=PartitionSpec(),
            # XLA handles the other axis, following the sharding of the weights.
            axis_names={AXIS} if mesh.shape[MODEL] > 1 else {AXIS, MODEL},
            check_vma=False,
        )
    return jax.jit(mapped, out_shardings=NamedSharding(mesh, PartitionSpec()))


def gather(tree: Any) -> Any:
    """Inside a mapped step: the rows of all devices, in order."""
    return jax.tree.map(lambda x: jax.lax.all_gather(x, AXIS, tiled=True), tree)


def check_batch(batch: int, mesh: Mesh) -> None:
    """Refuses a batch that does not divide evenly over the devices."""
    if batch % device_count(mesh):
        shared = f", {mesh.shape[MODEL]} to a copy of the model" if mesh.shape[MODEL] > 1 else ""
        raise UserError(
            f"batch = {batch} can't be split over {mesh.size} devices{shared}; use a multiple of "
            f"{device_count(mesh)}"
        )


def parts_of(batch: int, at_once: int, field: str, mesh: Mesh) -> int:
    """The number of micro-batches of `at_once` rows (0: all) in a batch; `field` sets `at_once`."""
    at_once = at_once or batch
    if at_once < 0 or batch % at_once:
        raise UserError(f"{field}: micro-batches of {at_once} must divide the batch of {batch}")
    check_batch(at_once, mesh)
    return batch // at_once


def _put(x: Any, where: NamedSharding) -> jax.Array:
    """Puts a host array on devices; each process fills its own."""
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, where, lambda index: x[index])


# ---- processes


def first() -> bool:
    """Whether this is process 0, which writes and prints."""
    return jax.process_index() == 0


def on_first(act: Callable[[], Any], what: str) -> Any:
    """The result of `act` on process 0, None on others; if it raises, all processes do.

    Errors name the action as `what`, such as `open runs/x`.
    """
    found = wrong = None
    if first():
        try:
            found = act()
        except UserError as error:
            wrong = error
    barrier(what)
    if anywhere(wrong is not None):
        raise wrong or UserError(f"process 0 can't {what}: see its log")
    return found


def anywhere(flag: bool) -> bool:
    """Whether the flag is set on any process; all of them have to call this."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def total(tree: Any) -> Any:
    """Sums of a pytree of host arrays over the processes."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda x: x.sum(0), multihost_utils.process_allgather(tree))


def share(rows: list) -> list:
    """The lists (of JSON data) of all processes, concatenated."""
    if jax.process_count() == 1:
        return rows
    text = np.frombuffer(json.dumps(rows).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(text)))
    text = np.pad(text, (0, lengths.max() - len(text)))
    texts = multihost_utils.process_allgather(text)
    pairs = zip(texts, lengths, strict=True)
    return [row for text, n in pairs for row in json.loads(text[:n].tobytes())]


def barrier(name: str, seconds: float = DEADLINE) -> None:
    """Waits for all processes; when the deadline is exceeded, the error names the missing ones."""
    if jax.process_count() == 1:
        return
    from jax._src import distributed  # the public barrier has no deadline

    try:
        distributed.global_state.client.wait_at_barrier(f"fkv {name}", round(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        missing = ", ".join(re.findall(r"^(\d+)$", str(error), re.MULTILINE))
        raise UserError(
            f"{name}: waited {seconds:g} s for process {missing or '?'} of {jax.process_count()}: "
            "see its log, then restart all of them"
        ) from None
