"""Mapping over devices; the only file that names them."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fkv.errors import UserError

AXIS = "data"


def device_count() -> int:
    """Devices that a batch is split over."""
    return jax.local_device_count()


def replicate(tree: Any) -> Any:
    """Copies a pytree to every device, as `pmap` returns it: its first call compiles for good."""
    devices = jax.make_mesh((device_count(),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.device_put(tree, jax.NamedSharding(devices, jax.P()))


def pmap(step: Callable[..., tuple[Any, Any]], constants: int, batched: int) -> Callable:
    """Maps a per-device step over the axis `data`.

    Args:
      step: of `constants` arguments that every device gets whole, then `batched` arguments that
        are split along their first axis, one part a device. Its results must be the same on every
        device: it speaks to the others by collectives over `AXIS`.

    Returns:
      The step over whole batches [devices * b, ...].
    """
    mapped = jax.pmap(
        step, axis_name=AXIS, in_axes=(*[None] * constants, *[0] * batched), out_axes=None
    )

    def call(*args):
        return mapped(*args[:constants], *jax.tree.map(_split, args[constants:]))

    return call


def gather(tree: Any) -> Any:
    """Inside a mapped step: the rows of all devices, in order."""
    return jax.tree.map(lambda x: jax.lax.all_gather(x, AXIS, tiled=True), tree)


def anywhere(flag: bool) -> bool:
    """Whether the flag is set in any process; all of them call this and get the same answer."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def of_first(number: int) -> int:
    """The number of process 0; all of them call this."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.asarray(number)))


def check_batch(batch: int) -> None:
    """Refuses a batch that can't be split evenly."""
    if batch % device_count():
        raise UserError(
            f"batch = {batch} can't be split over {device_count()} devices; use a multiple of that"
        )


def parts_of(batch: int, at_once: int, field: str) -> int:
    """How many parts a batch is worked off in.

    Args:
      at_once: rows in a part; 0 for all.
      field: names it in errors.

    Raises:
      UserError: the batch can't be cut into such parts, or these can't be split over the devices.
    """
    at_once = at_once or batch
    if at_once < 0 or batch % at_once:
        raise UserError(f"{field}: {at_once} rows at once must divide the batch of {batch}")
    check_batch(at_once)
    return batch // at_once


def _split(x):
    devices = device_count()
    return np.reshape(x, (devices, x.shape[0] // devices, *x.shape[1:]))
