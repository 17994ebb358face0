"""Every policy against its definition, with survivors in scrambled slots."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fkv import attention, policies, scorer
from fkv import cache as kv
from fkv.errors import UserError
from tests import oracles

DIM = 8
# (B, L, query heads, KV heads, empty slots): groups of 1, 2 and 4 heads, an interval that is
# shorter than the window of SnapKV, and a cache that is not full yet.
SIZES = [(24, 12, 4, 2, 0), (36, 12, 4, 1, 0), (16, 4, 2, 2, 0), (24, 12, 4, 2, 5)]


@functools.partial(jax.jit, static_argnames=("budget",))
def make_view(cache, query, query_position, random, budget):
    stats = attention.statistics(query, query_position, cache.key_bksd, cache.position_bks)
    return policies.View(cache, query, query_position, jnp.int32(7), random, stats, budget)


def random_view(seed, rows, budget, interval, h, k, empty):
    """An eviction's view: kept entries in no order, the newest L in order, some slots empty."""
    rng = np.random.default_rng(seed)
    slots, start = budget + interval, 2 * budget
    kept = [[rng.permutation(start)[:budget] for _ in range(k)] for _ in range(rows)]
    position = np.full((rows, k, slots), -1)
    position[..., :budget] = kept
    position[..., budget:] = np.arange(start, start + interval)
    for row, head in np.ndindex(rows, k):
        position[row, head, rng.permutation(budget)[:empty]] = -1
    # Keys in clusters: some are alike, some like no other.
    centre = rng.normal(size=(5, DIM))[rng.integers(5, size=(rows, k, slots))]
    key = centre + rng.normal(size=(rows, k, slots, DIM)) * rng.random((rows, k, slots, 1)) * 2
    value = rng.normal(size=(rows, k, slots, DIM))
    sums = rng.random((2, rows, k, slots, h // k), dtype=np.float32)
    cache = kv.Cache(
        key.astype(np.float32),
        value.astype(np.float32),
        position.astype(np.int32),
        {"cumulative": sums[0], "decayed": sums[1]},
    )
    query = 2 * rng.normal(size=(rows, interval, h, DIM)).astype(np.float32)
    query_position = np.broadcast_to(np.arange(start, start + interval), (rows, interval))
    random = jax.random.split(jax.random.key(seed), rows)
    return make_view(cache, query, query_position, random, budget)


def state_of(view, row, head):
    """One group of a view as the oracles see it, in the order of positions."""
    cache = jax.tree.map(lambda x: np.asarray(x[row, head]), view.cache)
    order = [s for s in np.argsort(cache.position_bks) if cache.position_bks[s] >= 0]
    kv_heads = view.cache.position_bks.shape[1]
    group = view.query_blhd.shape[2] // kv_heads
    queries = np.asarray(view.query_blhd[row, :, head * group : (head + 1) * group], np.float64)
    positions, keys = cache.position_bks[order], cache.key_bksd[order].astype(np.float64)
    query_positions = np.asarray(view.query_position_bl[row])
    return oracles.State(
        positions=positions,
        keys=keys,
        values=cache.value_bksd[order].astype(np.float64),
        queries=queries,
        query_positions=query_positions,
        p=np.stack(
            [
                oracles.probabilities(queries[:, g], keys, query_positions, positions)
                for g in range(group)
            ]
        ),
        cumulative=cache.entry["cumulative"][order],
        decayed=cache.entry["decayed"][order],
    )


# ---- the definitions: state -> candidates and their scores, the lowest go


def streaming_llm(state, interval, sinks=4):
    n = len(state.positions) - interval
    return state.positions[:n], np.where(state.positions < sinks, 1e9, state.positions)[:n]


def h2o(state, interval):
    n = len(state.positions) - interval
    return state.positions[:n], state.cumulative[:n].mean(1)


def observed(state, window, kernel):
    """SnapKV's pooled score of the entries before the window."""
    x = np.einsum("qgd,nd->gqn", state.queries[-window:], state.keys) / DIM**0.5
    p = oracles.softmax(x.max(0)[:, :-window]).mean(0)
    side = kernel // 2
    return np.array([p[max(0, i - side) : i + side + 1].max() for i in range(len(p))])


def snapkv(state, interval, window=8, kernel=7):
    window = min(window, interval)
    return state.positions[:-window], observed(state, window, kernel)


def rkv(state, interval, mix=0.1, window=8, kernel=7, threshold=0.5):
    window, n = min(window, interval), len(state.keys)
    similar = np.zeros((n, n))
    for i, j in np.ndindex(n, n):
        if i != j:
            norms = np.linalg.norm(state.keys[i]) * np.linalg.norm(state.keys[j])
            similar[i, j] = state.keys[i] @ state.keys[j] / norms
    for row in similar:
        above = np.flatnonzero(row > threshold)
        row[above[-1] if len(above) else 0] = 0
    redundancy = oracles.softmax(similar.mean(0))[:-window]
    score = mix * observed(state, window, kernel) - (1 - mix) * redundancy
    return state.positions[:-window], score


DEFINITIONS = {
    "streaming_llm": (streaming_llm, {}),
    "streaming_llm, 1 sink": (streaming_llm, {"sinks": 1}),
    "h2o": (h2o, {}),
    "snapkv": (snapkv, {}),
    "snapkv, other sizes": (snapkv, {"window": 3, "kernel": 5}),
    "rkv": (rkv, {}),
    "rkv, other sizes": (rkv, {"mix": 0.6, "window": 5, "kernel": 3, "threshold": 0.9}),
}


@jax.jit
def evict_positions(policy, view):
    return jnp.take_along_axis(view.cache.position_bks, policy.evict(view), axis=-1)


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("sizes", SIZES)
def test_drops_what_its_definition_drops(name, sizes):
    _, interval, _, kv_heads, empty = sizes
    definition, fields = DEFINITIONS[name]
    policy = policies.get(definition.__name__, **fields)
    view = random_view(3, 3, *sizes)
    evict = np.asarray(evict_positions(policy, view))
    for row, head in np.ndindex(3, kv_heads):
        dropped = evict[row, head]
        assert (dropped[:empty] == -1).all()  # empty slots go before every entry
        positions, score = definition(state_of(view, row, head), interval, **fields)
        assert len(set(dropped[empty:].tolist())) == interval - empty
        assert oracles.is_lowest(dropped[empty:], positions, score)


@pytest.mark.parametrize("inputs", ["both", "attention", "kv"])
@pytest.mark.parametrize("sizes", SIZES[:2])
def test_foresight_drops_what_the_scorers_hold_least_important(inputs, sizes):
    budget, _, h, kv_heads, _ = sizes
    view = random_view(4, 2, *sizes)
    config = scorer.ScorerConfig(inputs=inputs)
    columns = {"both": slice(None), "attention": slice(2 * DIM, None), "kv": slice(2 * DIM)}[inputs]
    size = {"both": 16 + 8 * h // kv_heads, "attention": 8 * h // kv_heads, "kv": 16}[inputs]
    rng = np.random.default_rng(0)
    shapes = {"w1": (size, 16), "b1": (16,), "w2": (16,), "b2": ()}
    params = {n: rng.normal(size=(kv_heads, *s)).astype(np.float32) for n, s in shapes.items()}
    policy = policies.get("foresight", params=params, config=config)
    evict = np.asarray(evict_positions(policy, view))
    for row, head in np.ndindex(2, kv_heads):
        state = state_of(view, row, head)
        feature = oracles.features(state, budget)[:, columns]
        score = oracles.mlp({n: x[None] for n, x in params.items()}, 0, head, feature)
        assert oracles.is_lowest(evict[row, head], state.positions[:budget], score, tie=1e-4)


def test_forced_drops_the_listed_positions():
    budget, interval, _, kv_heads, _ = sizes = SIZES[0]
    view = random_view(5, 2, *sizes)  # chunk 7: event 7 - B / L = 5
    rng = np.random.default_rng(0)
    listed = np.full((6, 2, kv_heads, interval), -2)
    kept = np.asarray(view.cache.position_bks)[..., :budget]
    listed[5] = rng.permuted(kept, axis=-1)[..., :interval]
    policy = policies.get("forced", position_yebkl=listed)  # of one layer
    np.testing.assert_array_equal(
        np.sort(evict_positions(policy, view)), np.sort(listed[5]), strict=False
    )
    # Beyond the list, the lowest slots go.
    for few in (listed[:5], listed[:0]):
        evict = evict_positions(policies.get("forced", position_yebkl=few), view)
        np.testing.assert_array_equal(evict, kept[..., :interval])


def test_random_depends_on_the_key_of_the_row_alone():
    policy, sizes = policies.get("random"), SIZES[0]
    evict = jax.jit(lambda policy, view: policy.evict(view))
    view, other = random_view(6, 3, *sizes), random_view(7, 3, *sizes)
    one = np.asarray(evict(policy, view))
    np.testing.assert_array_equal(evict(policy, other.replace(random_b=view.random_b)), one)
    np.testing.assert_array_equal(
        evict(policy, view.replace(random_b=view.random_b[::-1]))[::-1], one
    )
    drawn = {tuple(sorted(x)) for x in one.reshape(-1, sizes[1]).tolist()}
    assert len(drawn) == one.shape[0] * one.shape[1]  # rows and heads draw apart


def test_random_is_uniform_over_the_candidates():
    budget, interval, _, kv_heads, _ = sizes = SIZES[2]
    view = random_view(8, 2, *sizes)
    slots = jax.jit(jax.vmap(lambda key: policies.get("random").evict(view.replace(random_b=key))))(
        jax.random.split(jax.random.key(0), (1000, 2))
    )
    count = np.bincount(np.asarray(slots).ravel(), minlength=budget + interval)
    mean = 1000 * 2 * kv_heads * interval / budget
    assert (count[budget:] == 0).all()
    assert (abs(count[:budget] - mean) < 5 * mean**0.5).all()


ALONE = {name: policies.get(d.__name__, **f) for name, (d, f) in DEFINITIONS.items()}
ALONE["random"] = policies.get("random")


@pytest.mark.parametrize("name", ALONE)
def test_rows_are_independent_of_the_batch(name):
    view = random_view(9, 3, *SIZES[0])
    together = np.asarray(evict_positions(ALONE[name], view))
    for row in range(3):
        alone = jax.tree.map(lambda x, r=row: x[r : r + 1] if x.ndim else x, view)
        np.testing.assert_array_equal(evict_positions(ALONE[name], alone)[0], together[row])


@pytest.mark.parametrize("name", ["streaming_llm", "h2o", "snapkv", "rkv", "random"])
def test_padding_is_no_trouble(name):
    # A row that ended holds fewer entries and gets queries that are padding: empty slots go.
    budget, interval, *_ = sizes = SIZES[0]
    view = random_view(10, 2, *sizes)
    position = np.array(view.cache.position_bks)
    position[0, :, :4] = position[0, :, budget:] = -1
    position[1] = -1  # a row without a single token
    query_position = np.full((2, interval), -1)
    view = view.replace(
        cache=view.cache.replace(position_bks=position), query_position_bl=query_position
    )
    assert (np.asarray(evict_positions(policies.get(name), view)) == -1).all()


def test_the_newest_are_protected():
    view = random_view(11, 1, *SIZES[0])

    class Backwards(policies.Policy):
        def score(self, view):
            return -view.cache.position_bks.astype(jnp.float32)

    evict = np.asarray(evict_positions.__wrapped__(Backwards(), view))
    kept = np.sort(np.asarray(view.cache.position_bks)[..., :24], axis=-1)
    np.testing.assert_array_equal(np.sort(evict), kept[..., -12:])


def test_the_registry_knows_the_names():
    assert policies.names() == sorted(policies.names())
    assert {
        "full",
        "foresight",
        "forced",
        "random",
        *(d.__name__ for d, _ in DEFINITIONS.values()),
    } <= {*policies.names()}
    assert not policies.get("full").evicts
    assert all(policies.get(n).evicts for n in ("h2o", "rkv", "snapkv", "streaming_llm", "random"))
    with pytest.raises(
        UserError, match=re.escape(f"'h3o' is not known; known are {', '.join(policies.names())}")
    ):
        policies.get("h3o")
    with pytest.raises(UserError, match=r"'snapkv' has no field widow; it has window, kernel"):
        policies.get("snapkv", widow=8)
    with pytest.raises(UserError, match=r"'h2o' has no field a, b; it has none"):
        policies.get("h2o", b=1, a=2)
    with pytest.raises(UserError, match=r"'foresight' needs params, config"):
        policies.get("foresight")
    with pytest.raises(ValueError, match="registered twice"):
        policies.register("h2o")(policies.H2O)
    assert policies.get("rkv", mix=0.3).mix == 0.3
