"""The scorer: a tiny MLP per layer and KV head that predicts the importance of an entry.

In the paper its input is the entry's rotated key, its value, and eight attention features per query
head of the group; its output is an importance, higher is kept (section 3.2). The released scorers
give an eviction score instead: their output weights are negated on import.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fkv import kinds
from fkv.errors import UserError
from fkv.keys import keys_of
from fkv.models import ModelConfig
from fkv.models.numerics import einsum_f32
from fkv.policies import expected_attention
from fkv.policies.base import View

# What an input may consist of, and the paper's choices of it.
PARTS = ("key", "value", "content", "attention", "log_attention", "expected", "age")
INPUTS = {
    "both": ("key", "value", "attention"),
    "attention": ("attention",),
    "kv": ("key", "value"),
}
NORMS = ("none", "rms")
FORMS = ("windowed", "reference")


def _are_inputs(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    parts = value.split("+")
    return value in INPUTS or (set(parts) <= {*PARTS} and len({*parts}) == len(parts))


_INPUT = kinds.Kind(
    f"one of {', '.join(INPUTS)}, or some of {', '.join(PARTS)} joined by +", _are_inputs
)


@dataclasses.dataclass(frozen=True)
class ScorerConfig(kinds.Settings):
    """Architecture and features of a scorer; stored in every scorer checkpoint.

    Attributes:
      hidden: width of the hidden layer.
      inputs: `both`, or only `attention` or `kv`; or parts joined by `+`: the rotated `key`, the
        `value`, the `content` (the key before its rotation), the `attention` features or their
        logarithms (`log_attention`), the logits `expected` of future queries, and the `age`.
      norm: `none` as released, or `rms`: key, value and each of the eight attention features are
        divided by their root mean square over the candidates of an eviction. Logarithms and logits
        are standardised over these candidates, whatever the norm.
      form: `windowed` or `reference` attention statistics.
    """

    group: ClassVar[str] = "scorer"
    hidden: int = kinds.setting(kinds.whole(1, 2**16), 16)
    inputs: str = kinds.setting(_INPUT, "both")
    norm: str = kinds.setting(kinds.one_of(NORMS), "none")
    form: str = kinds.setting(kinds.one_of(FORMS), "windowed")

    @property
    def statistics(self) -> str | None:
        """The form of attention statistics that the features need, or None."""
        return self.form if {"attention", "log_attention"} & {*self.parts} else None

    @property
    def parts(self) -> tuple[str, ...]:
        """The inputs, of `PARTS`."""
        return INPUTS.get(self.inputs) or tuple(self.inputs.split("+"))


class Scorer(nn.Module):
    """The scorers of one layer: [b, k, n, f] features to [b, k, n] importances, float32."""

    config: ScorerConfig

    @nn.compact
    def __call__(self, feature_bknf: Array) -> Array:
        _, k, _, f = feature_bknf.shape
        hidden = self.config.hidden
        dense = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=0)
        w1 = self.param("w1", dense, (k, f, hidden))
        b1 = self.param("b1", nn.initializers.zeros, (k, hidden))
        w2 = self.param("w2", nn.initializers.normal(hidden**-0.5), (k, hidden))
        b2 = self.param("b2", nn.initializers.zeros, (k,))
        x = einsum_f32("bknf,kfo->bkno", feature_bknf, w1) + b1[None, :, None]
        x = jax.nn.gelu(x, approximate=False)
        return einsum_f32("bkno,ko->bkn", x, w2) + b2[None, :, None]


def feature_size(model: ModelConfig, scorer: ScorerConfig) -> int:
    """Length of a feature vector."""
    d, g = model.head_dim, model.group_size
    sizes = dict(key=d, value=d, content=d, attention=8 * g, log_attention=8 * g, age=3)
    sizes["expected"] = len(HORIZONS) * g
    return sum(sizes[part] for part in scorer.parts)


def init(key: Array, model: ModelConfig, scorer: ScorerConfig) -> dict:
    """Random parameters of all layers, stacked, as in `shapes`."""
    example = jnp.zeros((1, model.kv_heads, 1, feature_size(model, scorer)))

    @jax.jit  # one program; op by op it would compile dozens
    @jax.vmap
    def layers(key):
        return Scorer(scorer).init(key, example)["params"]

    return layers(keys_of(key, model.layers))


def shapes(model: ModelConfig, scorer: ScorerConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters: w1 [y, k, f, o], b1 [y, k, o], w2 [y, k, o], b2 [y, k]."""
    lead, hidden = (model.layers, model.kv_heads), scorer.hidden
    first = (*lead, feature_size(model, scorer), hidden)
    return {"w1": first, "b1": (*lead, hidden), "w2": (*lead, hidden), "b2": lead}


def check_params(where: str, params: Any, hidden: int) -> None:
    """Refuses anything but finite parameters of scorers of this hidden width.

    Args:
      where: prefix of the error.
      params: a dict of arrays, or of their shapes.
    """
    found = params if isinstance(params, Mapping) else {"params": params}
    shapes = {name: tuple(getattr(x, "shape", ())) for name, x in found.items()}
    first = shapes.get("w1", ())[:3]
    lead = first[:2]
    wanted = {"w1": (*first, hidden), "b1": (*lead, hidden), "w2": (*lead, hidden), "b2": lead}
    dtypes = [getattr(x, "dtype", object) for x in found.values()]
    floating = all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes)
    if shapes != wanted or len(first) < 3 or not floating:
        said = {
            name: f"{getattr(x, 'dtype', type(x).__name__)}{list(shapes[name])}"
            for name, x in found.items()
        }
        raise UserError(
            f"{where} {said} are not the float32 w1 [y, k, f, o], b1 [y, k, o], w2 [y, k, o] and "
            f"b2 [y, k] of a scorer with o = {hidden} hidden units"
        )
    for name, x in found.items():
        is_here = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
        is_here = x.is_fully_addressable if is_here else isinstance(x, np.ndarray)
        if is_here and not np.isfinite(np.asarray(x, np.float32)).all():
            raise UserError(f"{where} {name} holds numbers that are not finite")


# Attention below which candidates are not told apart: its logarithm is finite, and little noise.
_LEAST = 1e-5
HORIZONS = (16, 64, 256)  # tokens ahead, over which expected queries are averaged


def features(config: ScorerConfig, view: View) -> Array:
    """Features of the `B` (or `view.capacity`) candidates, [b, k, n, f] float32.

    The parts of the input in their order. `attention` is blocks of `g`: max, min and sum over the
    last `L` queries, sum over the last 16, 8 and 32 queries, cumulative and decayed cumulative sum.
    `expected` is blocks of `g`, one per horizon. `age` is logarithms of the age and of the
    position, and how near this is to the first. Slots without a candidate have arbitrary features.
    """
    group = view.query_blhd.shape[2] // view.cache.position_bks.shape[1]
    if config.statistics == "reference" and group > 8:
        raise UserError("scorer.form = 'reference' is defined for at most 8 query heads per group")
    held = view.candidate_bkn[..., None]
    found = []
    for part in config.parts:
        parts = [x[:, :, : view.capacity].astype(jnp.float32) for x in _PART[part](view)]
        if part in ("log_attention", "expected"):
            parts = [_standardised(x, held) for x in parts]
        elif config.norm == "rms" and part != "age":
            parts = [x * jax.lax.rsqrt(_mean(x * x, held) + 1e-30) for x in parts]
        found += parts
    return jnp.concatenate(found, axis=-1)


def _mean(x_bknf: Array, held: Array) -> Array:
    """Mean over candidates and features."""
    number = jnp.maximum(held.sum((-2, -1), keepdims=True) * x_bknf.shape[-1], 1)
    return jnp.where(held, x_bknf, 0.0).sum((-2, -1), keepdims=True) / number


def _standardised(x_bknf: Array, held: Array) -> Array:
    x = x_bknf - _mean(x_bknf, held)
    return x * jax.lax.rsqrt(_mean(x * x, held) + 1e-6)


def _attention(view: View) -> list[Array]:
    s = view.statistics
    assert s is not None, "the scorers' form asks for them"
    parts = [s.largest, s.smallest, s.total, s.last_16, s.last_8, s.last_32]
    return [*parts, view.cumulative_bksg, view.decayed_bksg]


def _expected(view: View) -> list[Array]:
    logits = [expected_attention.expected_logits(view, horizon) for horizon in HORIZONS]
    return [jnp.moveaxis(x, 2, 3) for x in logits]


def _age(view: View) -> list[Array]:
    position = jnp.maximum(view.cache.position_bks, 0)
    age = view.query_position_bl.max(-1)[:, None, None] - position
    logs = [jnp.log1p(jnp.maximum(x, 0).astype(jnp.float32)) / 4 for x in (age, position)]
    return [jnp.stack([*logs, 4.0 / (4 + position)], axis=-1)]


_PART = {
    "key": lambda view: [view.key_bksd],
    "value": lambda view: [view.value_bksd],
    "content": lambda view: [view.unrotated_key_bksd],
    "attention": _attention,
    "log_attention": lambda view: [jnp.log(x + _LEAST) for x in _attention(view)],
    "expected": _expected,
    "age": _age,
}


def apply(config: ScorerConfig, params: dict, feature_bknf: Array) -> Array:
    """Importance [b, k, n] of the candidates of one layer, from that layer's parameters."""
    return cast(Array, Scorer(config).apply({"params": params}, feature_bknf))
