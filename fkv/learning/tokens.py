"""Per-token losses, and the split into low- and high-entropy tokens."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fkv import kinds, models
from fkv.models import numerics


@dataclasses.dataclass(frozen=True)
class Split(kinds.Settings):
    """The split of the counted tokens.

    Attributes:
      high_fraction: share of a trace's tokens that count as high-entropy, by full-cache entropy;
        below 1, so that some are low.
    """

    group: ClassVar[str] = "grpo"
    high_fraction: float = kinds.setting(kinds.number(0, 1, below=True), 0.2)


@flax.struct.dataclass
class TokenLosses:
    """Per-token results of a pass: entry i is about predicting token i + 1 from its prefix.

    Attributes:
      nll_bt: negative log-likelihood of the next token, nats, [b, t - 1].
      entropy_bt: entropy of the prediction, nats, [b, t - 1].
    """

    nll_bt: Array
    entropy_bt: Array


def token_losses(
    lm: models.LM, hidden_btm: Array, token_bt: Array, block: int = 512
) -> TokenLosses:
    """Losses of a pass from its last hidden states; logits are computed a block at a time.

    Args:
      block: tokens of every row in a block, a quarter of that on a CPU, where rows go one by one.
    """
    sizes = block, -(-block // 4)
    return of_logits(lm, _losses, hidden_btm[:, :-1], token_bt[:, 1:], blocks=sizes)


def _losses(logits_btv, target_bt):
    x = logits_btv - jax.lax.stop_gradient(logits_btv.max(-1, keepdims=True))
    e = jnp.exp(x)
    total = e.sum(-1)
    log_total = jnp.log(total)
    nll = log_total - jnp.take_along_axis(x, target_bt[..., None], axis=-1)[..., 0]
    return TokenLosses(nll, log_total - (e * x).sum(-1) / total)


def of_logits(
    lm: models.LM,
    function: Callable[..., Any],
    hidden_btm: Array,
    *arrays_bt: Array,
    blocks: tuple[int, int] = (512, 128),
) -> Any:
    """`function` of the logits of tokens, which are computed a block at a time.

    Args:
      function: of logits [b, n, v], float32, and of the other arrays [b, n, ...] of the same
        tokens, each alone; gives a pytree of arrays [b, n, ...].
      hidden_btm: last hidden states.
      arrays_bt: others, [b, t, ...].
      blocks: tokens of every row in a block; and on a CPU, where rows go one by one.
    """

    def some(block, *arrays_bt):
        b, t = arrays_bt[0].shape[:2]
        block = min(block, t)
        count = -(-t // block)

        def split(x):
            x = jnp.pad(x, ((0, 0), (0, count * block - t), *[(0, 0)] * (x.ndim - 2)))
            return jnp.moveaxis(x.reshape(b, count, block, *x.shape[2:]), 1, 0)

        def join(x):
            return jnp.moveaxis(x, 0, 1).reshape(b, count * block, *x.shape[3:])[:, :t]

        def one(inputs):
            hidden, *others = inputs
            return function(models.unembed(lm, hidden), *others)

        return jax.tree.map(join, jax.lax.map(one, tuple(map(split, arrays_bt))))

    together, one_by_one = (functools.partial(some, size) for size in blocks)
    return numerics.row_by_row(together, hidden_btm, *arrays_bt, of_one=one_by_one)


def low_entropy(entropy_bt: Array, counted_bt: Array, high_fraction: float) -> Array:
    """Which tokens count as low-entropy, bool [b, t].

    All of a row's counted tokens but the `high_fraction` (rounded down to whole tokens) with the
    largest entropy; of equal ones, earlier tokens are high. Rewards and tables share this split.
    """
    entropy = jnp.where(counted_bt, entropy_bt, -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-entropy, axis=-1, stable=True), axis=-1)
    # Tabulated in float64 with a small margin, as 0.29 * 100 falls short of 29.
    high = np.floor(np.arange(entropy.shape[-1] + 1) * high_fraction + 1e-9).astype(np.int32)
    return counted_bt & (rank >= jnp.asarray(high)[counted_bt.sum(-1, keepdims=True)])
