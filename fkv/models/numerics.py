"""Products of arrays: precision, and what differs by platform."""

import jax
import jax.numpy as jnp
from jax import Array

# Finite, so that a query that sees nothing (padding) gives numbers and not NaN.
MASKED = -1e30


def precision(x: Array, y: Array) -> jax.lax.Precision | None:
    """What a product needs: unless told, TPUs round float32 to bfloat16, and GPUs to TF32.

    Products of two bfloat16 (or float16) are exact by default, and fast.
    """
    return jax.lax.Precision.HIGHEST if jnp.result_type(x, y) == jnp.float32 else None


def einsum(spec: str, x: Array, y: Array) -> Array:
    """`einsum` in the dtype of the inputs; every product of float32 in this package is one."""
    return jnp.einsum(spec, x, y, precision=precision(x, y))


def einsum_f32(spec: str, x: Array, y: Array) -> Array:
    """`einsum` accumulated and returned in float32, whatever the inputs are."""
    if jax.default_backend() == "cpu":  # which has no dot of two bfloat16 into a float32
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.einsum(spec, x, y, precision=precision(x, y), preferred_element_type=jnp.float32)


def group_queries(q_bqhd: Array, kv_heads: int) -> Array:
    """Query heads sorted by the KV head they share: [b, q, h, d] -> [b, q, k, g, d]."""
    b, q, h, d = q_bqhd.shape
    return q_bqhd.reshape(b, q, kv_heads, h // kv_heads, d)
