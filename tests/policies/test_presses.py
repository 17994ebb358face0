"""Forms of policies that follow presses of kvpress, against plain NumPy; no environment needed."""

import jax
import jax.numpy as jnp
import numpy as np

from fkv import policies
from fkv.cache import slots as kv
from fkv.cache.cadence import Cadence
from fkv.models import ModelConfig
from fkv.policies import expected_attention

T, L, WINDOW, KERNEL = 40, 8, 6, 5
CONFIG = ModelConfig("qwen3", 37, 32, 1, 4, 2, 8, 24, qk_norm=True)


def view(queries):
    """A text of 40 tokens that is evicted at its end, with its last queries."""
    rng = np.random.default_rng(0)
    key, value, query = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((1, 2, T, 8), (1, 2, T, 8), (1, T, 4, 8))
    )
    at = jnp.arange(T)[None]
    cache = kv.Cache(key, value, jnp.broadcast_to(at[None], (1, 2, T)))
    random = jax.random.split(jax.random.key(0), 1)
    return policies.View(
        cache, query[:, -queries:], at[:, -queries:], jnp.int32(9), random, None, Cadence(16, L),
        jnp.int32(0), CONFIG,
    )  # fmt: skip


def test_snapkv_with_means():
    seen = view(L)
    score = policies.get(f"snapkv:window={WINDOW},kernel={KERNEL},mean=True").score(seen)
    query, key = np.asarray(seen.query_blhd)[0], np.asarray(seen.key_bksd)[0]
    for head in range(2):
        attended = np.zeros(T)
        for group in range(2):
            for i in range(WINDOW):
                at = T - WINDOW + i
                x = key[head, : at + 1] @ query[L - WINDOW + i, 2 * head + group] / 8**0.5
                p = np.exp(x - x.max())
                attended[: at + 1] += p / p.sum() / WINDOW / 2
        attended[T - WINDOW :] = 0
        around = np.pad(attended, KERNEL // 2)
        want = [around[i : i + KERNEL].mean() for i in range(T)]
        np.testing.assert_allclose(score[0, head], want, atol=1e-6)


def test_expected_attention_by_moments_is_that_by_logits():
    seen = view(T)
    want = expected_attention.expected_logits(seen, 16)
    np.testing.assert_allclose(expected_attention.by_moments(seen, 16, 0), want, atol=1e-4)
    # The queries of the first positions are left out.
    later = seen.replace(
        query_blhd=seen.query_blhd[:, 4:], query_position_bl=seen.query_position_bl[:, 4:]
    )
    want = expected_attention.expected_logits(later, 16)
    np.testing.assert_allclose(expected_attention.by_moments(seen, 16, 4), want, atol=1e-4)
