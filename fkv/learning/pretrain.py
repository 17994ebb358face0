"""Training of the embedded reasoner from scratch: next-token loss on the chain of thought."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from fkv import models
from fkv.cache import attention
from fkv.models import ModelConfig


def logits(config: ModelConfig, params: models.Params, token_bt: Array, length_b: Array) -> Array:
    """Full-cache logits [b, t, v] of right-padded rows; attention is one block of T x T."""
    t = token_bt.shape[1]
    index = jnp.arange(t)[None]
    position = jnp.where(index < length_b[:, None], index, -1)

    def layer(hidden, weights):
        q, k, v = models.project(config, weights, hidden, position)
        out, _ = attention.full_attention(q, k, v, position, block=t)
        return models.finish(config, weights, hidden, out), None

    # Unrolled: a third faster on a CPU than a loop over three small layers.
    hidden, _ = jax.lax.scan(layer, models.embed(params, token_bt), params["layers"], unroll=True)
    return models.unembed(config, params, hidden)


def loss(
    params: models.Params, config: ModelConfig, token_bt: Array, prompt_b: Array, length_b: Array
) -> tuple[Array, Array]:
    """Mean negative log-likelihood of the tokens after the prompt, in nats, and accuracy."""
    x = logits(config, params, token_bt, length_b)[:, :-1]
    target = token_bt[:, 1:]
    index = jnp.arange(1, token_bt.shape[1])[None]
    weight = (index >= prompt_b[:, None]) & (index < length_b[:, None])
    nll = optax.softmax_cross_entropy_with_integer_labels(x, target)
    hit = x.argmax(-1) == target
    return (nll * weight).sum() / weight.sum(), (hit * weight).sum() / weight.sum()


def optimizer(
    learning_rate: float, warmup: int, cycles: Sequence[int], clip: float, weight_decay: float
) -> optax.GradientTransformation:
    """AdamW after clipping by global norm, with decay decoupled from the gradient.

    Args:
      cycles: steps of each cycle: linear warm-up, then cosine to a fiftieth of the rate.
    """
    cosines = [
        optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, steps, 0.02 * learning_rate)
        for steps in cycles
    ]
    schedule = optax.join_schedules(cosines, np.cumsum(cycles[:-1]).tolist())
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(schedule, b2=0.98, weight_decay=weight_decay),
    )


@functools.partial(jax.jit, static_argnames=("config", "optimizer"), donate_argnums=(0, 1))
def train_step(params, opt_state, config, optimizer, token_bt, prompt_b, length_b):
    """One update; returns parameters, optimiser state, loss and token accuracy."""
    (value, accuracy), grads = jax.value_and_grad(loss, has_aux=True)(
        params, config, token_bt, prompt_b, length_b
    )
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value, accuracy
