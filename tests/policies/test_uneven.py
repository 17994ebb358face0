"""Budgets of one's own per head: each head keeps what it would keep at its budget alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fkv import policies
from fkv.cache.cadence import Cadence
from fkv.engine import replay
from fkv.errors import UserError
from tests import oracles

BUDGETS = np.array([[16, 32], [24, 16]], np.int32)


@pytest.fixture(scope="module")
def model():
    return oracles.make_lm(heads=4, kv_heads=2)


def held(model, policy, budget):
    """Positions in the cache at each eviction, by layer and head; the newest chunk's index last."""
    batch = oracles.make_batch(model.config, [72])

    def observe(acc, policy, view, evict):
        return acc, (view.cache.position_bks, view.chunk)

    call = jax.jit(replay.replay, static_argnums=(3, 5))
    position, chunk = call(model, batch, policy, Cadence(budget, 8), None, observe)[2]
    return np.asarray(position)[:, :, 0], np.asarray(chunk)[0].tolist()


def kept(position_yeks, chunks, layer, head):
    return {
        c: set(position_yeks[layer, e, head][position_yeks[layer, e, head] >= 0].tolist())
        for e, c in enumerate(chunks)
    }


def test_each_head_of_the_first_layer_keeps_what_its_budget_alone_would(model):
    """Whose inputs no eviction has changed yet."""
    inner = policies.get("keydiff")
    uneven = policies.Uneven(inner, budget_yk=jnp.asarray(BUDGETS), most=32)
    found = held(model, uneven, 16)
    for head, budget in enumerate(BUDGETS[0].tolist()):
        alone = kept(*held(model, inner, budget), 0, head)
        mine = kept(*found, 0, head)
        assert alone and {c: mine[c] for c in alone} == alone
    for layer, head in np.ndindex(2, 2):
        last = kept(*found, layer, head)
        assert max(map(len, last.values())) == BUDGETS[layer, head] + 8


def test_it_names_what_does_not_fit(model):
    cadence = Cadence(16, 8)
    for wrong in (jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 2))):
        with pytest.raises(UserError, match=r"uneven: budget_yk is .* whole numbers \[2, 2\]"):
            replay.check(policies.Uneven(budget_yk=wrong, most=32), model.config, cadence)
    with pytest.raises(UserError, match="uneven: policy"):
        policies.Uneven(policies.get("tova"), budget_yk=jnp.asarray(BUDGETS), most=32)
    with pytest.raises(UserError, match="needs budget_yk"):
        policies.get("uneven")


@pytest.mark.parametrize(
    ("budgets", "most", "protect_prompt", "message"),
    [
        ([[16, 40], [24, 16]], 32, 0, r"budget_yk\[0, 1\] = 40 is more than .*: give most=40"),
        ([[16, 32], [24, 16]], 1, 0, r"budget_yk\[0, 0\] = 16 is more than .*: give most=32"),
        ([[16, 32], [8, 16]], 32, 0, r"\[1, 0\] = 8 must be at least 9 at interval = 8: raise"),
        ([[16, 32], [-3, 16]], 32, 0, r"\[1, 0\] = -3 must be at least 9"),
        ([[16, 32], [24, 15]], 32, 8, r"15 must be at least 16 at .* and protect_prompt = 8"),
    ],
)
def test_budgets_that_would_be_cut_are_refused(model, budgets, most, protect_prompt, message):
    policy = policies.Uneven(budget_yk=jnp.asarray(budgets), most=most)
    with pytest.raises(UserError, match="uneven: .*" + message):
        replay.check(policy, model.config, Cadence(16, 8, protect_prompt))


def test_budgets_at_the_limits_are_taken(model):
    least = policies.Uneven(budget_yk=jnp.asarray([[9, 32], [16, 16]]), most=32)
    replay.check(least, model.config, Cadence(16, 8))
    beside = least.replace(budget_yk=jnp.full((2, 2), 16))
    replay.check(beside, model.config, Cadence(16, 8, 8))
