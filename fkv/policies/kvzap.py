"""KVzap: surrogates on hidden states."""

import jax
import jax.numpy as jnp
from jax import Array

from fkv.cache.cadence import Cadence
from fkv.models import ModelConfig
from fkv.models.numerics import einsum_f32, linear
from fkv.policies.arrival import Arrival
from fkv.policies.base import Policy, View, register, setting
from fkv.policies.foresight import TRAINED, Trained
from fkv.policies.weights import check_arrays


@register("kvzap")
class KVzap(Policy):
    """Keeps what a surrogate of the scores of KVzip+ rates highest (arXiv 2601.07891).

    A layer's surrogate sees the hidden state x of a token after the input norm, once, when it
    comes, and gives a score for each KV head: x w1 + b1, or gelu(x w1 + b1) w2 + b2 with the exact
    GELU. The paper keeps what passes a threshold: `threshold(kvzap):at=-4`. So do `KVzapPress` and
    `DMSPress` of kvpress, which multiply in the model's dtype (here: float32), and never evict the
    newest 128 (here: L).

    Attributes:
      params: of all layers: w1 [y, m, k] and b1 [y, k]; or, of an MLP, w1 [y, m, o], b1 [y, o],
        w2 [y, o, k] and b2 [y, k].
      trained: where they come from.
    """

    params: dict
    trained: Trained = setting(TRAINED, Trained())

    def check(self, config: ModelConfig, cadence: Cadence) -> None:
        lead, heads = config.layers, config.kv_heads
        hidden = heads
        shapes = {}
        if isinstance(self.params, dict) and "w2" in self.params:
            hidden = getattr(self.params.get("b1"), "shape", (0,))[-1]
            shapes = {"w2": (lead, hidden, heads), "b2": (lead, heads)}
        shapes = {"w1": (lead, config.width, hidden), "b1": (lead, hidden)} | shapes
        check_arrays(self, shapes)
        super().check(config, cadence)

    def arrive(self, arrival: Arrival) -> dict[str, Array]:
        w, x = self.params, arrival.normed_btm.astype(jnp.float32)
        x = linear("btm,mo->bto", x, w["w1"], einsum_f32) + w["b1"][None, None]
        if "w2" in w:
            x = jax.nn.gelu(x, approximate=False)
            x = linear("bto,ok->btk", x, w["w2"], einsum_f32) + w["b2"][None, None]
        return {"score": x}

    def score(self, view: View) -> Array:
        return view.arrived["score"]
