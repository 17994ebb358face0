"""Replay against the numpy oracles, that rows do not meet, and what observers see."""

import dataclasses
import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fkv import policies
from fkv.cache.cadence import Cadence
from fkv.engine import replay
from fkv.engine.batch import Batch
from fkv.errors import UserError
from fkv.evaluation import loss_ratio
from fkv.learning import golden
from fkv.learning.tokens import low_entropy, token_losses
from fkv.models import LM
from fkv.policies import scorer
from tests import oracles
from tests.learning.test_golden import assert_linear, memory
from tests.policies.test_policies import h2o, rkv, snapkv, streaming_llm

BUDGET, INTERVAL = 24, 12
CADENCE = Cadence(BUDGET, INTERVAL)
# No multiple of L, one token after an eviction, an eviction at the very end (twice), and none.
LENGTHS = [95, 61, 60, 36, 10]
# (family, query heads, KV heads): groups of 1, 2 and 4.
MODELS = [("qwen2", 2, 2), ("qwen3", 4, 2), ("qwen2", 4, 1)]


def run(policy, observe=replay.ignore, acc=()):
    """Compiled replay; the golden evictions of the batch take the place of policy `golden`."""

    @jax.jit
    def call(lm, batch, key_b=None):
        rule = policy
        if policy == "golden":
            rule, _, _ = golden.policy(lm, batch, CADENCE)
        return replay.replay(lm, batch, rule, CADENCE, key_b, observe, acc)

    return call


def golden_evict(events, interval):
    """What the oracle drops; nothing sees what goes after the last token."""

    def evict(layer, head, state):
        known = events[layer][head]
        if state.event < len(known):
            return known[state.event][2]
        return state.positions[:interval]

    return evict


@pytest.mark.parametrize("model", MODELS)
def test_golden_evictions_are_those_of_the_oracle(model):
    config, params = oracles.make_model(*model)
    token, length = oracles.make_tokens(config, LENGTHS)
    calls = lambda acc, *_: (acc + 1, ())  # noqa: E731
    call = run("golden", calls, jnp.int32(0))
    hidden, count, _ = call(LM(params, config), Batch.of(token, length))
    assert count.tolist() == [5] * config.layers  # one for each that a token attends after
    for row, n in enumerate(LENGTHS):
        events = oracles.golden_of_model(config, params, token[row, :n], BUDGET, INTERVAL)
        evict = golden_evict(events, INTERVAL)
        want = oracles.replay(config, params, token[row, :n], BUDGET, INTERVAL, evict)
        np.testing.assert_allclose(hidden[row, :n], want, atol=2e-5)
        full, _ = oracles.full(config, params, token[row, :n])
        first = min(n, BUDGET + INTERVAL)
        np.testing.assert_allclose(hidden[row, :first], full[:first], atol=2e-5)
        assert n == first or abs(hidden[row, first:n] - full[first:]).max() > 0.01


def dropped(acc, policy, view, evict):
    return acc, jnp.take_along_axis(view.cache.position_bks, evict, axis=-1)


@functools.cache
def together(names, config):
    """Policies in one program, of which one decides: compiling takes the time."""
    some = tuple(policy_of(name, config) for name in names)

    @jax.jit
    def call(index, lm, batch, key_b=None):
        policy = loss_ratio.OneOf(some, jnp.full(config.layers, index))
        return replay.replay(lm, batch, policy, CADENCE, key_b, dropped)

    return call


def call_of(name, names, config):
    return functools.partial(together(names, config), names.index(name))


DEFINITIONS = (h2o, snapkv, rkv, streaming_llm)


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("model", MODELS)
def test_replay_under_a_policy_is_its_definition(model, definition):
    config, params = oracles.make_model(*model)
    token, length = oracles.make_tokens(config, LENGTHS)
    names = tuple(x.__name__ for x in DEFINITIONS if model != MODELS[1] or x == definition)
    call = call_of(definition.__name__, names, config)
    hidden, _, gone = call(LM(params, config), Batch.of(token, length))
    gone, evictions = np.asarray(gone), 0
    for row, n in enumerate(LENGTHS):

        def evict(layer, head, state, row=row):
            # Max-pooling makes ties, so the oracle follows any choice that the definition allows.
            nonlocal evictions
            evictions += 1
            chosen = gone[layer, state.event, row, head]
            assert oracles.is_lowest(chosen, *definition(state, INTERVAL), tie=1e-5)
            return chosen

        want = oracles.replay(config, params, token[row, :n], BUDGET, INTERVAL, evict)
        np.testing.assert_allclose(hidden[row, :n], want, atol=2e-5)
    assert evictions == (5 + 3 + 3 + 1) * config.layers * config.kv_heads


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_full_is_plain_attention(family):
    config, params = oracles.make_model(family)
    token, length = oracles.make_tokens(config, LENGTHS)

    def never(*_):
        raise AssertionError("nothing is evicted")

    call = run(policies.get("full"), never, 7)
    hidden, acc, seen = call(LM(params, config), Batch.of(token, length))
    assert acc.tolist() == [7] * config.layers and seen == ()
    for row, n in enumerate(LENGTHS):
        want, _ = oracles.full(config, params, token[row, :n])
        np.testing.assert_allclose(hidden[row, :n], want, atol=2e-5)


def test_the_full_cache_in_int8_is_an_int8_cache_that_holds_everything():
    # One layer: after it, a number that rounding puts one step off is passed on.
    exact = oracles.make_lm(layers=1)
    small = exact.replace(config=dataclasses.replace(exact.config, cache_dtype="int8"))
    batch, cadence = oracles.make_batch(exact.config, LENGTHS), Cadence(96, INTERVAL)
    call = jax.jit(replay.replay, static_argnums=3)
    full, held, unrounded = (
        call(lm, batch, policies.get(name), cadence)[0]
        for lm, name in ((small, "full"), (small, "snapkv"), (exact, "full"))
    )
    for row, n in enumerate(LENGTHS):
        np.testing.assert_allclose(held[row, :n], full[row, :n], atol=2e-5)
        assert 1e-3 < abs(full[row, :n] - unrounded[row, :n]).max() < 0.1


def test_labels_and_the_full_pass_beside_them_know_nothing_of_the_cache():
    config, params = oracles.make_model()
    batch = oracles.make_batch(config, LENGTHS)

    def program(cache_dtype):
        lm = LM(params, dataclasses.replace(config, cache_dtype=cache_dtype))
        return str(jax.make_jaxpr(functools.partial(golden.policy, cadence=CADENCE))(lm, batch))

    assert program("") == program("int8")


def policy_of(name, config):
    if name == "golden":
        return name
    if name == "foresight":
        rules = scorer.ScorerConfig()
        return policies.Foresight(scorer.init(jax.random.key(3), config, rules), rules)
    return policies.get(name)


@pytest.mark.parametrize("name", ["snapkv", "random", "foresight", "golden"])
def test_rows_are_independent_of_the_batch(name):
    config, params = oracles.make_model()
    token, length = oracles.make_tokens(config, LENGTHS)
    other, _ = oracles.make_tokens(config, LENGTHS, seed=1)
    keys, other_keys = (replay.row_keys(jax.random.key(i), len(LENGTHS)) for i in (5, 6))
    lm, names = LM(params, config), ("snapkv", "random", "foresight")
    call = call_of(name, names, config) if name in names else run(name)
    hidden, _, _ = call(lm, Batch.of(token, length), keys)

    for row, n in enumerate(LENGTHS):
        own = (jnp.arange(len(LENGTHS)) == row)[:, None]
        own_token = own & (jnp.arange(token.shape[1]) < n)[None]
        mixed = jnp.where(own_token, token, other)  # other neighbours, other padding
        lengths = jnp.where(own[:, 0], length, jnp.array([20, 95, 40, 61, 59]))
        mixed_keys = jnp.where(own[:, 0], keys, other_keys)
        again, _, _ = call(lm, Batch.of(mixed, lengths), mixed_keys)
        np.testing.assert_array_equal(again[row, :n], hidden[row, :n])

    # Alone, some with an interval of padding in front. Other shapes are multiplied in another
    # order, so not to the last bit.
    for row, n in list(enumerate(LENGTHS))[1:]:
        pad = INTERVAL * (row % 2) if name != "golden" else 0
        one, own = slice(row, row + 1), slice(pad, pad + n)
        own_token = jnp.zeros((1, INTERVAL + LENGTHS[1]), jnp.int32).at[0, own].set(token[row, :n])
        batch = Batch(own_token, length[one], jnp.array([0]), jnp.array([pad]))
        alone, _, _ = call(lm, batch, keys[one])
        np.testing.assert_allclose(alone[0, own], hidden[row, :n], atol=1e-5)


def test_random_draws_anew_for_every_row_layer_head_and_eviction():
    config, params = oracles.make_model()
    batch = oracles.make_batch(config, [96, 96])
    call = run(policies.get("random"), lambda acc, policy, view, evict: (acc, evict))
    slots = np.sort(call(LM(params, config), batch)[2])
    drawn = np.unique(slots.reshape(-1, INTERVAL), axis=0)
    assert len(drawn) == slots[..., 0].size == config.layers * 5 * 2 * config.kv_heads


@pytest.mark.parametrize(
    ("t", "block"), [(30, 512), (30, 29), (30, 30), (30, 28), (30, 7), (30, 1), (2, 4)]
)
@pytest.mark.parametrize("tied", [False, True])
def test_token_losses_are_plain_log_softmax(t, block, tied):
    config, params = oracles.make_model(tied_embeddings=tied)
    token, _ = oracles.make_tokens(config, [t, t, t])
    hidden = 3 * np.random.default_rng(t).normal(size=(3, t, config.width)).astype(np.float32)
    losses = jax.jit(token_losses, static_argnums=3)(LM(params, config), hidden, token, block)
    assert losses.nll_bt.shape == losses.entropy_bt.shape == (3, t - 1)
    for row in range(3):
        log_p = oracles.log_probabilities(config, params, hidden[row])[:-1]
        nll = -log_p[np.arange(t - 1), token[row, 1:]]
        np.testing.assert_allclose(losses.nll_bt[row], nll, rtol=1e-5, atol=1e-5)
        entropy = -(np.exp(log_p) * log_p).sum(-1)
        np.testing.assert_allclose(losses.entropy_bt[row], entropy, rtol=1e-5, atol=1e-5)


def test_token_losses_hold_one_block_of_logits():
    lm = oracles.make_lm()

    def losses(lm, hidden, token):
        return token_losses(lm, hidden, token, 64)

    config = lm.config
    hidden = jnp.zeros((1, 4096, config.width))
    _, largest = memory(losses, lm, hidden, jnp.zeros((1, 4096), jnp.int32))
    assert largest <= 4096 * config.width < 4096 * config.vocab_size


@pytest.mark.parametrize("name", ["snapkv", "foresight"])
def test_memory_is_linear_in_the_length(name):
    lm = oracles.make_lm(heads=2, kv_heads=1)
    policy = policy_of(name, lm.config)

    def at(t):
        def call(lm, batch):
            return replay.replay(lm, batch, policy, Cadence(16, 8))[0]

        return memory(call, lm, Batch.of(jnp.zeros((1, t), jnp.int32), jnp.array([t])))

    assert_linear([(t, at(t)) for t in (4096, 8192)], 8)


def test_refuses_batches_without_an_eviction():
    replay.check_lengths([3, 37], CADENCE)
    with pytest.raises(UserError, match=r"longest trace has 36 tokens, .* = 36; use longer"):
        replay.check_lengths([3, 36], CADENCE)


@pytest.mark.parametrize(("form", "model"), [("windowed", MODELS[1]), ("reference", MODELS[2])])
def test_an_observer_sees_the_features_of_the_definition(form, model):
    budget, interval, lengths = 80, 40, [250, 160, 130, 90]  # more than 32 queries an interval
    config, params = oracles.make_model(*model)
    token, length = oracles.make_tokens(config, lengths)
    rules = scorer.ScorerConfig(form=form)

    def look(acc, policy, view, evict):
        feature = scorer.features(rules, view)
        return acc, (view.cache.position_bks, feature, view.cumulative_bksg, view.decayed_bksg)

    @jax.jit
    def call(lm, batch):
        cadence = Cadence(budget, interval)
        policy, _, _ = golden.policy(lm, batch, cadence)
        policy = policies.Forced(policy.position_yebkl, form)
        return replay.replay(lm, batch, policy, cadence, observe=look)[2]

    seen = jax.device_get(call(LM(params, config), Batch.of(token, length)))
    evictions = 0
    for row, n in enumerate(lengths):
        events = oracles.golden_of_model(config, params, token[row, :n], budget, interval)
        evict, states = golden_evict(events, interval), []

        def keep(layer, head, state, evict=evict, states=states):
            states.append((layer, head, state))
            return evict(layer, head, state)

        oracles.replay(config, params, token[row, :n], budget, interval, keep)
        for layer, head, state in states:
            index = layer, state.event, row, head
            position, feature, cumulative, decayed = (x[index] for x in seen)
            order = np.argsort(position)
            np.testing.assert_array_equal(position[order], state.positions)
            np.testing.assert_array_equal(order[budget:], np.arange(budget, budget + interval))
            np.testing.assert_allclose(cumulative[order], state.cumulative, rtol=1e-4)
            np.testing.assert_allclose(decayed[order], state.decayed, rtol=1e-4)
            entry, sums = np.split(feature[order[:budget]], [2 * config.head_dim], axis=1)
            want = np.split(oracles.features(state, budget, form), [2 * config.head_dim], axis=1)
            np.testing.assert_allclose(entry, want[0], atol=2e-5)
            np.testing.assert_allclose(sums, want[1], rtol=1e-4)  # minima are tiny
            evictions += 1
    assert evictions == (4 + 2 + 1) * config.layers * config.kv_heads


@pytest.mark.parametrize("fraction", ["0", "0.1", "0.2", "0.25", "0.29", "0.7", "0.99"])
def test_low_entropy_is_all_but_the_highest_fraction_of_the_counted(fraction):
    """As many as the decimal says, 1 of 5 at 0.2; among equal entropies the earlier is high."""
    rng = np.random.default_rng(0)
    # Every number of counted tokens up to 100, anywhere in the row; many entropies are equal.
    entropy = (rng.integers(40, size=(101, 120)) / 7).astype(np.float32)
    entropy[:, ::3] = 0.0
    counted = np.argsort(rng.random((101, 120)), axis=1) < np.arange(101)[:, None]
    in_numpy = low_entropy(entropy, counted, float(fraction))
    for got in (in_numpy, jax.jit(low_entropy, static_argnums=2)(
        jnp.asarray(entropy), jnp.asarray(counted), 1 - float(1 - Fraction(fraction))
    )):  # fmt: skip
        for row in range(101):
            index = np.flatnonzero(counted[row])
            largest_first = sorted(index, key=lambda i: -entropy[row, i])
            low = largest_first[int(Fraction(fraction) * len(index)) :]
            assert np.flatnonzero(got[row]).tolist() == sorted(low)
