"""What a policy may ask of entries when they come: numbers that stay with them.

A policy that defines `arrive(self, arrival)` gets, for every layer, tokens that come, however many
at a time, and gives a dictionary of floating arrays [b, t, k, ...], by name. They travel with the
entries through every eviction, in replay and decoding; `View.arrived` has them by slot. Nothing is
computed or held for what is not asked for.
"""

from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from fkv import kinds
from fkv.errors import UserError
from fkv.models import ModelConfig, rotate
from fkv.policies.base import Policy, name_of


@flax.struct.dataclass
class Arrival:
    """Tokens of one layer whose entries come.

    Attributes:
      hidden_btm: hidden states before the layer's input norm.
      normed_btm: after it: what queries, keys and values are projected from.
      query_bthd, key_btkd: before their rotation, after biases and QK-norm.
      value_btkd: values; like keys as the model has them, even if the cache holds integers.
      position_bt: absolute positions, -1 for padding.
      layer: index of this layer, int32.
      config: of the model.
      rotated_key_btkd: keys as they are cached.
    """

    hidden_btm: Array
    normed_btm: Array
    query_bthd: Array
    key_btkd: Array
    value_btkd: Array
    position_bt: Array
    layer: Array | int
    config: ModelConfig = flax.struct.field(pytree_node=False)

    @property
    def rotated_key_btkd(self) -> Array:
        return rotate(self.key_btkd, self.position_bt, self.config)


def ask(policy: Policy, arrival: Arrival) -> dict[str, Array]:
    """What a policy that defines `arrive` keeps of these tokens.

    Args:
      policy: with its arrays sliced to this layer.

    Raises:
      UserError: it is not a dictionary of floating arrays [b, t, k, ...].
    """
    assert policy.arrive is not None
    found = policy.arrive(arrival)
    lead = arrival.key_btkd.shape[:3]
    if not isinstance(found, Mapping) or not found:
        raise UserError(
            f"{name_of(policy)}: arrive gives {kinds.said(found)}, but must give arrays by name, "
            'as in {"score": score_btk}'
        )
    for name, x in found.items():
        is_array = hasattr(x, "shape") and hasattr(x, "dtype")
        fits = is_array and x.shape[:3] == lead and jnp.issubdtype(x.dtype, jnp.floating)
        if not isinstance(name, str) or not fits:
            given = f"{x.dtype} {list(x.shape)}" if is_array else kinds.said(x)
            raise UserError(
                f"{name_of(policy)}: arrive gives {name!r}: {given}, but must give floats "
                f"{[*lead, '...']}, [batch, tokens, KV heads, ...]"
            )
    return dict(found)


def shapes(
    policy: Policy, config: ModelConfig, dtype: jnp.dtype
) -> dict[str, jax.ShapeDtypeStruct]:
    """Trailing shapes of what a policy keeps of each entry, by name; empty if it asks for nothing.

    Args:
      policy: with the arrays of all layers.
      dtype: of hidden states.
    """
    if policy.arrive is None:
        return {}

    def of_one_token(policy):
        hidden = jnp.zeros((1, 1, config.width), dtype)
        query = jnp.zeros((1, 1, config.heads, config.head_dim), dtype)
        key = query[:, :, : config.kv_heads]
        at = jnp.zeros((1, 1), jnp.int32)
        arrival = Arrival(hidden, hidden, query, key, key, at, jnp.int32(0), config)
        return ask(jax.tree.map(lambda x: x[0], policy), arrival)

    found = jax.eval_shape(of_one_token, policy)
    return {name: jax.ShapeDtypeStruct(x.shape[3:], x.dtype) for name, x in found.items()}
