"""The scorer: a tiny MLP per layer and KV head that predicts the importance of an entry.

Its input is the entry's rotated key, its value, and eight attention features per query head of the
group; its output is an importance, higher is kept (paper section 3.2). The released scorers give an
eviction score instead: their output weights are negated on import.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

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
from fkv.policies.base import View

INPUTS = ("both", "attention", "kv")
NORMS = ("none", "rms")
FORMS = ("windowed", "reference")


@dataclasses.dataclass(frozen=True)
class ScorerConfig(kinds.Settings):
    """Architecture and features of a scorer; stored in every scorer checkpoint.

    Attributes:
      hidden: width of the hidden layer.
      inputs: `both`, or only `attention` or `kv`.
      norm: `none` as released, or `rms`: key, value and each of the eight attention features are
        divided by their root mean square over the candidates of an eviction.
      form: `windowed` or `reference` attention statistics.
    """

    group: ClassVar[str] = "scorer"
    hidden: int = kinds.setting(kinds.whole(1, 2**16), 16)
    inputs: str = kinds.setting(kinds.one_of(INPUTS), "both")
    norm: str = kinds.setting(kinds.one_of(NORMS), "none")
    form: str = kinds.setting(kinds.one_of(FORMS), "windowed")

    @property
    def statistics(self) -> str | None:
        """The form of attention statistics that the features need, or None."""
        return None if self.inputs == "kv" else self.form


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
    kv, attention = 2 * model.head_dim, 8 * model.group_size
    return {"both": kv + attention, "kv": kv, "attention": attention}[scorer.inputs]


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


def features(config: ScorerConfig, view: View) -> Array:
    """Features of the `B` (or `view.capacity`) candidates, [b, k, n, f] float32.

    In this order: key [d], value [d], then blocks of `g`: max, min and sum over the last `L`
    queries, sum over the last 16, 8 and 32 queries, cumulative and decayed cumulative sum. Slots
    without a candidate have arbitrary features.
    """
    group = view.query_blhd.shape[2] // view.cache.position_bks.shape[1]
    if config.statistics == "reference" and group > 8:
        raise UserError("scorer.form = 'reference' is defined for at most 8 query heads per group")
    parts = []
    if config.inputs != "attention":
        parts += [view.key_bksd, view.value_bksd]
    if config.inputs != "kv":
        s = view.statistics
        parts += [s.largest, s.smallest, s.total, s.last_16, s.last_8, s.last_32]
        parts += [view.cumulative_bksg, view.decayed_bksg]
    parts = [x[:, :, : view.capacity].astype(jnp.float32) for x in parts]
    if config.norm == "rms":
        held = view.candidate_bkn[..., None]

        def scaled(x):
            number = jnp.maximum(held.sum((-2, -1), keepdims=True) * x.shape[-1], 1)
            total = jnp.where(held, x * x, 0.0).sum((-2, -1), keepdims=True)
            return x * jax.lax.rsqrt(total / number + 1e-30)

        parts = [scaled(x) for x in parts]
    return jnp.concatenate(parts, axis=-1)


def apply(config: ScorerConfig, params: dict, feature_bknf: Array) -> Array:
    """Importance [b, k, n] of the candidates of one layer, from that layer's parameters."""
    return Scorer(config).apply({"params": params}, feature_bknf)
