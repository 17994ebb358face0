"""What an eviction policy is, and the registry of all policies.

A policy scores the cached entries of one layer when the staging ring is full; the engine drops the
`L` least important. Importance: higher is kept. A policy is a registered dataclass: its array
fields are parameters with a leading layer axis (the engine hands each layer its slice), its other
fields are static. A new policy is one file: a subclass of `Policy` under `@register("name")`.
"""

import ast
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from fkv import attention
from fkv import cache as kv
from fkv.errors import UserError
from fkv.models import ModelConfig


@flax.struct.dataclass
class View:
    """All that a policy sees of one layer at an eviction.

    Attributes:
      cache: the entries; the newest `L` in the last `L` slots, in the order they came.
      query_blhd, query_position_bl: the last `L` queries, rotated; position -1 is padding.
      chunk: index of the chunk of `L` tokens just processed, int32.
      random_b: one PRNG key per row, different in every layer and chunk.
      statistics: attention statistics, when the policy asks for them, else None.
      budget: B.
      layer: index of this layer, int32.
      config: of the model.
      key_bksd, value_bksd: keys and values of all slots, as numbers whatever the cache's dtype.
      cumulative_bksg, decayed_bksg: sums of attention since each entry came, kept when the policy
        asks for statistics.
      interval: L.
      capacity: slots before the newest `L`; B, unless the policy asks for more.
    """

    cache: kv.Cache
    query_blhd: Array
    query_position_bl: Array
    chunk: Array
    random_b: Array
    statistics: attention.Statistics | None
    budget: int = flax.struct.field(pytree_node=False)
    layer: Array | int = 0
    config: ModelConfig | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def interval(self) -> int:
        return self.query_blhd.shape[1]

    @property
    def capacity(self) -> int:
        return self.cache.position_bks.shape[-1] - self.interval

    @property
    def key_bksd(self) -> Array:
        return kv.dense(self.cache.key_bksd)

    @property
    def value_bksd(self) -> Array:
        return kv.dense(self.cache.value_bksd)

    @property
    def cumulative_bksg(self) -> Array:
        return self.cache.entry["cumulative"]

    @property
    def decayed_bksg(self) -> Array:
        return self.cache.entry["decayed"]


@flax.struct.dataclass
class Policy:
    """Base of all policies.

    Class attributes:
      statistics: what `evict` reads of the view's statistics: None, `sums` (the cumulative sums
        alone), or all of them in the `windowed` or `reference` form of `attention.statistics`.
      evicts: False for the full cache.
      kind: names the class, as a static field. JAX (0.10 to 0.12) takes the tree structures of two
        dataclasses for equal when their fields are, whatever their classes, but hashes them apart:
        one call in some dozens would run a program compiled for another policy.
    """

    statistics = None
    evicts = True

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.__annotations__ = {**inspect.get_annotations(cls), "kind": str}
        cls.kind = flax.struct.field(
            pytree_node=False,
            default=f"{cls.__module__}.{cls.__qualname__}",
            kw_only=True,
            repr=False,
        )

    def score(self, view: View) -> Array:
        """Importance [b, k, s] of every slot, float32; empty slots may hold anything."""
        raise NotImplementedError

    def protected(self, view: View) -> int:
        """How many of the newest entries can't be dropped; the interval, unless said."""
        return view.interval

    def importance(self, view: View) -> Array:
        """`score`, infinite where protected and minus infinity where empty."""
        score, position = self.score(view), view.cache.position_bks
        newest = jnp.arange(score.shape[-1]) >= score.shape[-1] - self.protected(view)
        return jnp.where(position < 0, -jnp.inf, jnp.where(newest[None, None], jnp.inf, score))

    def evict(self, view: View) -> Array:
        """Slots to drop [b, k, L], empty ones among them while fewer than `B + L` are held."""
        return kv.choose(self.importance(view), view.cache.position_bks, view.interval)

    # ---- for policies that share the budget unevenly over layers or heads

    def capacity(self, budget: int) -> int:
        """Entries that one head has room for: the budget, unless it is shared unevenly."""
        return budget

    def keep(self, view: View, importance_bks: Array) -> Array:
        """How many entries each head keeps at most, [b, k] int32; asked when shared unevenly."""
        raise NotImplementedError

    def drop(self, view: View) -> Array:
        """Entries to drop, bool [b, k, s]: all but the `keep` most important."""
        importance = self.importance(view)
        rank = jnp.argsort(jnp.argsort(-importance, axis=-1), axis=-1)
        return rank >= self.keep(view, importance)[..., None]


_REGISTRY: dict[str, Callable[..., Policy]] = {}


def register(name: str) -> Callable[[type[Policy]], type[Policy]]:
    """Class decorator: makes a policy known under `name`."""

    def add(policy: type[Policy]) -> type[Policy]:
        if name in _REGISTRY:
            raise ValueError(f"policy {name!r} is registered twice")
        _REGISTRY[name] = policy
        return policy

    return add


def names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_REGISTRY)


def get(name: str, **fields: Any) -> Policy:
    """The policy of that name with the given fields.

    Args:
      name: as registered; fields may follow in text, as in `rkv:mix=0.5,kernel=1`.

    Raises:
      UserError: no policy has this name (the known ones are listed), or it has no such field.
    """
    name, _, text = name.partition(":")
    for field in filter(None, text.split(",")):
        key, _, value = field.partition("=")
        try:
            fields[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            raise UserError(
                f"policy {name!r}: {field!r} must be of the form field=number"
            ) from None
    if name not in _REGISTRY:
        raise UserError(f"policy {name!r} is not known; known are {', '.join(names())}")
    known = {k: f for k, f in _REGISTRY[name].__dataclass_fields__.items() if k != "kind"}
    wrong = sorted(set(fields) - set(known))
    if wrong:
        has = ", ".join(known) or "none"
        raise UserError(f"policy {name!r} has no field {', '.join(wrong)}; it has {has}")
    missing = [
        f.name
        for f in known.values()
        if f.name not in fields and f.default is f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(
            f"policy {name!r} needs {', '.join(missing)}, which a name alone can't give"
        )
    return _REGISTRY[name](**fields)


def common_statistics(*policies: Policy) -> str | None:
    """The statistics that serve all of these policies.

    Raises:
      UserError: some need the windowed and some the reference form.
    """
    forms = {policy.statistics for policy in policies} - {None}
    exact = forms - {"sums"}
    if len(exact) > 1:
        raise UserError("windowed and reference scorers can't share a pass; measure them apart")
    return next(iter(exact or forms), None)


def row_by_row(function: Callable[[View], Array], view: View) -> Array:
    """`function` of a view, by `attention.row_by_row`."""
    of_all = {"chunk": view.chunk, "layer": view.layer}
    rows = view.replace(**dict.fromkeys(of_all))
    return attention.row_by_row(lambda row: function(row.replace(**of_all)), rows)


def by_position(position_bks: Array) -> tuple[Array, Array]:
    """Permutation of the slots into the order of positions, and its inverse, [b, k, s] each."""
    order = jnp.argsort(position_bks, axis=-1)
    slot = jnp.arange(order.shape[-1])

    def inverse(order):  # half the time of sorting again
        return jnp.zeros_like(order).at[order].set(slot, unique_indices=True)

    return order, jax.vmap(jax.vmap(inverse))(order)


def max_pool(x_bks: Array, kernel: int) -> Array:
    """Max over a centred window of `kernel` (odd) along the last axis, same length."""
    side = kernel // 2
    return jax.lax.reduce_window(
        x_bks, -jnp.inf, jax.lax.max, (1, 1, kernel), (1, 1, 1), ((0, 0), (0, 0), (side, side))
    )
