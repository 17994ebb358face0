"""Per-token losses, and the split into low- and high-entropy tokens."""

import dataclasses
import functools
from typing import ClassVar

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
    return numerics.row_by_row(
        functools.partial(_losses, lm, block), hidden_btm[:, :-1], token_bt[:, 1:],
        of_one=functools.partial(_losses, lm, -(-block // 4)),
    )  # fmt: skip


def _losses(lm, block, hidden_btm, target_bt):
    b, t, m = hidden_btm.shape
    block = min(block, t)
    blocks = -(-t // block)
    pad = ((0, 0), (0, blocks * block - t))
    hidden = jnp.pad(hidden_btm, (*pad, (0, 0))).reshape(b, blocks, block, m)
    target = jnp.pad(target_bt, pad).reshape(b, blocks, block)

    def one(inputs):
        hidden, target = inputs
        x = models.unembed(lm, hidden)
        x = x - jax.lax.stop_gradient(x.max(-1, keepdims=True))
        e = jnp.exp(x)
        total = e.sum(-1)
        log_total = jnp.log(total)
        nll = log_total - jnp.take_along_axis(x, target[..., None], axis=-1)[..., 0]
        return TokenLosses(nll, log_total - (e * x).sum(-1) / total)

    losses = jax.lax.map(one, (jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(target, 1, 0)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(b, blocks * block)[:, :t], losses)


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
