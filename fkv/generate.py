"""Decoding with the full cache."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fkv import attention, models
from fkv import cache as kv
from fkv.models import ModelConfig


def left_pad(prompts: Sequence[np.ndarray], value: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Aligns prompts at their ends; returns ids [b, t] and positions [b, t], -1 for padding."""
    width = max(len(prompt) for prompt in prompts)
    token = np.full((len(prompts), width), value, np.int32)
    position = np.full((len(prompts), width), -1, np.int32)
    for i, prompt in enumerate(prompts):
        token[i, width - len(prompt) :] = prompt
        position[i, width - len(prompt) :] = np.arange(len(prompt))
    return token, position


@functools.partial(jax.jit, static_argnames=("config", "new_tokens"))
def full_cache(
    config: ModelConfig,
    params: models.Params,
    token_bt: Array,
    position_bt: Array,
    key: Array,
    new_tokens: int,
    temperature: float = 1.0,
) -> Array:
    """Samples continuations with the full cache, one program on the device.

    Args:
      token_bt, position_bt: left-padded prompts, from `left_pad`.
      key: PRNG key.
      new_tokens: how many tokens to add; there are no stop tokens, cut what follows them.
      temperature: of the softmax; 0 for greedy.

    Returns:
      Generated ids [b, new_tokens].
    """
    b, t = token_bt.shape
    weights = models.unstack(config, params)

    hidden, caches = models.embed(params, token_bt), []
    for layer in weights:
        q, k, v = models.project(config, layer, hidden, position_bt)
        out, _ = attention.full_attention(q, k, v, position_bt)
        hidden = models.finish(config, layer, hidden, out)
        cache = kv.init(b, config.kv_heads, t + new_tokens, config.head_dim, k.dtype)
        caches.append(kv.append(cache, 0, k, v, position_bt))

    def pick(hidden, key):
        logits = models.unembed(config, params, hidden[:, -1:])[:, 0]
        drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
        return jnp.where(temperature > 0, drawn, logits.argmax(-1)).astype(jnp.int32)

    def step(state, inputs):
        caches, token, position = state
        i, key = inputs
        hidden, held = models.embed(params, token[:, None]), []
        for layer, cache in zip(weights, caches, strict=True):
            q, k, v = models.project(config, layer, hidden, position)
            cache = kv.append(cache, t + i, k, v, position)
            seen = attention.visible(position, cache.position_bks)
            out, _ = attention.attend(q, cache.key_bksd, cache.value_bksd, seen)
            hidden = models.finish(config, layer, hidden, out)
            held.append(cache)
        return (tuple(held), pick(hidden, key), position + 1), token

    keys = jax.random.split(key, new_tokens + 1)
    first = pick(hidden, keys[0])
    state = (tuple(caches), first, position_bt[:, -1:] + 1)
    _, tokens = jax.lax.scan(step, state, (jnp.arange(new_tokens), keys[1:]))
    return tokens.T
