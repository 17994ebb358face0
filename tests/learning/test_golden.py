import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fkv.cache import attention
from fkv.cache.cadence import Cadence
from fkv.engine.batch import Batch
from fkv.learning import golden
from fkv.models import LM
from tests import oracles

# T a multiple of L, not a multiple, the shortest with an eviction, L = 1, and rows that end early.
CASES = {
    "multiple of L": dict(lengths=[48], budget=16, interval=8, h=4, k=2),
    "no multiple of L": dict(lengths=[47, 45], budget=16, interval=8, h=4, k=2),
    "T = B + L + 1": dict(lengths=[17], budget=12, interval=4, h=2, k=2),
    "T = B + 2L": dict(lengths=[20], budget=12, interval=4, h=2, k=1),
    "T = B + 2L + 1": dict(lengths=[21], budget=12, interval=4, h=2, k=1),
    "interval 1": dict(lengths=[15], budget=6, interval=1, h=4, k=1),
    "prompts are kept": dict(
        lengths=[61, 45, 50, 61, 30],
        budget=16,
        interval=4,
        h=4,
        k=2,
        protect=7,
        prompts=[7, 0, 3, 40, 12],
    ),
    "all but an interval is kept": dict(
        lengths=[45, 45], budget=16, interval=8, h=2, k=1, protect=8, prompts=[9, 4]
    ),
    "rows of different lengths": dict(
        lengths=[61, 40, 33, 25, 24, 9], budget=16, interval=8, h=4, k=2
    ),
}


def from_block_scores(score_xtj, length_x, cadence, at_once=1):
    """Golden evictions from a table of block scores, over any leading axes at once.

    Args:
      score_xtj: block scores [..., T, ceil(T / L)], leading axes such as (layers, b, k).
      length_x: tokens of each sequence, broadcast to the leading axes.

    Returns:
      Labels whose (b, k) axes are replaced by the leading axes.
    """
    lead, (t, j), interval = score_xtj.shape[:-2], score_xtj.shape[-2:], cadence.interval
    future = golden.suffix_max(score_xtj).reshape(-1, 1, t, j)
    future = jnp.pad(future, ((0, 0), (0, 0), (0, -t % interval + cadence.slots), (0, 0)))
    length = jnp.broadcast_to(length_x, lead).reshape(-1)

    def rows(chunk, count):
        start, size = chunk * interval, count * interval
        return jax.lax.dynamic_slice_in_dim(future, start, size, axis=2)

    labels = golden.search(rows, length, j, cadence, at_once)
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0], *lead, *x.shape[3:]),
        labels,
    )


def compare(labels, row, head, want, budget, interval):
    """One row and head of labels [e, b, k, ...] against the oracle's evictions."""
    got = jax.tree.map(lambda x: np.asarray(x)[:, row], labels)
    assert got.valid_eb.tolist() == [e < len(want) for e in range(len(got.valid_eb))]
    for event, (candidates, alpha, drop) in enumerate(want):
        position = got.candidate_position_ebkn[event, head]
        assert sorted(position.tolist()) == candidates
        order = np.argsort(position)
        np.testing.assert_allclose(
            got.future_score_ebkn[event, head][order], alpha, atol=1e-6, err_msg=str(event)
        )
        assert got.evict_position_ebkl[event, head].tolist() == drop


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_from_attention_is_brute_force(case):
    rng = np.random.default_rng(1)
    b, t = len(case["lengths"]), max(case["lengths"])
    budget, interval, h, k = (case[name] for name in ("budget", "interval", "h", "k"))
    q = 2 * rng.normal(size=(b, t, h, 8)).astype(np.float32)
    key, value = rng.normal(size=(2, b, t, k, 8)).astype(np.float32)
    length = np.array(case["lengths"])
    position = np.where(np.arange(t)[None] < length[:, None], np.arange(t)[None], -1)

    cadence = Cadence(budget, interval, case.get("protect", 0))
    prompt = np.array(case.get("prompts", [0] * b))

    def search(q, key, value, position, queries):
        _, lse = attention.full_attention(q, key, value, position)
        return golden.from_attention(q, key, lse, position, cadence, queries, prompt)

    search = jax.jit(search, static_argnums=4)
    labels = search(q, key, value, position, 4096)
    assert len(labels.valid_eb) == Cadence(budget, interval).evictions(t) > 0
    for row, n in enumerate(case["lengths"]):
        rows = [x[row, :n].astype(np.float64) for x in (q, key, value)]
        score = oracles.block_scores(oracles.full_attention(*rows)[1], k, interval)
        for head in range(k):
            kept = min(prompt[row], cadence.protect_prompt)
            want = oracles.golden(score[head], budget, interval, kept)
            assert len(want) == Cadence(budget, interval).evictions(n)
            compare(labels, row, head, want, budget, interval)

    if t > 40:  # several slabs of queries, and a number of blocks that they do not divide
        slabs = search(q, key, value, position, 3 * interval)
        for one, two in zip(jax.tree.leaves(slabs), jax.tree.leaves(labels), strict=True):
            np.testing.assert_allclose(one, two, atol=1e-6)


def test_sums_by_product_are_sums():
    # With a later key that overflows: what its own block gets may be anything, but no other block.
    rng = np.random.default_rng(0)
    q, key = rng.normal(size=(2, 2, 3 * 4, 8)), rng.normal(size=(2, 2, 5, 8))
    lse = 5 + rng.normal(size=(2, 2, 3, 4))
    lse[:, :, 0], lse[0, 0, 2, 3] = -200, 1e30
    arrays = [x.astype(np.float32) for x in (q, lse, key)]
    want, got = golden._sums(*arrays), golden._sums_by_product(*arrays)
    assert np.isinf(want[:, :, 0]).all()
    np.testing.assert_allclose(got[:, :, 1:], want[:, :, 1:], rtol=1e-5)


@pytest.mark.parametrize("at_once", [1, 2, 4])
@pytest.mark.parametrize(("t", "budget", "interval"), [(48, 16, 8), (45, 16, 8), (17, 12, 4)])
def test_from_block_scores_is_brute_force(t, budget, interval, at_once):
    lead = (2, 3, 2)  # layers, batch, KV heads
    rng = np.random.default_rng(t)
    score = rng.random((*lead, t, -(-t // interval)), dtype=np.float32)
    labels = jax.jit(from_block_scores, static_argnums=(2, 3))(
        score, np.array(t), Cadence(budget, interval), at_once
    )
    for index in np.ndindex(lead):
        want = oracles.golden(score[index], budget, interval)
        assert len(labels.valid_eb) == len(want) == Cadence(budget, interval).evictions(t)
        one = jax.tree.map(lambda x, i=index: np.asarray(x)[(slice(None), *i)], labels)
        assert one.valid_eb.all()
        for event, (candidates, alpha, drop) in enumerate(want):
            order = np.argsort(one.candidate_position_ebkn[event])
            assert one.candidate_position_ebkn[event][order].tolist() == candidates
            np.testing.assert_array_equal(one.future_score_ebkn[event][order], alpha)
            assert one.evict_position_ebkl[event].tolist() == drop


def test_from_block_scores_of_rows_that_end_early():
    lengths = np.array([45, 26, 24])  # the last has no eviction that a token follows
    rng = np.random.default_rng(0)
    score = rng.random((3, 45, 6), dtype=np.float32)
    for row, n in enumerate(lengths):
        score[row, :, -(-n // 8) :] = 0
    labels = from_block_scores(score, lengths, Cadence(16, 8))
    labels = jax.tree.map(lambda x: x[:, :, None] if x.ndim > 2 else x, labels)
    for row, n in enumerate(lengths):
        compare(labels, row, 0, oracles.golden(score[row, :n], 16, 8), 16, 8)


def test_of_equal_scores_the_oldest_go_first():
    # No candidate is ever looked at again: the lowest slots go, and they hold the oldest entries.
    labels = from_block_scores(np.zeros((32, 8), np.float32), np.array(32), Cadence(12, 4))
    assert labels.evict_position_ebkl[0].tolist() == [0, 1, 2, 3]
    assert (np.asarray(labels.future_score_ebkn) == 0).all()


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_golden_policy_is_brute_force(family):
    config, params = oracles.make_model(family, heads=4, kv_heads=2)
    token, length = oracles.make_tokens(config, [61, 42])
    policy, labels, hidden = jax.jit(golden.policy, static_argnums=2)(
        LM(params, config), Batch.of(token, length), Cadence(16, 8)
    )
    np.testing.assert_array_equal(policy.position_yebkl, labels.evict_position_ebkl)
    for row, n in enumerate(length.tolist()):
        want_hidden, _ = oracles.full(config, params, token[row, :n])
        np.testing.assert_allclose(hidden[row, :n], want_hidden, atol=2e-5)
        events = oracles.golden_of_model(config, params, token[row, :n], 16, 8)
        for layer, head in np.ndindex(config.layers, config.kv_heads):
            one = jax.tree.map(lambda x, i=layer: x[i], labels)
            compare(one, row, head, events[layer][head], 16, 8)


def test_number_of_evictions():
    for budget, interval in [(12, 4), (3, 1), (32, 16)]:
        for length in range(1, 100):
            # An eviction happens with B + L held, then every L tokens; a token must follow.
            due = range(budget + interval, length, interval)
            assert Cadence(budget, interval).evictions(length) == len(due)


def memory(function, *args):
    """Bytes that a compiled program needs beside its inputs, and its largest array's elements."""
    compiled = jax.jit(function).lower(*args).compile()
    stats = compiled.memory_analysis()
    shapes = re.findall(r"\b(?:f|s|u|pred|bf)\d*\[([\d,]+)\]", compiled.as_text())
    largest = max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes)
    return stats.temp_size_in_bytes + stats.output_size_in_bytes, largest


def assert_linear(measured, interval):
    """Given memory(T) for doubling T: it at most doubles, and nothing is as large as T * T / L."""
    for (_, (small, _)), (_, (large, _)) in itertools.pairwise(measured):
        assert large < 2.2 * small, measured
    t, (_, largest) = measured[-1]
    assert largest < t * t / interval, measured


def test_memory_of_from_attention_is_linear_in_the_length():
    def at(t, **queries):
        search = functools.partial(golden.from_attention, cadence=Cadence(16, 8), **queries)
        q, key = jnp.zeros((1, t, 8, 4)), jnp.zeros((1, t, 1, 4))
        return memory(search, q, key, jnp.zeros((1, 1, 8, t)), jnp.zeros((1, t), jnp.int32))

    measured = [(t, at(t)) for t in (1024, 2048, 4096, 8192)]
    assert_linear(measured, 8)
    (_, at_once), (_, in_slabs) = measured[0][1], at(1024, queries=64)
    assert in_slabs < 0.8 * at_once


def test_memory_of_golden_policy_is_linear_in_the_length():
    config, params = oracles.make_model(heads=2, kv_heads=1)

    def at(t):
        def run(lm, token, length):
            return golden.policy(lm, Batch.of(token, length), Cadence(16, 8))

        return memory(run, LM(params, config), jnp.zeros((1, t), jnp.int32), jnp.array([t]))

    assert_linear([(t, at(t)) for t in (1024, 2048, 4096, 8192)], 8)
