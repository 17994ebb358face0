"""What an eviction policy is, and the registry of all policies.

A policy scores the cached entries of one layer when the staging ring is full; the engine drops the
`L` least important. Importance: higher is kept. A policy is a registered dataclass: its array
fields are parameters with a leading layer axis (the engine hands each layer its slice), its other
fields are static. A new policy is one file: a subclass of `Policy` under `@register("name")`.
"""

import ast
import dataclasses
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from fkv import kinds
from fkv.cache import attention
from fkv.cache import slots as kv
from fkv.cache.cadence import Cadence
from fkv.errors import UserError
from fkv.models import ModelConfig, numerics

STATISTICS = (None, "sums", "windowed", "reference")


@flax.struct.dataclass
class View:
    """All that a policy sees of one layer at an eviction.

    Attributes:
      cache: the entries; the newest `L` in the last `L` slots, in the order they came.
      query_blhd, query_position_bl: the last `L` queries, rotated; position -1 is padding.
      chunk: index of the chunk of `L` tokens just processed, int32.
      random_b: one PRNG key per row, different in every layer and chunk.
      statistics: attention statistics, when the policy asks for them, else None.
      cadence: budget and interval, static.
      layer: index of this layer, int32.
      config: of the model.
      key_bksd, value_bksd: keys and values of all slots, as numbers whatever the cache's dtype.
      cumulative_bksg, decayed_bksg: sums of attention since each entry came, kept when the policy
        asks for statistics.
      budget, interval: B and L.
      capacity: slots before the newest `L`; B, unless the policy asks for more.
    """

    cache: kv.Cache
    query_blhd: Array
    query_position_bl: Array
    chunk: Array
    random_b: Array
    statistics: attention.Statistics | None
    cadence: Cadence = flax.struct.field(pytree_node=False)
    layer: Array | int = 0
    config: ModelConfig | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def budget(self) -> int:
        return self.cadence.budget

    @property
    def interval(self) -> int:
        return self.cadence.interval

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
        return self._sums("cumulative")

    @property
    def decayed_bksg(self) -> Array:
        return self._sums("decayed")

    def _sums(self, name: str) -> Array:
        if not self.cache.entry:
            raise UserError(
                f"view.{name}_bksg is kept for policies that ask for it: write "
                'statistics = "sums" (without annotation) in the class of yours'
            )
        return self.cache.entry[name]


@flax.struct.dataclass
class Policy:
    """Base of all policies.

    Class attributes:
      statistics: what `evict` reads of the view's statistics: None, `sums` (the cumulative sums
        alone), or all of them in the `windowed` or `reference` form of `attention.statistics`.
      evicts: False for the full cache.
      trained: what its parameters were trained for, where that is known (`foresight.Trained`).
      kind: the class, as a static field. JAX (0.10 to 0.12) takes the tree structures of two
        dataclasses for equal when their fields are, whatever their classes, but hashes them apart:
        one call in some dozens would run a program compiled for another policy. The class, not its
        name: a notebook's cell that is changed and run again defines another one of that name.
    """

    statistics = None
    evicts = True
    trained = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "kind" in vars(cls) or "kind" in inspect.get_annotations(cls):
            raise UserError(f"class {cls.__name__}: kind is taken, give the field another name")
        cls.__annotations__ = {**inspect.get_annotations(cls), "kind": type}
        cls.kind = flax.struct.field(pytree_node=False, default=cls, kw_only=True, repr=False)

    def check(self, config: ModelConfig, cadence: Cadence) -> None:
        """Refuses a model or a cadence that the policy does not fit; cheap, before any pass.

        Here: all arrays have the model's layers first, and there is room for the budget. A subclass
        that knows more says so in its own `check`, and calls this one.

        Raises:
          UserError: one line that names the policy and both sides.
        """
        name = name_of(self)
        for inner in self._inner():
            check(inner, config, cadence)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not field.metadata.get("pytree_node", True) and not _hashable(value):
                raise UserError(
                    f"{name}: {field.name} is static and can't be a {type(value).__name__}: "
                    "make it a tuple, a number or text"
                )
        for path, leaf in jax.tree.leaves_with_path(self):
            field = path[0].name
            static = (
                f"what is no parameter is static: {field}: ... = "
                "flax.struct.field(pytree_node=False, default=...)"
            )
            kind = getattr(getattr(leaf, "dtype", None), "kind", "O")
            if not hasattr(leaf, "shape") or kind in "OSUMm":  # objects, text and times
                raise UserError(f"{name}: {field} = {kinds.said(leaf)} is no array; {static}")
            if leaf.shape[:1] != (config.layers,):
                raise UserError(
                    f"{name}: {field} has shape {list(leaf.shape)}, but parameters have the "
                    f"model's {config.layers} layers first; {static}"
                )
        if self.statistics not in STATISTICS:
            raise UserError(
                f"{name}: statistics = {kinds.said(self.statistics)} must be None or one of "
                f"{', '.join(STATISTICS[1:])}"
            )
        if not self.evicts:
            return
        if not defines(self, "score", "evict"):
            raise UserError(f"{name} defines no score(view): give the importance of each slot")
        budget = cadence.budget
        room = self.capacity(budget)
        if not kinds.whole(budget).fits(room):
            raise UserError(
                f"{name}: capacity({budget}) gives {kinds.said(room)}, but must give a whole "
                "number, the budget at least"
            )
        if room > budget and not defines(self, "keep", "drop"):
            raise UserError(
                f"{name} has room for {room} entries of a budget of {budget}: define "
                "keep(view, importance), too"
            )

    def _inner(self) -> list["Policy"]:
        """The policies that this one is made of."""
        fields = [getattr(self, field.name) for field in dataclasses.fields(self)]
        leaves = jax.tree.leaves(fields, is_leaf=lambda x: isinstance(x, Policy))
        return [x for x in leaves if isinstance(x, Policy)]

    def score(self, view: View) -> Array:
        """Importance [b, k, s] of every slot, float32, NaN being the least.

        Empty slots may hold anything.
        """
        raise NotImplementedError

    def protected(self, view: View) -> int:
        """How many of the newest entries can't be dropped; the interval, unless said."""
        return view.interval

    def importance(self, view: View) -> Array:
        """`score`, infinite where protected and minus infinity where empty."""
        score, position = self.score(view), view.cache.position_bks
        check_given(self, "score", score, position.shape, jnp.floating)
        newest = self.protected(view)
        slots = position.shape[-1]
        kinds.check(f"{name_of(self)}: protected(view)", newest, kinds.whole(0, view.capacity))
        newest = jnp.arange(slots) >= slots - newest
        score = jnp.where(jnp.isnan(score), -jnp.inf, score)  # it would go before empty slots
        return jnp.where(position < 0, -jnp.inf, jnp.where(newest[None, None], jnp.inf, score))

    def evict(self, view: View) -> Array:
        """Slots to drop [b, k, L], empty ones among them while fewer than `B + L` are held."""
        return kv.choose(self.importance(view), view.cache.position_bks, view.interval)

    # ---- for policies that share the budget unevenly over layers or heads

    def capacity(self, budget: int) -> int:
        """Entries that one head has room for: the budget, unless it is shared unevenly."""
        return budget

    def keep(self, view: View, importance_bks: Array) -> Array:
        """How many entries each head keeps at most, [b, k] int32; the budget, unless said."""
        return jnp.full(importance_bks.shape[:2], view.budget, jnp.int32)

    def drop(self, view: View) -> Array:
        """Entries to drop, bool [b, k, s]: all but the `keep` most important."""
        importance = self.importance(view)
        rank = jnp.argsort(jnp.argsort(-importance, axis=-1), axis=-1)
        keep = self.keep(view, importance)
        check_given(self, "keep", keep, importance.shape[:2], jnp.integer)
        return rank >= jnp.minimum(keep, view.capacity)[..., None]


def check(policy: Any, config: ModelConfig, cadence: Cadence) -> None:
    """Refuses what is no policy, and a policy that does not fit the model or the cadence."""
    if isinstance(policy, type) and issubclass(policy, Policy):
        raise UserError(
            f"{policy.__name__} is a class, and a policy is an object of it: {policy.__name__}(...)"
        )
    if isinstance(policy, str):
        raise UserError(f"{policy!r} is a name: policies.get({policy!r}) makes a policy of it")
    if not isinstance(policy, Policy):
        raise UserError(
            f"{kinds.said(policy)} is no policy: give one of the names in fkv.policies.names(), or "
            "an object of one of the classes in fkv.policies"
        )
    _check_decorated(type(policy))
    policy.check(config, cadence)


_NUMBERS = {jnp.floating: "float32", jnp.integer: "int32", jnp.bool_: "bool"}


def name_of(policy: Policy) -> str:
    """As registered, or else that of the class; no attribute, which a field might have for name."""
    cls = type(policy)
    return cls.registered_as if "registered_as" in vars(cls) else cls.__name__


def check_given(policy: Policy, method: str, got: Any, shape: Sequence[int], numbers: type) -> None:
    """Refuses what a method of a policy gives when it is not of that shape and kind of number."""
    is_array = hasattr(got, "shape") and hasattr(got, "dtype")
    if not (is_array and got.shape == tuple(shape) and jnp.issubdtype(got.dtype, numbers)):
        given = f"{got.dtype} {list(got.shape)}" if is_array else kinds.said(got)
        axes = ("batch", "KV heads", "slots")[: len(shape)]
        raise UserError(
            f"{name_of(policy)}: {method} gives {given}, but must give {_NUMBERS[numbers]} "
            f"{list(shape)}, [{', '.join(axes)}]"
        )


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def defines(policy: Policy, *methods: str) -> bool:
    """Whether a policy has a method of these of its own."""
    return any(getattr(type(policy), name) is not getattr(Policy, name) for name in methods)


def _check_decorated(cls: type[Policy]) -> None:
    if "_flax_dataclass" not in vars(cls):
        raise UserError(
            f"class {cls.__name__} is no flax dataclass: put @flax.struct.dataclass right above it"
        )


_REGISTRY: dict[str, type[Policy]] = {}


def register(name: str) -> Callable[[type[Policy]], type[Policy]]:
    """Class decorator: makes a policy known under `name`, with `get` and on command lines.

    The same class once more, as when a notebook's cell is run again, takes the place of the old.

    Raises:
      UserError: the name is that of another class, or what is registered is no policy.
    """
    if not isinstance(name, str) or name.split() != [name] or set(name) & set(":,=()"):
        raise UserError(
            f'@register takes a name without spaces and ":,=()", as in @register("mine"), '
            f"not {name!r}"
        )

    def add(policy: type[Policy]) -> type[Policy]:
        if not (isinstance(policy, type) and issubclass(policy, Policy)):
            raise UserError(
                f"policy {name!r}: {kinds.said(policy)} is no subclass of fkv.policies.Policy"
            )
        old = _REGISTRY.get(name, policy)
        if _full_name(old) != _full_name(policy):
            raise UserError(
                f"policy {name!r} is registered twice, by {_full_name(old)} and by "
                f"{_full_name(policy)}: take another name"
            )
        _REGISTRY[name] = policy
        policy.registered_as = name
        return policy

    return add


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_REGISTRY)


_GRAMMAR = re.compile(r"\s*([^\s:,=()]+)\s*(?:\((.*)\))?\s*(?::([^()]*))?", re.DOTALL)


def get(name: str, **fields: Any) -> Policy:
    """The policy of that name with the given fields.

    Args:
      name: as registered; fields may follow in text, as in `rkv:mix=0.5,kernel=1`. Wrappers go
        around another policy, as in `ada(rkv:mix=0.5):room=1.5`; without one, around `snapkv`,
        whose fields they take beside their own, as in `ada:window=4,room=1.5`.

    Raises:
      UserError: no policy has this name (the known ones are listed), or it has no such field.
    """
    if not isinstance(name, str):
        raise UserError(f"{name!r} is no name of a policy; known are {', '.join(names())}")
    if not (parts := _GRAMMAR.fullmatch(name)):
        raise UserError(
            f"policy {name!r:.80} must be of the form name:field=number,... or "
            "wrapper(name:...):field=number,..."
        )
    name, inside, text = parts.groups()
    for field in filter(None, (text or "").split(",")):
        key, _, value = field.partition("=")
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise UserError(
                f"policy {name!r}: {field!r:.60} must be of the form field=number"
            ) from None
        if key.strip() in fields:
            raise UserError(f"policy {name!r}: {key.strip()} is given twice")
        fields[key.strip()] = value
    if name not in _REGISTRY:
        raise UserError(f"policy {name!r} is not known; known are {', '.join(names())}")
    _check_decorated(_REGISTRY[name])
    known = _fields(_REGISTRY[name])
    if inside is not None:
        if "policy" not in known:
            raise UserError(f"policy {name!r} goes around no other, such as {inside!r:.60}")
        if "policy" in fields:
            raise UserError(f"policy {name!r}: policy is given twice")
        fields["policy"] = get(inside)
    # A wrapper that was given no policy takes the fields of its own one.
    inner = known["policy"].default if "policy" in known and "policy" not in fields else None
    of_inner = _fields(type(inner)) if isinstance(inner, Policy) else {}
    if wrong := sorted(set(fields) - set(known) - set(of_inner)):
        has = ", ".join([*known, *of_inner]) or "none"
        raise UserError(f"policy {name!r} has no field {', '.join(wrong)}; it has {has}")
    if of_inner:
        fields["policy"] = inner.replace(**{x: fields.pop(x) for x in of_inner if x in fields})
    missing = [
        f.name
        for f in known.values()
        if f.name not in fields and f.default is f.default_factory is dataclasses.MISSING
    ]
    if missing:
        of_scorers = "; load scorers by fkv.load_scorer, evaluate.scorers or generate.scorer"
        raise UserError(
            f"policy {name!r} needs {', '.join(missing)}, which a name alone can't give"
            f"{of_scorers if name == 'foresight' else ''}"
        )
    return _REGISTRY[name](**fields)


def _fields(cls: type[Policy]) -> dict[str, dataclasses.Field]:
    """The settings of a class, by name."""
    return {f.name: f for f in dataclasses.fields(cls) if f.name != "kind"}


def is_default(policy: Policy, field: str) -> bool:
    """Whether a setting is that of a policy made without it: it is cut where it does not fit."""
    return getattr(policy, field) == type(policy).__dataclass_fields__[field].default


def check_sinks(policy: Policy, cadence: Cadence) -> None:
    """Refuses more sinks than can stay beside the newest `L`, unless nobody asked for them."""
    most = cadence.budget - cadence.interval
    if policy.sinks > most and not is_default(policy, "sinks"):
        raise UserError(
            f"{name_of(policy)}: sinks = {policy.sinks} must be at most budget - interval = "
            f"{most}, as the newest {cadence.interval} stay, too"
        )


def trained_at(policy: Policy | None, interval: int) -> str:
    """At which budget the scorers of a policy were trained, as tables say it; else empty."""
    return policy.trained.at(interval) if policy is not None and policy.trained else ""


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
    """`function` of a view, by `numerics.row_by_row`."""
    of_all = {"chunk": view.chunk, "layer": view.layer}
    rows = view.replace(**dict.fromkeys(of_all))
    return numerics.row_by_row(lambda row: function(row.replace(**of_all)), rows)


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
