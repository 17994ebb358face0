"""The two forms in which a language model holds its layers: stacked and separate, see `LM`."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fkv.models.decoder import LM, OUTPUTS_FIRST, Params, param_shapes


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
    if not is_separate(lm):
        return layers
    layers = [dict(_named(name, x) for name, x in one.items()) for one in layers]
    return jax.tree.map(lambda *x: jnp.stack(x), *layers)


_INPUTS_FIRST = {other: name for name, other in OUTPUTS_FIRST.items()}


def _axes(name: str, other: str) -> tuple[int, ...]:
    """How a parameter of one name is transposed to that of another."""
    letters = name.rpartition("_")[2]
    return tuple(letters.index(letter) for letter in other.rpartition("_")[2])


def _named(name: str, x: Array) -> tuple[str, Array]:
    """A parameter of a separate layer as that of stacked ones."""
    other = _INPUTS_FIRST.get(name, name)
    return other, x if other == name else x.transpose(_axes(name, other))


def shapes(lm: LM) -> dict:
    """Shapes of every parameter of a model of this form, as `param_shapes` gives them."""
    separate = is_separate(lm)
    on_cpu = separate and any(name in _INPUTS_FIRST for name in layer(lm, 0))
    return param_shapes(lm.config, separate, on_cpu)


def parameter(lm: LM, index: int, name: str) -> Array:
    """A parameter of one layer by its name in stacked ones."""
    one = layer(lm, index)
    return one[name] if name in one else _named(OUTPUTS_FIRST[name], one[OUTPUTS_FIRST[name]])[1]


def is_on_cpu(where: Array | Mesh | None) -> bool:
    """Whether separate layers are those of a CPU, see `OUTPUTS_FIRST`.

    Args:
      where: an array or devices; None for the default device.
    """
    where = jnp.zeros(()) if where is None else where
    devices = where.devices.flat if isinstance(where, Mesh) else where.devices()
    return all(device.platform == "cpu" for device in devices)


def separate_shapes(lm: LM) -> tuple[Params, ...]:
    """Shapes of the layers that `separate` makes of stacked ones."""
    embedding = lm.params["embed_vm"]
    on_cpu = isinstance(embedding, Array) and is_on_cpu(embedding)

    def one(lm):
        found = layer(lm, 0)
        if not on_cpu:
            return found
        names = {name: OUTPUTS_FIRST.get(name, name) for name in found}
        return {names[n]: x.transpose(_axes(n, names[n])) for n, x in found.items()}

    return (jax.eval_shape(one, lm),) * lm.config.layers


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
        if name in OUTPUTS_FIRST and is_on_cpu(parts[0]):
            name, parts = _turn(name, OUTPUTS_FIRST[name], parts)
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
        if name in _INPUTS_FIRST:
            name, parts = _turn(name, _INPUTS_FIRST[name], parts)
        stacks[name] = jax.block_until_ready(_join(parts, _place(parts[0], slice(0, None), None)))
        _free(*parts)
    return lm.replace(params=lm.params | {"layers": stacks})


def _turn(name: str, other: str, parts: Sequence[Array]) -> tuple[str, list[Array]]:
    """One kind of parameter under its other name; deletes those given."""
    axes, turned = _axes(name, other), []
    for x in parts:
        turned.append(jax.block_until_ready(_transpose(x, axes, _place(x, axes))))
        _free(x)
    return other, turned


@functools.partial(jax.jit, static_argnames=("axes", "place"))
def _transpose(x: Array, axes: tuple[int, ...], place: NamedSharding | None) -> Array:
    x = x.transpose(axes)
    return x if place is None else jax.lax.with_sharding_constraint(x, place)


@functools.partial(jax.jit, static_argnames="place")
def _split(stack: Array, place: NamedSharding | None) -> tuple[Array, ...]:
    parts = tuple(stack[i] for i in range(len(stack)))
    return parts if place is None else jax.lax.with_sharding_constraint(parts, place)


@functools.partial(jax.jit, static_argnames="place")
def _join(parts: Sequence[Array], place: NamedSharding | None) -> Array:
    stack = jnp.stack(parts)
    return stack if place is None else jax.lax.with_sharding_constraint(stack, place)


def _place(x: Any, axes: slice | Sequence[int], *first: None) -> NamedSharding | None:
    """The sharding over a mesh of these axes of an array, behind others; None without a mesh."""
    there = getattr(x, "sharding", None)
    if not isinstance(there, NamedSharding):
        return None
    spec = (*there.spec, *[None] * (x.ndim - len(there.spec)))
    kept = spec[axes] if isinstance(axes, slice) else [spec[axis] for axis in axes]
    return NamedSharding(there.mesh, PartitionSpec(*first, *kept))


def _free(*arrays: Any) -> None:
    for x in arrays:
        if isinstance(x, Array):  # one of NumPy goes with its last reference
            x.delete()
