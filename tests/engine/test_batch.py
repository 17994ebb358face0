"""Positions and counted tokens of batches, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fkv.engine.batch import Batch

LENGTHS, PADDING, PROMPTS = [7, 3, 1, 0], [0, 2, 6, 3], [2, 3, 0, 0]


def test_positions_are_counted_from_a_rows_first_token():
    token = np.zeros((4, 9), np.int32)
    batch = Batch(token, *map(np.array, (LENGTHS, PROMPTS, PADDING)))
    got = jax.jit(lambda batch: batch.position_bt)(batch)
    assert got.dtype == jnp.int32
    for row, n, padding in zip(got.tolist(), LENGTHS, PADDING, strict=True):
        assert row == [-1] * padding + list(range(n)) + [-1] * (9 - padding - n)


@pytest.mark.parametrize("prompts", [None, PROMPTS])
@pytest.mark.parametrize("first", [0, 1, 4, 7])
def test_tokens_count_that_the_model_wrote(first, prompts):
    batch = Batch.of(np.zeros((4, 9), np.int32), *(x and np.array(x) for x in (LENGTHS, prompts)))
    counted = batch.counted_bt(first)
    np.testing.assert_array_equal(
        counted, jax.jit(Batch.counted_bt, static_argnums=1)(batch, first)
    )
    for row, n, prompt in zip(counted, LENGTHS, prompts or [0] * 4, strict=True):
        # Entry i is about token i + 1; the first token is predicted by none.
        want = [token for token in range(1, n) if token >= max(prompt, first)]
        assert (np.flatnonzero(row) + 1).tolist() == want
    assert counted.shape == (4, 8) and not batch.padding_b.any()
