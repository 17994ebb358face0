"""A batch of traces or prompts: positions, and which predictions count."""

from collections.abc import Sequence
from typing import Self

import flax.struct
import jax.numpy as jnp
import numpy as np
from jax import Array

from fkv import kinds

Numbers = Array | np.ndarray


@flax.struct.dataclass
class Batch:
    """A batch of token sequences, as NumPy or JAX arrays.

    Attributes:
      token_bt: token ids, padded.
      length_b: tokens of each row.
      prompt_b: how many of these are the prompt, which the model did not generate.
      padding_b: left padding of each row; the rest of its padding is on the right.
    """

    token_bt: Numbers
    length_b: Numbers
    prompt_b: Numbers
    padding_b: Numbers

    __repr__ = kinds.one_line

    @classmethod
    def of(cls, token_bt: Numbers, length_b: Numbers, prompt_b: Numbers | None = None) -> Self:
        """Right-padded traces, with prompts of these lengths or none."""
        none = np.zeros(np.shape(length_b), np.int32)
        return cls(token_bt, length_b, none if prompt_b is None else prompt_b, none)

    @property
    def position_bt(self) -> Array:
        """Absolute positions [b, t], -1 before a row's first token and after its last."""
        index = jnp.arange(self.token_bt.shape[1], dtype=jnp.int32)[None]
        index = index - self.padding_b[:, None]
        return jnp.where(index < self.length_b[:, None], jnp.maximum(index, -1), -1)

    def counted_bt(self, first: int = 0) -> Array:
        """Which predictions count, bool [b, t - 1]: entry i is about token i + 1 of the trace.

        Those of generated tokens from token `first` on: with `Cadence.first_evicting_token`, those
        that an eviction can change.
        """
        index = np.arange(1, self.token_bt.shape[1])[None]
        begin = self.prompt_b.clip(first)[:, None]
        return (index >= begin) & (index < self.length_b[:, None])


def left_pad(prompts: Sequence[np.ndarray], multiple: int = 1, width: int = 0) -> Batch:
    """Left-pads prompts.

    Args:
      multiple: the width is rounded up to a multiple of this.
      width: least width of the batch.
    """
    length = np.array([len(prompt) for prompt in prompts], np.int32)
    width = -(-max(width, *length) // multiple) * multiple
    token = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(token, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    return Batch(token, length, length, width - length)


def rounded(count: int, unit: int) -> int:
    """So many of few numbers: 1 to 8, 10, 12, 14, 16, 20 ... units, at least `count`."""
    units = -(-count // unit)
    step = 1 << max((units - 1).bit_length() - 3, 0)
    return -(-units // step) * step * unit
