"""Replay begins in one pass up to the first eviction, which several replays can share."""

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from fkv import policies
from fkv.cache.cadence import Cadence
from fkv.engine import beginnings, replay
from fkv.engine.batch import Batch
from fkv.evaluation import loss_ratio
from fkv.learning import golden
from fkv.learning.tokens import token_losses
from fkv.policies import scorer
from tests import oracles
from tests.learning.test_golden import assert_linear, memory
from tests.policies import BY_NAME

BUDGET, INTERVAL = 24, 12
CADENCE = Cadence(BUDGET, INTERVAL)
# No multiple of L, one token after an eviction, an eviction at the very end (twice), B, and less.
LENGTHS = [95, 61, 60, 37, 36, 24, 10]
UNEVEN = ["ada", "pyramid", "threshold", "ada(sample)", "ada(pyramid(h2o))"]
EVEN = sorted({*BY_NAME} - {*UNEVEN})
EVEN += ["sample", "golden"]


golden_policy = jax.jit(golden.policy, static_argnums=2)
begin = jax.jit(beginnings.begin, static_argnums=3)  # op by op it would compile dozens


def policy_of(name, lm, batch):
    if name == "golden":
        return golden_policy(lm, batch, CADENCE)[0]
    if name == "ada(sample)":
        return policies.Ada(policy_of("sample", lm, batch))
    if name in ("sample", "reference"):
        rules = scorer.ScorerConfig(form="reference" if name == "reference" else "windowed")
        params = scorer.init(jax.random.key(3), lm.config, rules)
        return policies.Foresight(params, rules, "top" if name == "reference" else "sample")
    return policies.get(name)


def look(acc, policy, view, evict):
    """What an eviction is decided by, where slots are held, and what is dropped."""
    position = view.cache.position_bks
    of_slots = (view.key_bksd, view.value_bksd, view.cache.entry, view.statistics)
    of_slots = jax.tree.map(lambda x: jnp.where(position[..., None] >= 0, x, 0), of_slots)
    at = view.query_position_bl
    query = jnp.where(at[..., None, None] >= 0, view.query_blhd, 0)
    dropped = jnp.take_along_axis(position, evict, axis=-1)
    of_rows = (position, dropped, of_slots, query, at, jax.random.key_data(view.random_b))
    return acc + 1, (of_rows, view.eviction, view.chunk)


@functools.partial(jax.jit, static_argnums=4)
def ways(policy, lm, batch, key_b, whole):
    """Chunk by chunk, from a beginning that is shared, and maybe with that of `replay` itself."""
    slow = oracles.replay_by_chunks(lm, batch, policy, CADENCE, key_b, look)
    begun = beginnings.begin(lm, batch, policy, CADENCE)
    shared = beginnings.replay_from(lm, batch, begun, policy, key_b, look, 0)
    fast = [replay.replay(lm, batch, policy, CADENCE, key_b, look, 0)] if whole else []
    return slow, begun, shared, fast


def check(policy, lm, batch, whole=False):
    """They agree in hidden states, and in all that an observer sees while a row has tokens.

    Args:
      whole: with `replay.replay`, too, which is made of the same parts: compiling takes the time.
    """
    key_b = replay.row_keys(jax.random.key(5), len(batch.length_b))
    (hidden, want), begun, shared, fast = ways(policy, lm, batch, key_b, whole)
    real = np.asarray(batch.position_bt) >= 0
    continued = np.concatenate([begun.hidden_btm, shared[0][:, 1:]], axis=1)
    np.testing.assert_array_equal(shared[0][:, 0], begun.hidden_btm[:, -1])
    for ours in (continued, *(x[0] for x in fast)):
        np.testing.assert_allclose(ours[real], hidden[real], atol=5e-5)
    for _, count, (of_rows, eviction, chunk) in (shared, *fast):
        np.testing.assert_array_equal(eviction, want[1])
        np.testing.assert_array_equal(chunk, want[2])
        assert (count == eviction.shape[1]).all()
        ends = batch.padding_b + batch.length_b
        live = np.asarray(ends)[None] > (np.asarray(chunk)[0][:, None] + 1) * INTERVAL
        for ours, theirs in zip(jax.tree.leaves(of_rows), jax.tree.leaves(want[0]), strict=True):
            ours, theirs = np.asarray(ours)[:, live], np.asarray(theirs)[:, live]
            if np.issubdtype(ours.dtype, np.floating):
                np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=5e-5)
            else:
                np.testing.assert_array_equal(ours, theirs)
    return eviction.shape[1]


def batch_of(lm, lengths, padding=None, width=0):
    """Traces without a token twice, which would tie in the first layer for some policies."""
    rng, padding = np.random.default_rng(0), padding or [0] * len(lengths)
    width = max(width, *(n + p for n, p in zip(lengths, padding, strict=True)))
    token = rng.integers(lm.config.vocab_size, size=(len(lengths), width), dtype=np.int32)
    for row, n, p in zip(token, lengths, padding, strict=True):
        row[p : p + n] = rng.permutation(lm.config.vocab_size)[:n]
    prompt = np.zeros(len(lengths), np.int32)
    return Batch(jnp.asarray(token), np.array(lengths), prompt, np.array(padding))


@functools.cache
def model(cache_dtype="", **fields):
    lm = oracles.make_lm(vocab_size=101, **fields)
    return lm.replace(config=dataclasses.replace(lm.config, cache_dtype=cache_dtype))


@functools.cache
def every(names):
    return tuple(policy_of(name, model(), batch_of(model(), LENGTHS)) for name in names)


def among(name, *names, layers=2):
    """A policy as one of several, all in one program, if it is one of them."""
    if name not in names:
        return policy_of(name, model(), None)
    return loss_ratio.OneOf(every(names), jnp.full(layers, names.index(name)))


@pytest.mark.parametrize("name", EVEN)
def test_a_beginning_in_one_pass_is_that_chunk_by_chunk(name):
    assert check(among(name, *EVEN), model(), batch_of(model(), LENGTHS), whole=True) == 5


@pytest.mark.parametrize("name", [*UNEVEN, "reference", "knorm"])  # one without statistics, too
def test_a_beginning_of_a_policy_alone_is_that_chunk_by_chunk(name):
    lm = model()
    batch = batch_of(lm, LENGTHS)
    evictions = check(policy_of(name, lm, batch), lm, batch, whole=name in ("ada", "reference"))
    assert evictions == (7 if name in UNEVEN else 5)


@pytest.mark.parametrize("name", ["h2o", "random", "ada(h2o)"])
def test_an_int8_cache_begins_quantised(name):
    # One layer: after it, a number that rounding puts one step off is passed on.
    lm = model("int8", layers=1)
    batch, policy = batch_of(lm, LENGTHS), among(name, "h2o", "random", layers=1)
    check(policy, lm, batch)
    rounded, exact = (begin(x, batch, policy, CADENCE).hidden_btm for x in (lm, model(layers=1)))
    assert 1e-3 < abs(rounded - exact).max() < 0.1


# A multiple of L; all that comes before the first eviction, in even heads or not; and less.
@pytest.mark.parametrize(
    ("name", "width"),
    [("golden", 72), ("golden", 36), ("golden", 30), ("golden", 5), ("ada", 12), ("ada", 5)],
)
def test_a_batch_of_any_width_begins(name, width):
    batch = batch_of(model(), [min(n, width) for n in LENGTHS[2:]], width=width)
    evictions = check(policy_of(name, model(), batch), model(), batch)
    assert evictions == max(0, -(-width // INTERVAL) - (1 if name in UNEVEN else 3))


@pytest.mark.parametrize("name", ["snapkv", "sample", "ada(h2o)"])
def test_padding_in_front_leaves_the_slots_that_chunks_would(name):
    # Less than a chunk, whole chunks, both, all but the ring, and more than the beginning.
    padding = [5, 12, 17, 26, 31, 40, 0]
    batch = batch_of(model(), [60, 61, 50, 50, 40, 30, 3], padding)
    check(policy_of(name, model(), batch), model(), batch)


@jax.jit
def together(lm, batch, rows, policy, key_b):
    begun = beginnings.begin(lm, batch, policy, CADENCE)
    return beginnings.replay_from(lm, rows, begun, policy, key_b, look, 0)


losses_of = jax.jit(token_losses)


@jax.jit
def alone(lm, rows, policy, key_b):
    return replay.replay(lm, rows, policy, CADENCE, key_b, look, 0)


@pytest.mark.parametrize("name", ["h2o", "sample", "ada"])
def test_rows_that_share_a_beginning_are_those_alone(name):
    lm, copies = model(), 3
    batch, policy = batch_of(lm, LENGTHS[:3]), among(name, "h2o", "sample")
    rows = jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), batch)
    key_b = replay.row_keys(jax.random.key(5), len(rows.length_b))

    hidden, _, seen = together(lm, batch, rows, policy, key_b)
    want, _, want_seen = alone(lm, rows, policy, key_b)
    first = hidden.shape[1]
    real = np.asarray(rows.position_bt)[:, -first:] >= 0
    np.testing.assert_allclose(hidden[real], want[:, -first:][real], atol=5e-5)
    dropped, want_dropped = seen[0][1], want_seen[0][1]
    np.testing.assert_array_equal(dropped[:, :, :copies], want_dropped[:, :, :copies])
    of_trace = np.asarray(dropped)[0, -1, :copies, 0]
    assert (len({tuple(sorted(x)) for x in of_trace.tolist()}) > 1) == (name == "sample")

    losses = losses_of(lm, hidden, rows.token_bt[:, -first:]).nll_bt
    all_losses = losses_of(lm, want, rows.token_bt).nll_bt
    counted = rows.counted_bt(CADENCE.first_evicting_token)
    assert not counted[:, : 1 - first].any() and counted.sum() == copies * (59 + 25 + 24)
    counted = counted[:, 1 - first :]
    np.testing.assert_allclose(losses[counted], all_losses[:, 1 - first :][counted], atol=1e-4)


def test_rows_must_be_copies_of_the_traces():
    lm = model()
    begun = begin(lm, batch_of(lm, [40, 40]), policies.get("h2o"), CADENCE)
    with pytest.raises(ValueError, match="3 rows are not a multiple of the 2 traces"):
        beginnings.replay_from(lm, batch_of(lm, [40] * 3), begun, policies.get("h2o"))


def test_one_beginning_serves_policies_with_and_without_statistics():
    lm = model()
    batch = batch_of(lm, LENGTHS)
    begun = begin(lm, batch, policies.get("h2o"), CADENCE)

    @jax.jit
    def both(policy):
        hidden, _, _ = beginnings.replay_from(lm, batch, begun, policy)
        return hidden, replay.replay(lm, batch, policy, CADENCE)[0]

    for name in ("h2o", "knorm", "sample"):
        hidden, want = both(policy_of(name, lm, batch))
        real = batch.position_bt[:, -hidden.shape[1] :] >= 0
        np.testing.assert_allclose(hidden[real], want[:, -hidden.shape[1] :][real], atol=5e-5)


@pytest.mark.parametrize(("cache_dtype", "width"), [("", 95), ("", 40), ("", 30), ("int8", 95)])
def test_the_golden_pass_gives_the_beginning_of_replays(cache_dtype, width):
    lm, policy = model(cache_dtype, layers=1 if cache_dtype else 2), policies.get("h2o")
    batch = batch_of(lm, [width, width])  # the padding of a shorter row attends to anything

    @jax.jit
    def both(lm, batch):
        return (
            golden.policy_and_beginning(lm, batch, CADENCE, policy),
            (*golden.policy(lm, batch, CADENCE), beginnings.begin(lm, batch, policy, CADENCE)),
        )

    got, want = both(lm, batch)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=5e-5)


def test_a_chooser_takes_the_place_of_the_policys_choice():
    lm = model()
    batch, other = batch_of(lm, LENGTHS), policies.get("streaming_llm")

    def act(acc, policy, view):
        slots = other.evict(view)
        return acc + 1, slots, jnp.take_along_axis(view.cache.position_bks, slots, axis=-1)

    @jax.jit
    def both(lm, batch):
        chosen = replay.Chooser(act)
        ours = replay.replay(lm, batch, policies.get("h2o"), CADENCE, observe=chosen, acc=0)
        return ours, replay.replay(lm, batch, other, CADENCE, observe=look, acc=0)

    (hidden, count, dropped), (want, _, seen) = both(lm, batch)
    np.testing.assert_allclose(hidden, want, atol=1e-6)
    np.testing.assert_array_equal(dropped, seen[0][1])
    assert count.tolist() == [5, 5]


# ---- what it costs


def shapes(jaxpr):
    """Of everything that is computed, in loops too."""
    for equation in jaxpr.eqns:
        yield from (x.aval.shape for x in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from shapes(inner)


@pytest.mark.parametrize("copies", [2, 5])
def test_the_beginning_is_computed_once_per_trace(copies):
    lm, policy, t = model(), policies.get("h2o"), 60
    batch = batch_of(lm, [t] * 2)
    rows = jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), batch)

    def run(lm, batch, rows):
        begun = beginnings.begin(lm, batch, policy, CADENCE)
        return beginnings.replay_from(lm, rows, begun, policy)[0]

    def wide(rows):
        """Hidden states, queries and logits of a beginning, or of a whole trace, of these rows."""
        width = lm.config.width
        sizes = {(width, CADENCE.slots), (width, t), (CADENCE.slots, width), (t, width)}
        heads = {(n, lm.config.heads, lm.config.head_dim) for n in (CADENCE.slots, t)}
        return {x for x in found if x[:1] == (rows,) and (x[1:] in sizes or x[1:] in heads)}

    found = set(shapes(jax.make_jaxpr(run)(lm, batch, rows).jaxpr))
    assert wide(2) and not wide(2 * copies)

    def flops(copies):
        rows = jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), batch)
        return jax.jit(run).lower(lm, batch, rows).compile().cost_analysis()["flops"]

    # The compiler counts a loop's body once: the two scans over layers, and one of the chunks.
    per_row = (flops(copies) - flops(1)) / (copies - 1)
    assert per_row < 0.6 * flops(1)


def test_memory_is_linear_in_the_length():
    lm = oracles.make_lm(heads=2, kv_heads=1)
    policy = policies.get("h2o")

    def at(t):
        def call(lm, batch, rows):
            begun = beginnings.begin(lm, batch, policy, Cadence(16, 8))
            return beginnings.replay_from(lm, rows, begun, policy)[0]

        one, two = (Batch.of(jnp.zeros((b, t), jnp.int32), jnp.full(b, t)) for b in (1, 2))
        return memory(call, lm, one, two)

    assert_linear([(t, at(t)) for t in (4096, 8192)], 8)


@jax.jit
def continued(lm, context, rows, policy, key_c, key_b):
    begun = beginnings.begin(lm, context, policy, CADENCE)
    ended = beginnings.go_on(lm, context, begun, policy, key_c)
    shared = beginnings.replay_from(lm, rows, ended, policy, key_b)[0]
    return ended.hidden_btm, shared, replay.replay(lm, rows, policy, CADENCE, key_b)[0]


@pytest.mark.parametrize("name", ["h2o", "random", "tova", "ada"])
def test_continuations_share_the_context_and_what_was_evicted_in_it(name):
    lm, repeats, width, after = model(), 3, 60, 14
    # Left-padded contexts, of which the shortest fits into the cache.
    context = batch_of(lm, [60, 47, 30], [0, 13, 30])
    rng = np.random.default_rng(3)
    tail = rng.integers(lm.config.vocab_size, size=(3 * repeats, after), dtype=np.int32)
    token = np.concatenate([np.repeat(context.token_bt, repeats, 0), tail], axis=1)
    padding = np.repeat(context.padding_b, repeats)
    length = width - padding + np.tile([14, 9, 1], 3)
    rows = Batch(jnp.asarray(token), length, np.zeros_like(length), padding)
    policy, key_c = among(name, "h2o", "random", "tova"), replay.row_keys(jax.random.key(5), 3)
    key_b = jnp.repeat(key_c, repeats)

    ended, shared, alone = continued(lm, context, rows, policy, key_c, key_b)
    real = np.asarray(rows.position_bt) >= 0
    begun, later = real[::repeats, :width], real[:, width:]
    np.testing.assert_allclose(ended[begun], alone[::repeats, :width][begun], atol=5e-5)
    np.testing.assert_allclose(shared[:, 1:][later], alone[:, width:][later], atol=5e-5)
    np.testing.assert_array_equal(shared[::repeats, 0], ended[:, -1])


def test_a_beginning_that_goes_on_ends_with_an_interval():
    lm, batch = model(), batch_of(model(), [61])
    policy = policies.get("knorm")
    begun = begin(lm, batch, policy, CADENCE)
    with pytest.raises(ValueError, match="61 tokens"):
        beginnings.go_on(lm, batch, begun, policy)
    short = batch_of(lm, [36])  # not longer than the beginning
    begun = begin(lm, short, policy, CADENCE)
    assert beginnings.go_on(lm, short, begun, policy) is begun
