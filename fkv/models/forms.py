"""The two forms in which a language model holds its layers: stacked and separate, see `LM`."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from fkv.models.decoder import LM, Params


def is_separate(lm: LM) -> bool:
    """Whether the layers are a tuple of one dictionary each."""
    return isinstance(lm.params["layers"], tuple)


def layer(lm: LM, index: int) -> Params:
    """The parameters of one layer; copied if they are stacked."""
    layers = lm.params["layers"]
    return layers[index] if is_separate(lm) else jax.tree.map(lambda x: x[index], layers)


def stacked(lm: LM) -> Params:
    """The parameters of all layers, each [layers, ...]; copied if they are separate."""
    layers = lm.params["layers"]
    return jax.tree.map(lambda *x: jnp.stack(x), *layers) if is_separate(lm) else layers


def separate(lm: LM, consume: bool = True) -> LM:
    """The model with separate layers, as decoding needs them.

    Args:
      consume: delete the arrays of `lm`, one kind of parameter at a time, so that at most all
        parameters and one stack are held; otherwise this is a second copy of the layers.
    """
    if is_separate(lm):
        return lm
    layers = tuple({} for _ in range(lm.config.layers))
    for name, stack in lm.params["layers"].items():
        parts = jax.block_until_ready(_split(stack, _place(stack, slice(1, None))))
        if consume:
            _free(stack)
        for one, part in zip(layers, parts, strict=True):
            one[name] = part
    return lm.replace(params=lm.params | {"layers": layers})


def stack(lm: LM) -> LM:
    """The model with stacked layers, as replay and training need them; deletes those of `lm`."""
    if not is_separate(lm):
        return lm
    layers, stacks = lm.params["layers"], {}
    for name in layers[0]:
        parts = [one[name] for one in layers]
        stacks[name] = jax.block_until_ready(_join(parts, _place(parts[0], slice(0, None), None)))
        _free(*parts)
    return lm.replace(params=lm.params | {"layers": stacks})


@functools.partial(jax.jit, static_argnames="place")
def _split(stack: Array, place: NamedSharding | None) -> tuple[Array, ...]:
    parts = tuple(stack[i] for i in range(len(stack)))
    return parts if place is None else jax.lax.with_sharding_constraint(parts, place)


@functools.partial(jax.jit, static_argnames="place")
def _join(parts: Sequence[Array], place: NamedSharding | None) -> Array:
    stack = jnp.stack(parts)
    return stack if place is None else jax.lax.with_sharding_constraint(stack, place)


def _place(x: Any, axes: slice, *first: None) -> NamedSharding | None:
    """The sharding over a mesh of these axes of an array, behind others; None without a mesh."""
    there = getattr(x, "sharding", None)
    if not isinstance(there, NamedSharding):
        return None
    spec = (*there.spec, *[None] * (x.ndim - len(there.spec)))
    return NamedSharding(there.mesh, PartitionSpec(*first, *spec[axes]))


def _free(*arrays: Any) -> None:
    for x in arrays:
        if isinstance(x, Array):  # one of NumPy goes with its last reference
            x.delete()
