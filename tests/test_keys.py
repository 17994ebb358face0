"""Every draw of a run has a key of its own."""

import dataclasses
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fkv
from fkv import api, policies
from fkv.cache.cadence import Cadence
from fkv.engine import replay
from fkv.engine.batch import Batch
from fkv.errors import UserError
from fkv.keys import Purpose, fold, key_of, keys_of
from fkv.policies import scorer
from tests import oracles

# What follows a purpose, each index from 0 to 7.
INDICES = {
    Purpose.MODEL: 1,
    Purpose.SCORER: 1,
    Purpose.ROLLOUT: 2,
    Purpose.REPLAY: 1,
    Purpose.ANSWER: 2,
    Purpose.TRACE: 2,
    Purpose.PRETRAIN: 1,
    Purpose.LOOKUP: 1,
}
OF_ROWS = {*INDICES} - {Purpose.MODEL, Purpose.SCORER}
EACH = jnp.arange(8)


def table(key, depth):
    """The keys at all indices, which are that many."""
    if not depth:
        return key[None]
    return jnp.concatenate([table(fold(key, i), depth - 1) for i in EACH])


def test_no_two_draws_share_a_key():
    assert set(INDICES) | {Purpose.BENCHMARK, Purpose.TOKEN, Purpose.EVICTION} == set(Purpose)
    assert len(Purpose) == len(Purpose.__members__)  # two of one number would be one
    draws, rows = [], []
    for seed in (0, 1):
        for purpose, depth in INDICES.items():
            (rows if purpose in OF_ROWS else draws).append(table(key_of(seed, purpose), depth))
        made_up = key_of(seed, Purpose.BENCHMARK)
        rows.append(table(fold(made_up, 0), 1))
        draws += [table(fold(made_up, 1), 2), fold(made_up, 2)[None]]
    rows = jnp.concatenate(rows)

    @jax.jit
    @jax.vmap
    def of_row(key):
        drawn = [table(key_of(key, Purpose.TOKEN), 1), table(key_of(key, Purpose.EVICTION), 2)]
        return jnp.concatenate(drawn)

    draws.append(of_row(rows).reshape(-1))
    found = np.asarray(jax.random.key_data(jnp.concatenate(draws)))
    assert len(found) > 25_000
    assert len(np.unique(found, axis=0)) == len(found)


def test_an_eviction_draws_by_row_layer_and_position():
    lm = oracles.make_lm()
    rows = keys_of(key_of(5, Purpose.REPLAY), 2)
    batch = Batch.of(jnp.zeros((2, 24), jnp.int32), jnp.array([24, 24]))

    def observe(acc, policy, view, evict):
        return acc, jax.random.key_data(view.random_b)

    got = replay.replay(lm, batch, policies.get("random"), Cadence(8, 4), rows, observe)[2]
    assert got.shape[:3] == (lm.config.layers, 3, 2)
    for layer, eviction, row in np.ndindex(lm.config.layers, 3, 2):
        want = key_of(rows[row], Purpose.EVICTION, layer, 4 * eviction + 11)
        np.testing.assert_array_equal(got[layer, eviction, row], jax.random.key_data(want))


def test_more_layers_or_rows_leave_the_keys_of_the_first_as_they_are():
    config, _ = oracles.make_model()
    key, rules = key_of(3, Purpose.SCORER), scorer.ScorerConfig(inputs="kv")
    few, many = (
        scorer.init(key, dataclasses.replace(config, layers=n), rules)["w1"] for n in (1, 3)
    )
    np.testing.assert_array_equal(few, many[:1])
    few, many = (jax.random.key_data(keys_of(key, n)) for n in (2, 5))
    np.testing.assert_array_equal(few, many[:2])
    assert len(np.unique(many, axis=0)) == 5


def test_only_one_module_makes_keys():
    makes = re.compile(r"random\.(key|PRNGKey|split|fold_in|clone)\(|import (jax\.)?random\b")
    home = Path(fkv.__file__).parent
    for path in home.rglob("*.py"):
        if path.name != "keys.py":
            assert not makes.search(path.read_text()), path


def test_the_key_of_an_answer_is_its_own_whatever_is_beside_it():
    keys = {
        (seed, i, j): tuple(np.asarray(jax.random.key_data(api.sample_key(seed, i, j))).tolist())
        for seed, i, j in itertools.product(range(3), range(4), range(4))
    }
    assert len(set(keys.values())) == len(keys)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, True, "0", None])
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises(UserError, match=r"seed = .* must be a whole number from 0 to 4294967295"):
        key_of(seed, Purpose.ANSWER)
    assert key_of(np.int64(2**32 - 1), Purpose.ANSWER).shape == ()
