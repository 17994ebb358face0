"""What an eviction policy is, and the registry of all policies.

A policy scores the cached entries of one layer when the staging ring is full; the engine drops the
`L` least important. Importance: higher is kept. A policy is a pytree: its array fields are
parameters with a leading layer axis (the engine passes each layer its slice), its other fields are
static. A new policy is one class: a subclass of `Policy` under `@register("name")`.
"""

import ast
import dataclasses
import inspect
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self, dataclass_transform

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from fkv import kinds
from fkv.cache import attention
from fkv.cache import slots as kv
from fkv.cache.cadence import Cadence
from fkv.errors import UserError
from fkv.models import ModelConfig, numerics, rotate

STATISTICS = kinds.Kind(
    "None, 'sums', 'windowed' or 'reference'",
    lambda value: value in (None, "sums", "windowed", "reference"),
)


@flax.struct.dataclass
class View:
    """What a policy sees of one layer at an eviction.

    Attributes:
      cache: the entries; the newest `L` in the last `L` slots, in order of arrival.
      query_blhd, query_position_bl: the last `L` queries, rotated; position -1 marks padding.
      chunk: index of the chunk of `L` tokens just processed, int32; while decoding [b], as rows
        differ in age.
      random_b: a PRNG key per row, different in every layer and chunk.
      prompt_b: tokens of each row's prompt, int32; positions below are the prompt's.
      statistics: attention statistics if the policy asks for them, else None.
      cadence: budget and interval, static.
      layer: index of this layer, int32.
      config: of the model.
      budget, interval: B and L.
      eviction: index of the eviction, int32; negative while the cache fills; [b] as `chunk`.
      protect_prompt: how many tokens of a prompt, its first, are not to be evicted; static.
      kept_prompt_bks: which slots hold these tokens.
      candidate_bkn: which of the slots before the newest `L` hold entries that may be evicted.
      capacity: slots before the newest `L`: B unless the policy asks for more.
      key_bksd, value_bksd: keys and values of all slots, as floats whatever the cache's dtype.
      unrotated_key_bksd: keys before their rotation, float32.
      cumulative_bksg, decayed_bksg: attention that each entry has received, kept if the policy
        asks for statistics.
      arrived: what the policy's `arrive` gave, by name, [b, k, s, ...].
    """

    cache: kv.Cache
    query_blhd: Array
    query_position_bl: Array
    chunk: Array
    random_b: Array
    statistics: attention.Statistics | None
    cadence: Cadence = flax.struct.field(pytree_node=False)
    layer: Array | int = 0
    config: ModelConfig = flax.struct.field(pytree_node=False, default=None)
    prompt_b: Array = flax.struct.field(default=None)
    protect_prompt: int = flax.struct.field(pytree_node=False, default=0)

    if TYPE_CHECKING:  # flax has it

        def replace(self, **changes: Any) -> Self: ...

    __repr__ = kinds.one_line

    @property
    def budget(self) -> int:
        return self.cadence.budget

    @property
    def interval(self) -> int:
        return self.cadence.interval

    @property
    def eviction(self) -> Array:
        return self.chunk - self.cadence.fill_chunks

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

    @property
    def unrotated_key_bksd(self) -> Array:
        b, k, s, d = self.cache.key_bksd.shape
        key = self.key_bksd.astype(jnp.float32).reshape(b * k, s, 1, d)
        position = self.cache.position_bks.reshape(b * k, s)
        _, scale = self.config.inv_frequencies()
        return rotate(key, -position, self.config).reshape(b, k, s, d) / scale**2

    @property
    def arrived(self) -> dict[str, Array]:
        if "arrived" not in self.cache.entry:
            raise UserError("view.arrived is kept for policies that define arrive(arrival)")
        return self.cache.entry["arrived"]

    @property
    def kept_prompt_bks(self) -> Array:
        position = self.cache.position_bks
        if not self.protect_prompt:
            return jnp.zeros(position.shape, bool)
        kept_b = jnp.minimum(self.prompt_b, self.protect_prompt)
        return (position >= 0) & (position < kept_b[:, None, None])

    @property
    def candidate_bkn(self) -> Array:
        held = self.cache.position_bks[..., : self.capacity] >= 0
        if not self.protect_prompt:
            return held
        return held & ~self.kept_prompt_bks[..., : self.capacity]

    def _sums(self, name: str) -> Array:
        if name not in self.cache.entry:
            raise UserError(
                f"view.{name}_bksg is kept for policies that ask for it: write "
                'statistics = "sums" (without annotation) in your class'
            )
        return self.cache.entry[name]


def setting(kind: kinds.Kind, default: Any = dataclasses.MISSING) -> Any:
    """A static field of a policy, checked on construction."""
    return flax.struct.field(pytree_node=False, default=default, metadata={"kind": kind})


@dataclass_transform()
@flax.struct.dataclass
class Policy:
    """Base of all policies; subclassing it makes a flax dataclass.

    Class attributes:
      statistics: what `evict` reads of the view's statistics: None, `sums` (the cumulative sums
        alone), or all of them in the `windowed` or `reference` form of `attention.statistics`.
      arrive: None, or a method that gives numbers of entries when they come (`policies.arrival`).
      evicts: False for the full cache.
      all_queries: whether `score` takes all queries of a text that is evicted once at its end
        (`engine.compressed`), in memory linear in their number; else it gets the last `L`.
      trained: what its parameters were trained for, if known (`foresight.Trained`).
      kind: the class, as a static field. JAX (0.10 to 0.12) compares the tree structures of two
        dataclasses by their fields, whatever their classes, but hashes them differently: once in
        some dozens of calls, a program compiled for another policy would run. The class, not its
        name: rerunning an edited notebook cell defines another class of that name.
    """

    registered_as: ClassVar[str]
    evicts: ClassVar[bool] = True
    if TYPE_CHECKING:  # a subclass has a method, a property or a field instead

        @property
        def statistics(self) -> str | None: ...

        @property
        def arrive(self) -> Callable[..., dict[str, Array]] | None: ...

        @property
        def trained(self) -> Any: ...

        @property
        def all_queries(self) -> bool: ...

        def replace(self, **changes: Any) -> Self: ...
    else:
        statistics = arrive = trained = None
        all_queries = False

    def __init_subclass__(cls, **kwargs):
        annotations = inspect.get_annotations(cls)
        if "kind" in vars(cls) or "kind" in annotations:
            raise UserError(f"class {cls.__name__}: kind is taken, give the field another name")
        cls.__annotations__ = {**annotations, "kind": type}
        cls.kind = flax.struct.field(pytree_node=False, default=cls, kw_only=True, repr=False)
        super().__init_subclass__(**kwargs)
        flax.struct.dataclass(cls, repr=False)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if "kind" in field.metadata:
                value = getattr(self, field.name)
                kinds.check(f"{name_of(self)}: {field.name}", value, field.metadata["kind"])

    __repr__ = kinds.one_line  # its name and settings

    def limits(self, config: ModelConfig, cadence: Cadence) -> dict[str, float]:
        """Upper limits of settings; defaults are clipped to them, other values are refused."""
        return {}

    def check(self, config: ModelConfig, cadence: Cadence) -> None:
        """Refuses a model or cadence that the policy does not fit; cheap, before any pass.

        Subclasses with further checks override this and call it.

        Raises:
          UserError: one line that names the policy and both sides.
        """
        name, budget = name_of(self), cadence.budget
        fields = {field.name: field for field in dataclasses.fields(self)}
        values = [getattr(self, field) for field in fields]
        for inner in jax.tree.leaves(values, is_leaf=lambda x: isinstance(x, Policy)):
            if isinstance(inner, Policy):
                check(inner, config, cadence)
        for field in fields.values():
            try:
                hash(field.metadata.get("pytree_node", True) or getattr(self, field.name))
            except TypeError:
                raise UserError(
                    f"{name}: {field.name} is static and can't be a "
                    f"{type(getattr(self, field.name)).__name__}: make it a tuple, number or text"
                ) from None
        for path, leaf in jax.tree.leaves_with_path(self):
            kind = getattr(getattr(leaf, "dtype", None), "kind", "O")
            is_array = hasattr(leaf, "shape") and kind not in "OSUMm"  # objects, text and times
            if not is_array or leaf.shape[:1] != (config.layers,):
                shape = f"has shape {list(leaf.shape)}" if is_array else f"= {kinds.said(leaf)}"
                raise UserError(
                    f"{name}: {path[0].name} {shape}, but parameters are arrays with the model's "
                    f"{config.layers} layers first; anything else is static: {path[0].name}: ... "
                    "= flax.struct.field(pytree_node=False, default=...)"
                )
        kinds.check(f"{name}: statistics", self.statistics, STATISTICS)
        for limited, most in self.limits(config, cadence).items():
            value = getattr(self, limited)
            if value > most and value != fields[limited].default:
                raise UserError(
                    f"{name}: {limited} = {value:g} must be at most {most:g} at budget = {budget}, "
                    f"interval = {cadence.interval} and {config.kv_heads} KV heads"
                )
        if not self.evicts:
            return
        if not defines(self, "score", "evict"):
            raise UserError(f"{name} defines no score(view): give the importance of each slot")
        room = self.capacity(budget)
        kinds.check(f"{name}: capacity({budget})", room, kinds.whole(budget))
        if room > budget and not defines(self, "keep", "drop"):
            raise UserError(
                f"{name} has room for {room} entries of a budget of {budget}: define "
                "keep(view, importance), too"
            )

    def score(self, view: View) -> Array:
        """Importance [b, k, s] of all slots, float32; NaN is lowest, empty slots are ignored."""
        raise NotImplementedError

    def protected(self, view: View) -> int:
        """Number of newest entries that are never dropped; by default the interval."""
        return view.interval

    def importance(self, view: View) -> Array:
        """`score`, with infinity where protected and minus infinity where empty.

        Protected are the newest entries, and the first of the prompt (`View.protect_prompt`).
        """
        score, position = self.score(view), view.cache.position_bks
        check_given(self, "score", score, position.shape, jnp.floating)
        newest, slots = self.protected(view), position.shape[-1]
        kinds.check(f"{name_of(self)}: protected(view)", newest, kinds.whole(0, view.capacity))
        protected = (jnp.arange(slots) >= slots - newest)[None, None]
        if view.protect_prompt:
            protected |= view.kept_prompt_bks
        score = jnp.where(jnp.isnan(score), -jnp.inf, score)  # NaN would go before empty slots
        return jnp.where(position < 0, -jnp.inf, jnp.where(protected, jnp.inf, score))

    def evict(self, view: View) -> Array:
        """Slots to drop [b, k, L], some of them empty while fewer than `B + L` are held."""
        return kv.choose(self.importance(view), view.cache.position_bks, view.interval)

    # ---- for policies that share the budget unevenly over layers or heads

    def capacity(self, budget: int) -> int:
        """Slots allocated per head for kept entries: the budget, unless it is shared unevenly."""
        return budget

    def keep(self, view: View, importance_bks: Array) -> Array:
        """The most entries that each head keeps, [b, k] int32; by default the budget."""
        return jnp.full(importance_bks.shape[:2], view.budget, jnp.int32)

    def drop(self, view: View) -> Array:
        """Entries to drop, bool [b, k, s]: all but the `keep` most important."""
        importance = self.importance(view)
        rank = jnp.argsort(jnp.argsort(-importance, axis=-1), axis=-1)
        keep = self.keep(view, importance)
        check_given(self, "keep", keep, importance.shape[:2], jnp.integer)
        return rank >= jnp.minimum(keep, view.capacity)[..., None]


def check(policy: Any, config: ModelConfig, cadence: Cadence) -> None:
    """Refuses anything but a policy that fits the model and the cadence."""
    if not isinstance(policy, Policy):
        raise UserError(
            f"{kinds.said(policy)} is not a policy: give an object, such as policies.SnapKV() or "
            f"policies.get({policy if isinstance(policy, str) else 'snapkv'!r})"
        )
    policy.check(config, cadence)


def name_of(policy: Policy) -> str:
    """The registered name, or else the class's; a function, as a policy may have a field `name`."""
    return vars(type(policy)).get("registered_as", type(policy).__name__)


_NUMBERS = {jnp.floating: "float32", jnp.integer: "int32", jnp.bool_: "bool"}


def check_given(policy: Policy, method: str, got: Any, shape: Sequence[int], numbers: type) -> None:
    """Refuses the result of a policy's method unless it has this shape and kind of numbers."""
    is_array = hasattr(got, "shape") and hasattr(got, "dtype")
    if not (is_array and got.shape == tuple(shape) and jnp.issubdtype(got.dtype, numbers)):
        given = f"{got.dtype} {list(got.shape)}" if is_array else kinds.said(got)
        raise UserError(
            f"{name_of(policy)}: {method} gives {given}, but must give {_NUMBERS[numbers]} "
            f"{list(shape)}, [{', '.join(('batch', 'KV heads', 'slots')[: len(shape)])}]"
        )


def defines(policy: Policy, *methods: str) -> bool:
    """Whether a policy overrides one of these methods."""
    return any(getattr(type(policy), name) is not getattr(Policy, name) for name in methods)


# ---- names

_REGISTRY: dict[str, type[Policy]] = {}


def register(name: str) -> Callable[[type[Policy]], type[Policy]]:
    """Class decorator: registers a policy under `name`, for `get` and command lines.

    Registering the same class again, as rerunning a notebook cell does, replaces it.

    Raises:
      UserError: the name is taken by another class, or this is not a policy.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[^\s:,=()]+", name):
        raise UserError(
            f'@register takes a name without spaces and ":,=()", as in @register("mine"), '
            f"not {name!r}"
        )

    def add(policy: type[Policy]) -> type[Policy]:
        if not (isinstance(policy, type) and issubclass(policy, Policy)):
            raise UserError(
                f"policy {name!r}: {kinds.said(policy)} is not a subclass of fkv.policies.Policy"
            )
        both = _REGISTRY.get(name, policy), policy
        old, new = (f"{cls.__module__}.{cls.__qualname__}" for cls in both)
        if old != new:
            raise UserError(
                f"policy {name!r} is registered twice, by {old} and by {new}: take another name"
            )
        _REGISTRY[name] = policy
        policy.registered_as = name
        return policy

    return add


def names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_REGISTRY)


def get(name: str, **fields: Any) -> Policy:
    """The policy of that name with the given fields.

    Args:
      name: as registered; fields may follow, as in `rkv:mix=0.5,kernel=1`. A wrapper wraps another
        policy, as in `ada(rkv:mix=0.5):room=1.5`, and by default `snapkv`, whose fields it then
        takes besides its own, as in `ada:window=4,room=1.5`.

    Raises:
      UserError: there is no such policy (the known ones are listed) or field.
    """
    pattern = r"\s*([^\s:,=()]+)\s*(?:\((.*)\))?\s*(?::([^()]*))?"
    if not (isinstance(name, str) and (parts := re.fullmatch(pattern, name, re.DOTALL))):
        raise UserError(
            f"policy {kinds.said(name)} must be of the form name:field=number,... or "
            f"wrapper(name:...):field=number,...; known names are {', '.join(names())}"
        )
    name, inside, text = parts.groups()
    if name not in _REGISTRY:
        raise UserError(f"policy {name!r} is not known; choose from {', '.join(names())}")
    known = _fields(_REGISTRY[name])
    given = _values(name, text or "")
    if inside is not None:
        if "policy" not in known:
            raise UserError(f"policy {name!r} is not a wrapper: it can't wrap {inside!r:.60}")
        given.append(("policy", get(inside)))
    for field, value in given:
        if field in fields:
            raise UserError(f"policy {name!r}: {field} is given twice")
        fields[field] = value
    of_inner = {}
    if "policy" in known and "policy" not in fields:
        fields["policy"] = known["policy"].default
        of_inner = _fields(type(fields["policy"]))
    if wrong := sorted(fields.keys() - known.keys() - of_inner.keys()):
        has = ", ".join([*known, *of_inner]) or "none"
        raise UserError(f"policy {name!r} has no field {', '.join(wrong)}; it has {has}")
    if of_inner:
        inner = {field: fields.pop(field) for field in of_inner if field in fields}
        fields["policy"] = fields["policy"].replace(**inner)
    needs = [f.name for f in known.values() if f.default is f.default_factory]  # both missing
    if needs := [field for field in needs if field not in fields]:
        raise UserError(
            f"policy {name!r} needs {', '.join(needs)}, which a name can't give: make the "
            "object (of scorers by fkv.load_scorer, evaluate.scorers or generate.scorer)"
        )
    return _REGISTRY[name](**fields)


def _fields(cls: type[Policy]) -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(cls) if f.name != "kind"}


def _values(name: str, text: str) -> list[tuple[str, Any]]:
    """Fields and values of `field=number,...`."""
    values = []
    for part in filter(None, text.split(",")):
        field, _, value = part.partition("=")
        try:
            values.append((field.strip(), ast.literal_eval(value.strip())))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise UserError(
                f"policy {name!r}: {part!r:.60} must be of the form field=number"
            ) from None
    return values


# ---- what several policies need


def trained_at(policy: Policy | None, interval: int) -> str:
    """The budget of a policy's scorers in training, as tables show it; else empty."""
    return policy.trained.at(interval) if policy is not None and policy.trained else ""


def common_statistics(*policies: Policy) -> str | None:
    """The statistics that serve all of these policies.

    Raises:
      UserError: some need the windowed and some the reference form.
    """
    forms = {policy.statistics for policy in policies} - {None}
    exact = forms - {"sums"}
    if len(exact) > 1:
        raise UserError("windowed and reference scorers can't share a pass; run each alone")
    return next(iter(exact or forms), None)


def row_by_row(function: Callable[[View], Array], view: View, row_bytes: int = 0) -> Array:
    """`function` of a view, by `numerics.row_by_row`."""
    of_all = {"layer": view.layer} | ({} if jnp.ndim(view.chunk) else {"chunk": view.chunk})
    rows = view.replace(**dict.fromkeys(of_all))

    def one(row):
        return function(row.replace(**of_all))

    return numerics.row_by_row(one, rows, row_bytes=row_bytes)
