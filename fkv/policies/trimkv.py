"""TRIM-KV: gates say how fast an entry is forgotten."""

import jax
import jax.numpy as jnp
from jax import Array

from fkv import kinds
from fkv.cache.cadence import Cadence
from fkv.models import ModelConfig
from fkv.models.numerics import einsum_f32, linear
from fkv.policies.arrival import Arrival
from fkv.policies.base import Policy, View, register, setting
from fkv.policies.foresight import TRAINED, Trained
from fkv.policies.weights import check_arrays


@register("trimkv")
class TrimKV(Policy):
    """Keeps what trained gates retain longest (arXiv 2512.03324).

    When an entry comes, the layer's gate gives a logit for each KV head, once; beta is its sigmoid.
    The importance of an entry is beta to the power of its age, as a logarithm:
    (n + 1 - position) * log(beta) after n tokens. Three forms of gates have been released:
    silu(x w1 + b1) w2 + b2 of the hidden state after the input norm (`rg`) or of the rotated keys
    and values of all KV heads (`rg2`), and (silu(x gate) * (x up)) down + b2 of the latter (`rg3`).
    As the released code: it protects no newest entries (`window`), and may add the logarithm of the
    key's norm (`knorm`, its strategy `knorm_alpha`). It multiplies in the model's dtype, this in
    float32. Its dynamic budgets are `ada(trimkv):safeguard=0` within a layer; those over all layers
    at once don't fit a replay that runs layer by layer.

    Attributes:
      params: of all layers: w1 [y, i, o], b1 [y, o], w2 [y, o, k], b2 [y, k]; of `rg3` gate and up
        [y, i, o], down [y, o, k], b2 [y, k].
      gate: `rg` (i is the width), `rg2` or `rg3` (i is 2 k d: key and value, head after head).
      trained: where they come from.
    """

    params: dict
    gate: str = setting(kinds.one_of(("rg", "rg2", "rg3")), "rg")
    window: int = setting(kinds.whole(0), 0)
    knorm: bool = setting(kinds.SWITCH, False)
    trained: Trained = setting(TRAINED, Trained())

    def check(self, config: ModelConfig, cadence: Cadence) -> None:
        y, k = config.layers, config.kv_heads
        inputs = config.width if self.gate == "rg" else 2 * k * config.head_dim
        first, last = ("gate", "down") if self.gate == "rg3" else ("w1", "w2")
        params = self.params if isinstance(self.params, dict) else {}
        hidden = (getattr(params.get(first), "shape", None) or (0,))[-1]
        shapes = {first: (y, inputs, hidden), last: (y, hidden, k), "b2": (y, k)}
        shapes |= {"up": shapes[first]} if self.gate == "rg3" else {"b1": (y, hidden)}
        check_arrays(self, shapes)
        super().check(config, cadence)

    def protected(self, view: View) -> int:
        return min(self.window, view.interval)

    def arrive(self, arrival: Arrival) -> dict[str, Array]:
        w, x = self.params, arrival.normed_btm
        if self.gate != "rg":
            x = jnp.concatenate([arrival.rotated_key_btkd, arrival.value_btkd], axis=-1)
            x = x.reshape(*x.shape[:2], -1)

        def times(x, weight):
            return linear("bti,io->bto", x.astype(jnp.float32), weight, einsum_f32)

        if self.gate == "rg3":
            x = times(jax.nn.silu(times(x, w["gate"])) * times(x, w["up"]), w["down"])
        else:
            x = times(jax.nn.silu(times(x, w["w1"]) + w["b1"][None, None]), w["w2"])
        return {"log_beta": jax.nn.log_sigmoid(x + w["b2"][None, None])}

    def score(self, view: View) -> Array:
        newest = view.query_position_bl.max(-1)[:, None, None]
        age = (newest + 2 - view.cache.position_bks).astype(jnp.float32)
        score = view.arrived["log_beta"] * age
        if not self.knorm:
            return score
        return score + jnp.log(jnp.linalg.norm(view.key_bksd.astype(jnp.float32), axis=-1))
