"""Attention retained, against the full attention of one trace in numpy and what is held."""

import jax
import numpy as np
import pytest

from fkv import policies
from fkv.cache.cadence import Cadence
from fkv.engine import replay
from fkv.engine.batch import Batch
from fkv.evaluation import diagnosis
from fkv.evaluation.retained import retained
from tests import oracles

CADENCE = Cadence(16, 8)
LENGTHS, PROMPTS = [61, 30, 24], [2, 28, 0]  # the last sees no eviction
POLICIES = {name: policies.get(name) for name in ("h2o", "random", "ada(h2o)")}


@pytest.fixture(scope="module")
def model():
    return oracles.make_lm(heads=4, kv_heads=2)


@pytest.fixture(scope="module")
def found(model):
    token, length = map(np.asarray, oracles.make_tokens(model.config, LENGTHS))
    token = np.pad(token, ((0, 0), (0, 64 - token.shape[1])))
    batch = Batch.of(token, length, np.array(PROMPTS))
    keys = replay.row_keys(jax.random.key(1), len(LENGTHS))
    return batch, retained(model, POLICIES, batch, CADENCE, keys)


def share(attention_ht, held_kct, first, prompt):
    """Of one layer: attention [h, t, t] on what is held, mean over counted queries and groups."""
    heads, t, _ = attention_ht.shape
    kv_heads, total = len(held_kct), np.zeros(len(held_kct))
    counted = [i for i in range(t - 1) if i + 1 > first and i + 1 >= prompt]
    for i in counted:
        for h in range(heads):
            head = h * kv_heads // heads
            held = held_kct[head, i // CADENCE.interval, :t]
            total[head] += attention_ht[h, i][held].sum()
    return total / len(counted) / (heads // kv_heads)


@pytest.mark.parametrize("row", [0, 1])
def test_shares_are_those_of_the_full_attention_on_what_is_held(model, found, row):
    batch, shares = found
    n = LENGTHS[row]
    width = -(-n // CADENCE.interval) * CADENCE.interval
    trace = Batch.of(batch.token_bt[row : row + 1, :width], np.array([n]), np.array([PROMPTS[row]]))
    rules = {name: p for name, p in POLICIES.items() if name != "random"}  # keys are others there
    held = diagnosis.retention(model, rules, trace, CADENCE)
    token = np.asarray(batch.token_bt[row, :n])
    _, attention = oracles.full(model.config, model.params, token)
    for name in ("golden", *rules):
        for layer in range(2):
            want = share(
                np.asarray(attention[layer]), held[name][layer], CADENCE.slots, PROMPTS[row]
            )
            np.testing.assert_allclose(shares[name][row, layer], want, atol=2e-5)
            assert (want < 0.999).all()


def test_golden_is_above_random_and_short_traces_count_nothing(found):
    _, shares = found
    assert shares["golden"][0].mean() > shares["random"][0].mean() + 0.02
    assert all(x.shape == (3, 2, 2) and np.isnan(x[2]).all() for x in shares.values())
