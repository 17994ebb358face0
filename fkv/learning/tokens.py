"""Per-token losses, and the split into low- and high-entropy tokens."""

import dataclasses
from typing import ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fkv import kinds, models


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
    """Losses of a pass from its last hidden states; logits are computed a block at a time."""
    b, t, m = hidden_btm.shape
    block = min(block, t - 1)
    blocks = -(-(t - 1) // block)
    pad = ((0, 0), (0, blocks * block - (t - 1)))
    hidden = jnp.pad(hidden_btm[:, :-1], (*pad, (0, 0))).reshape(b, blocks, block, m)
    target = jnp.pad(token_bt[:, 1:], pad).reshape(b, blocks, block)

    def one(inputs):
        hidden, target = inputs
        log_p = jax.nn.log_softmax(models.unembed(lm, hidden))
        nll = -jnp.take_along_axis(log_p, target[..., None], axis=-1)[..., 0]
        return TokenLosses(nll, -(jnp.exp(log_p) * log_p).sum(-1))

    losses = jax.lax.map(one, (jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(target, 1, 0)))
    return jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(b, blocks * block)[:, : t - 1], losses
    )


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
