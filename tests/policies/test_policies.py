"""Every policy against its definition, with survivors in scrambled slots."""

import dataclasses
import functools
import itertools
import re

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fkv import policies
from fkv.cache import attention
from fkv.cache import slots as kv
from fkv.cache.cadence import Cadence
from fkv.engine import replay
from fkv.engine.batch import Batch
from fkv.errors import UserError
from fkv.evaluation import loss_ratio
from fkv.models import LM
from fkv.policies import expected_attention as expected
from fkv.policies import scorer
from fkv.policies.rkv import redundancy
from tests import oracles
from tests.policies import BY_NAME, WEIGHTED, weighted

DIM = 8
# (B, L, query heads, KV heads, empty slots): groups of 1, 2 and 4 heads, an interval that is
# shorter than the window of SnapKV, and a cache that is not full yet.
CONFIG, _ = oracles.make_model()
SIZES = [(24, 12, 4, 2, 0), (36, 12, 4, 1, 0), (16, 4, 2, 2, 0), (24, 12, 4, 2, 5)]


@functools.partial(jax.jit, static_argnames=("budget",))
def make_view(cache, query, query_position, random, budget):
    seen = attention.visible(query_position, cache.position_bks)
    lse = attention.attend(query, cache.key_bksd, cache.value_bksd, seen)[1]
    stats = attention.statistics(query, query_position, cache.key_bksd, cache.position_bks, lse)
    chunk, layer = jnp.int32(7), jnp.int32(0)
    cadence = Cadence(budget, query.shape[1])
    return policies.View(cache, query, query_position, chunk, random, stats, cadence, layer, CONFIG)


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
    arrived = np.random.default_rng(seed).normal(size=(2, rows, k, slots)).astype(np.float32)
    cache = kv.Cache(
        key.astype(np.float32),
        value.astype(np.float32),
        position.astype(np.int32),
        {
            "cumulative": sums[0],
            "decayed": sums[1],
            "arrived": {"score": arrived[0], "log_beta": -0.01 * np.exp(arrived[1])},
        },
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


@pytest.mark.parametrize("empty", [0, 40, 300])
def test_redundancy_is_found_block_by_block(empty):
    slots = 300  # three blocks of keys, the last one filled up
    rng = np.random.default_rng(empty)
    key = rng.normal(size=(1, 2, slots, DIM)) + 2 * rng.normal(size=(1, 2, 1, DIM))
    key[:, :, 7] = 0.0  # similar to nothing, itself included
    position = np.stack([rng.permutation(2 * slots)[:slots] for _ in range(2)])[None]
    position[..., rng.permutation(slots)[:empty]] = -1
    got = jax.jit(redundancy, static_argnums=0)(0.9, key, position)
    assert np.isfinite(np.asarray(got)).all() or empty == slots
    for head in range(2):
        held = np.flatnonzero(position[0, head] >= 0)
        held = held[np.argsort(position[0, head, held])]
        norm = np.linalg.norm(key[0, head, held], axis=-1, keepdims=True)
        unit = key[0, head, held] / np.maximum(norm, 1e-8)
        similar = unit @ unit.T
        np.fill_diagonal(similar, 0.0)
        for row in similar:
            above = np.flatnonzero(row > 0.9)
            row[above[-1] if len(above) else 0] = 0
        if empty < slots:
            want = oracles.softmax(similar.mean(0))
            np.testing.assert_allclose(np.asarray(got)[0, head, held], want, rtol=2e-5)


def knorm(state, interval):
    n = len(state.positions) - interval
    return state.positions[:n], -((state.keys[:n] ** 2).sum(1) ** 0.5)


def cosine(x, y):
    return x @ y / (x @ x) ** 0.5 / (y @ y) ** 0.5


def keydiff(state, interval):
    anchor = sum(key / (key @ key) ** 0.5 for key in state.keys) / len(state.keys)
    n = len(state.positions) - interval
    return state.positions[:n], np.array([-cosine(key, anchor) for key in state.keys[:n]])


def turn(x_d, angle_f):
    """Rotates the pairs (i, i + d / 2) of a vector: complex numbers times a unit."""
    low, high = np.split(x_d, 2)
    z = (low + 1j * high) * np.exp(1j * angle_f)
    return np.concatenate([z.real, z.imag])


def expected_attention(state, interval, horizon=512, sinks=4):
    frequencies, scale = CONFIG.inv_frequencies()
    assert scale == 1
    newest, group = state.query_positions[-1], state.queries.shape[1]
    ahead = np.exp(1j * np.outer(newest + 1 + np.arange(horizon), frequencies)).mean(0)
    expected = []
    for g in range(group):
        q = np.stack(
            [
                turn(turn(q, -p * frequencies), np.angle(ahead))
                * np.tile(abs(ahead), 2)  # the mean of rotations also shrinks
                for q, p in zip(state.queries[:, g], state.query_positions, strict=True)
            ]
        )
        mean, covariance = q.mean(0), np.cov(q.T, bias=True)
        x = [k @ mean / DIM**0.5 + k @ covariance @ k / DIM / 2 for k in state.keys]
        expected.append(oracles.softmax(np.where(state.positions < sinks, -np.inf, x)))
    score = np.mean(expected, axis=0) * np.linalg.norm(state.values, axis=1)
    n = len(state.positions) - interval
    return state.positions[:n], np.where(state.positions < sinks, 1e9, score)[:n]


def lagkv(state, interval, sinks=4, lag=0):
    lag, total = lag or interval, len(state.positions)
    score = 1e3 + np.arange(total)  # the rest: the oldest first, after those that compete
    score[:sinks] = 1e6 + np.arange(sinks)
    for start in range(sinks, total - 2 * lag + 1, lag):
        mine, following = slice(start, start + lag), slice(start + lag, start + 2 * lag)
        stands_out = np.zeros(lag)
        for x in (state.keys, state.values):
            low, high = x[following].min(0), x[following].max(0)
            stands_out += oracles.softmax(((x[mine] - low) / (high - low)).std(1, ddof=1)) / 2
        rank = [sum(other < one for other in stands_out) for one in stands_out]
        score[mine] = np.array(rank) + np.arange(start, start + lag) / total
    n = total - interval
    return state.positions[:n], score[:n]


DEFINITIONS = {
    "streaming_llm": (streaming_llm, {}),
    "streaming_llm, 1 sink": (streaming_llm, {"sinks": 1}),
    "h2o": (h2o, {}),
    "snapkv": (snapkv, {}),
    "snapkv, other sizes": (snapkv, {"window": 3, "kernel": 5}),
    "knorm": (knorm, {}),
    "keydiff": (keydiff, {}),
    "expected_attention": (expected_attention, {}),
    "expected_attention, other sizes": (expected_attention, {"horizon": 3, "sinks": 0}),
    "lagkv": (lagkv, {}),
    "lagkv, other sizes": (lagkv, {"sinks": 2, "lag": 5}),
    "rkv": (rkv, {}),
    "rkv, other sizes": (rkv, {"mix": 0.6, "window": 5, "kernel": 3, "threshold": 0.9}),
}


@jax.jit
def evict_positions(policy, view):
    return jnp.take_along_axis(view.cache.position_bks, policy.evict(view), axis=-1)


ALONE = {name: policies.get(d.__name__, **f) for name, (d, f) in DEFINITIONS.items()}
ALONE |= {name: policies.get(name) for name in ("random", "random:sinks=4", "tova")}
ALONE |= {name: policies.get(name) for name in ("vase", "vase_dkv")}


def one_layer(name, h, k):
    """A policy with weights, sliced to a layer of so many heads."""
    config, _ = oracles.make_model(heads=h, kv_heads=k)
    return jax.tree.map(lambda x: x[0], weighted(name, config))


@jax.jit
def evict_all(view):
    """What every policy drops: one program for all, which compiles sooner."""
    sizes = view.query_blhd.shape[2], view.cache.position_bks.shape[1]
    every = ALONE | {name: one_layer(name, *sizes) for name in WEIGHTED}
    return {name: evict_positions(policy, view) for name, policy in every.items()}


@functools.cache
def evicted(sizes):
    """A view, and what every policy drops from it."""
    view = random_view(3, 3, *sizes)
    return view, jax.device_get(evict_all(view))


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("sizes", SIZES)
def test_drops_what_its_definition_drops(name, sizes):
    _, interval, _, kv_heads, empty = sizes
    definition, fields = DEFINITIONS[name]
    view, evictions = evicted(sizes)
    evict = evictions[name]
    for row, head in np.ndindex(3, kv_heads):
        dropped = evict[row, head]
        assert (dropped[:empty] == -1).all()  # empty slots go before every entry
        positions, score = definition(state_of(view, row, head), interval, **fields)
        assert len(set(dropped[empty:].tolist())) == interval - empty
        assert oracles.is_lowest(dropped[empty:], positions, score)


def test_an_int8_cache_is_judged_by_the_numbers_it_stands_for():
    (_, _, h, kv_heads, _), rules = SIZES[0], scorer.ScorerConfig()
    view = random_view(3, 2, *SIZES[0])
    params = jax.tree.map(lambda x: x[0], scorer.init(jax.random.key(0), CONFIG, rules))
    known = [policies.get(name) for name in BY_NAME] + [policies.Foresight(params, rules)]
    known += [one_layer(name, h, kv_heads) for name in WEIGHTED]
    small = [kv.quantise(x) for x in (view.cache.key_bksd, view.cache.value_bksd)]
    numbers = [kv.dense(x) for x in small]
    small, numbers = (
        view.replace(cache=view.cache.replace(key_bksd=key, value_bksd=value))
        for key, value in (small, numbers)
    )

    @jax.jit  # one program for all, which compiles sooner
    def scores(*views):
        return [[policy.score(view) for view in views] for policy in known]

    for policy, (got, want) in zip(known, scores(small, numbers), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6, err_msg=repr(policy))


@pytest.mark.parametrize("sizes", SIZES)
def test_tova_drops_what_the_last_query_attends_to_least(sizes):
    budget, _, _, kv_heads, empty = sizes
    view = random_view(3, 3, *sizes)
    # One choice for the layer, so all its heads hold the same positions in the same slots.
    position = jnp.broadcast_to(view.cache.position_bks[:, :1], view.cache.position_bks.shape)
    view = view.replace(cache=view.cache.replace(position_bks=position))
    evict = np.asarray(evict_positions(policies.get("tova"), view))
    assert (evict == evict[:, :1]).all()
    for row in range(3):
        states = [state_of(view, row, head) for head in range(kv_heads)]
        score = np.mean([p for state in states for p in state.p[:, -1]], axis=0)
        n = budget - empty
        assert (evict[row, 0, :empty] == -1).all()
        assert oracles.is_lowest(evict[row, 0, empty:], states[0].positions[:n], score[:n])


def test_expected_attention_takes_a_scaled_rotation_once():
    # YaRN scales what it rotates: undoing and redoing it must not do so twice.
    plain, scaled = random_view(3, 2, *SIZES[0]), CONFIG
    yarn = (("rope_type", "yarn"), ("factor", 4.0), ("original_max_position_embeddings", 64))
    scaled = dataclasses.replace(CONFIG, rope_scaling=yarn)
    assert scaled.inv_frequencies()[1] > 1.1
    ahead = expected.future_queries(plain.replace(config=scaled), 1)
    # The newest query, one position on: its norm is as it was.
    np.testing.assert_allclose(
        np.linalg.norm(ahead, axis=-1), np.linalg.norm(plain.query_blhd, axis=-1), rtol=1e-4
    )


@pytest.mark.parametrize(
    ("inputs", "norm"), [("both", "rms"), ("attention", "none"), ("kv", "none")]
)
@pytest.mark.parametrize("sizes", [*SIZES[:2], SIZES[3]])
def test_foresight_drops_what_the_scorers_hold_least_important(inputs, norm, sizes):
    budget, _, h, kv_heads, empty = sizes
    view = random_view(4, 2, *sizes)
    config = scorer.ScorerConfig(inputs=inputs, norm=norm)
    columns = {"both": slice(None), "attention": slice(2 * DIM, None), "kv": slice(2 * DIM)}[inputs]
    size = {"both": 16 + 8 * h // kv_heads, "attention": 8 * h // kv_heads, "kv": 16}[inputs]
    rng = np.random.default_rng(0)
    shapes = {"w1": (size, 16), "b1": (16,), "w2": (16,), "b2": ()}
    params = {n: rng.normal(size=(kv_heads, *s)).astype(np.float32) for n, s in shapes.items()}
    policy = policies.get("foresight", params=params, config=config)
    evict = np.asarray(evict_positions(policy, view))
    for row, head in np.ndindex(2, kv_heads):
        state = state_of(view, row, head)
        feature = oracles.features(state, budget - empty)
        if norm == "rms":
            parts = np.split(feature, [DIM, 2 * DIM, *range(2 * DIM, size, h // kv_heads)[1:]], 1)
            feature = np.concatenate([x / np.sqrt((x**2).mean()) for x in parts], axis=1)
        score = oracles.mlp({n: x[None] for n, x in params.items()}, 0, head, feature[:, columns])
        dropped, positions = evict[row, head], state.positions[: budget - empty]
        assert (dropped[:empty] == -1).all()
        assert oracles.is_lowest(dropped[empty:], positions, score, tie=1e-4)


@pytest.mark.parametrize(
    ("definition", "fields"),
    [
        (snapkv, {"window": 8}),
        (rkv, {"window": 8, "mix": 0.9}),
        (expected_attention, {}),
        (h2o, {}),
        (keydiff, {}),
    ],
)
def test_padding_among_the_queries_counts_for_nothing(definition, fields):
    """As in the first chunk of a prompt: 5 of its 12 queries are real, and as many new entries."""
    view, real = random_view(6, 2, 24, 12, 4, 2, 0), 5
    at = view.query_position_bl.at[:, :-real].set(-1)
    position = view.cache.position_bks.at[..., 24:-real].set(-1)
    view = make_view(
        view.cache.replace(position_bks=position), view.query_blhd, at, view.random_b, 24
    )
    score = np.asarray(jax.jit(policies.get(definition.__name__, **fields).score)(view))
    fields = {**fields, "window": real} if "window" in fields else fields
    view = view.replace(
        query_blhd=view.query_blhd[:, -real:], query_position_bl=view.query_position_bl[:, -real:]
    )
    for row, head in np.ndindex(2, 2):
        positions, want = definition(state_of(view, row, head), real, **fields)
        slot_of = {at: slot for slot, at in enumerate(np.asarray(position[row, head]).tolist())}
        got = score[row, head, [slot_of[at] for at in positions.tolist()]]
        np.testing.assert_allclose(np.minimum(got, 1e9), want, rtol=1e-4)


def test_evictions_do_not_depend_on_what_is_in_front_of_a_prompt():
    """Of every policy, for prompts of every length modulo L, from the first eviction on."""
    budget, interval, real = 8, 4, 22
    residue, more = np.divmod(np.arange(2 * interval), 2)
    padding = residue + more * interval  # less than a chunk, and a chunk more
    rng = np.random.default_rng(0)
    token = rng.integers(CONFIG.vocab_size, size=(len(padding), real + 2 * interval))
    for row, start in zip(token, padding, strict=True):
        row[start : start + real] = token[0, :real]
    config, params = oracles.make_model()
    batch = Batch(
        jnp.asarray(token, jnp.int32),
        jnp.full(len(padding), real),
        jnp.zeros(len(padding), jnp.int32),
        jnp.asarray(padding),
    )
    known = [policies.get(name) for name in BY_NAME]
    known += [weighted(name, config) for name in WEIGHTED if "," not in name]
    known.append(policies.get("pyramid:window=2,beta=4"))  # small enough to be uneven
    known.append(policies.get("ada(h2o)"))
    for rules in (scorer.ScorerConfig(), scorer.ScorerConfig(norm="rms")):
        scorers = scorer.init(jax.random.key(0), config, rules)
        known += [policies.Foresight(scorers, rules, action) for action in ("top", "sample")]
    even = [policy for policy in known if loss_ratio.shares(policy, Cadence(budget, interval))]
    alone = [policy for policy in known if not loss_ratio.shares(policy, Cadence(budget, interval))]
    assert len(alone) == 6 and len(even) > 10

    @jax.jit
    def run(lm, batch, even, alone):
        keys = jnp.broadcast_to(jax.random.key(1), batch.padding_b.shape)

        def replayed(policy, observe):
            return replay.replay(lm, batch, policy, Cadence(budget, interval), keys, observe)[2]

        def watch(acc, policy, view, evict):
            position = view.cache.position_bks
            order = jnp.argsort(position, axis=-1)
            return acc, [
                jnp.take_along_axis(x, at, axis=-1)
                for one in policy.watchers
                for x, at in ((position, one.evict(view)), (one.importance(view), order))
            ]

        def held(acc, policy, view, evict):
            return acc, view.cache.position_bks

        found = replayed(loss_ratio.Watched(even[0], tuple(even)), watch)
        return found[::2], found[1::2], [replayed(policy, held) for policy in alone]

    dropped, importance, held = run(LM(params, config), batch, even, alone)
    for policy, x in zip(even, importance, strict=True):
        np.testing.assert_allclose(
            x[:, :-1, ::2], x[:, 1:, 1::2], rtol=1e-5, atol=1e-6, err_msg=repr(policy)
        )
    for policy, position in zip([*even, *alone], [*dropped, *held], strict=True):
        position = np.sort(position, axis=-1)  # [layers, evictions, b, k, l or s]
        assert (position[:, :6, ::2] >= 0).any(-1).any()
        np.testing.assert_array_equal(
            position[:, :-1, ::2], position[:, 1:, 1::2], err_msg=repr(policy)
        )


def constant_scorers(view, importance_bkn, **fields):
    """A policy whose scorers give exactly this (the first row's) importance, by one key channel."""
    kv_heads = view.cache.key_bksd.shape[1]
    key = view.cache.key_bksd.at[:, :, : view.capacity, 0].set(importance_bkn)
    # GELU of something large is the thing itself.
    w1 = jnp.zeros((kv_heads, 2 * DIM, 16)).at[:, 0, 0].set(1.0)
    b1 = jnp.zeros((kv_heads, 16)).at[:, 0].set(50.0)
    w2 = jnp.zeros((kv_heads, 16)).at[:, 0].set(1.0)
    params = {"w1": w1, "b1": b1, "w2": w2, "b2": jnp.full(kv_heads, -50.0)}
    policy = policies.get("foresight", params=params, config=scorer.ScorerConfig(inputs="kv"))
    return policy.replace(**fields), view.replace(cache=view.cache.replace(key_bksd=key))


def inclusion(weight_n, draws):
    """How likely each is among the first `draws` without replacement, by every order of drawing."""
    share = np.zeros(len(weight_n))
    for order in itertools.permutations(range(len(weight_n)), draws):
        p, left = 1.0, sum(weight_n)
        for i in order:
            p, left = p * weight_n[i] / left, left - weight_n[i]
        share[list(order)] += p
    return share


def test_foresight_samples_without_replacement_from_the_least_important():
    budget, interval, *_ = sizes = (12, 3, 2, 1, 0)
    view = random_view(12, 1, *sizes)
    rng, draws = np.random.default_rng(1), 4000
    importance = rng.permutation(np.linspace(-1, 4, budget)).astype(np.float32)
    policy, view = constant_scorers(view, importance[None, None], action="sample")
    np.testing.assert_allclose(
        policy.replace(action="top").score(view)[0, 0, :budget], importance, atol=1e-5
    )
    slots = jax.jit(jax.vmap(lambda key: policy.evict(view.replace(random_b=key))))(
        jax.random.split(jax.random.key(0), (draws, 1))
    )
    assert (np.diff(np.sort(slots[:, 0, 0])) > 0).all()
    count = np.bincount(np.asarray(slots).ravel(), minlength=budget + interval)
    pool = np.argsort(importance)[: 2 * interval]
    p = np.zeros(budget + interval)
    p[pool] = inclusion(np.exp(-importance[pool].astype(np.float64)), interval)
    np.testing.assert_allclose(p.sum(), interval)
    assert (count[p == 0] == 0).all()
    assert (abs(count - draws * p) <= 5 * (draws * p * (1 - p)) ** 0.5).all()
    top = np.asarray(policy.replace(action="top").evict(view))[0, 0]
    assert sorted(top) == sorted(np.argsort(importance)[:interval])
    with pytest.raises(UserError, match="action = 'best' must be one of top, sample, multinomial"):
        policy.replace(action="best")


def test_foresight_sample_takes_empty_slots_first():
    *_, empty = sizes = SIZES[3]
    view = random_view(13, 2, *sizes)
    policy, view = constant_scorers(view, view.cache.key_bksd[:, :, :24, 0], action="sample")
    evict = np.asarray(evict_positions(policy, view))
    assert (evict[..., :empty] == -1).all() and (evict[..., empty:] >= 0).all()


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


def test_random_keeps_as_many_sinks_as_it_is_told():
    """The others are drawn as without sinks."""
    budget, interval, *_ = sizes = SIZES[0]
    view = random_view(8, 2, *sizes)
    position = np.asarray(view.cache.position_bks)
    drawn = np.asarray(policies.get("random").score(view))
    drop = np.asarray(evict_positions(policies.get("random:sinks=9"), view))
    assert (position[..., :budget] < 9).any()
    for row, head in np.ndindex(*position.shape[:2]):
        free = [s for s in range(budget) if position[row, head, s] >= 9]
        lowest = sorted(free, key=lambda s: drawn[row, head, s])[:interval]
        assert set(drop[row, head]) == set(position[row, head, lowest])


@functools.cache
def evicted_by_row():
    """What every policy drops from three rows, and from each of them alone."""
    view = random_view(9, 3, *SIZES[0])
    rows = [jax.tree.map(lambda x, r=r: x[r : r + 1] if x.ndim else x, view) for r in range(3)]
    return jax.device_get((evict_all(view), [evict_all(row) for row in rows]))


@pytest.mark.parametrize("name", [*ALONE, *WEIGHTED])
def test_rows_are_independent_of_the_batch(name):
    together, alone = evicted_by_row()
    for row in range(3):
        np.testing.assert_array_equal(alone[row][name][0], together[name][row])


def test_padding_is_no_trouble():
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
    for name, evict in jax.device_get(evict_all(view)).items():
        assert (evict == -1).all(), name


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
        "tova",
        "pyramid",
        "ada",
        *(d.__name__ for d, _ in DEFINITIONS.values()),
    } <= {*policies.names()}
    assert not policies.get("full").evicts
    assert all(policies.get(n).evicts for n in ("h2o", "rkv", "snapkv", "streaming_llm", "random"))
    with pytest.raises(
        UserError, match=re.escape(f"'h3o' is not known; choose from {', '.join(policies.names())}")
    ):
        policies.get("h3o")
    with pytest.raises(UserError, match=r"'snapkv' has no field widow; it has window, kernel"):
        policies.get("snapkv", widow=8)
    with pytest.raises(UserError, match=r"'h2o' has no field a, b; it has none"):
        policies.get("h2o", b=1, a=2)
    with pytest.raises(UserError, match=r"'foresight' needs params, config"):
        policies.get("foresight")
    with pytest.raises(UserError, match="registered twice"):
        policies.register("h2o")(policies.TOVA)
    assert policies.get("rkv", mix=0.3).mix == 0.3


def test_fields_may_be_given_as_text():
    policy = policies.get("rkv:mix=0.5,kernel=1")
    assert policy == policies.RKV(mix=0.5, kernel=1) and isinstance(policy.kernel, int)
    assert policies.get("rkv: window = 4", mix=0.2) == policies.RKV(window=4, mix=0.2)
    assert policies.get("h2o:") == policies.H2O()
    with pytest.raises(UserError, match="'rkv': 'mix' must be of the form field=number"):
        policies.get("rkv:mix")
    with pytest.raises(UserError, match="'rkv': 'mix=x' must be of the form field=number"):
        policies.get("rkv:kernel=1,mix=x")
    with pytest.raises(
        UserError, match="'rkv' has no field mixx; it has window, kernel, mean, mix"
    ):
        policies.get("rkv:mixx=1")
    with pytest.raises(UserError, match="'r-kv' is not known; choose from"):
        policies.get("r-kv:mix=1")


def test_tree_structures_tell_policies_apart():
    """Equal structures would let JAX run a program that was compiled for another policy."""
    config, _ = oracles.make_model()
    rules = scorer.ScorerConfig()
    found = [
        policies.get("full"),
        *map(policies.get, BY_NAME),
        *(weighted(name, config) for name in WEIGHTED if "," not in name),
        policies.Foresight(scorer.init(jax.random.key(0), config, rules), rules),
        policies.Forced(jnp.zeros((2, 1, 1, 2, 4), jnp.int32)),
    ]

    @flax.struct.dataclass
    class Mine(policies.Policy):
        pass

    @flax.struct.dataclass
    class Yours(policies.Policy):
        pass

    for one, other in itertools.combinations([*found, Mine(), Yours()], 2):
        assert jax.tree.structure(one) != jax.tree.structure(other), (one, other)
    assert jax.tree.structure(Mine()) == jax.tree.structure(Mine())
    assert "kind" not in repr(Mine())
    with pytest.raises(UserError, match="'h2o' has no field kind; it has none"):
        policies.get("h2o:kind=1")
