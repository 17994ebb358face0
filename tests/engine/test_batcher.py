"""Rows that come and go answer as they do alone, to the bit; nothing is copied, nothing is lost."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fkv import models, policies
from fkv.engine import reading, replay, requests
from fkv.engine.batch import Batch
from fkv.engine.batcher import Batcher, Request
from fkv.engine.sampling import Sampling
from fkv.errors import UserError
from tests.engine.test_steps import (
    BUDGET,
    CADENCE,
    in_one_program,
    model,
    policy_of,
    random_prompts,
    with_config,
)  # fmt: skip

# Of several pieces, shorter than a chunk, a whole number of chunks, a single token.
LENGTHS = [61, 5, 24, 31, 1, 48, 13]
PROMPTS = random_prompts(LENGTHS, seed=3)
LIMITS = [20, 3, 30, 13, 25, 1, 40]
HOW = [
    Sampling(0.8, 12, 0.9), Sampling(0.0), Sampling(1.0), Sampling(1.2, 0, 0.7),
    Sampling(1.0, 0, 1.0, 0.1), Sampling(0.9, 5), Sampling(0.7, 30, 0.95, 0.02),
]  # fmt: skip
KEYS = jax.random.split(jax.random.key(5), len(LENGTHS))
REQUESTS = [
    Request(PROMPTS[i], KEYS[i], LIMITS[i], HOW[i], logprobs=i % 3) for i in range(len(LENGTHS))
]


def make(policy, rows=3, cache_dtype="", **more):
    lm = with_config(model(), cache_dtype=cache_dtype)
    return Batcher(lm, policy, CADENCE, rows, 120, piece=24, **{"top": 2} | more)


def run(batch, requests, count=None, later=(), cancel=None):
    """Events of each request, joined; `later` ones are submitted one a step.

    Args:
      cancel: index of a request, and the step before which it is cancelled.
    """
    later, ids, found, n = list(later), [], {}, 0

    def submit(i):
        ids.append((batch.submit(REQUESTS[i]), i))

    for i in requests:
        submit(i)
    while batch.waiting or batch.live or later:
        if later:
            submit(later.pop(0))
        if cancel and cancel[1] == n:
            batch.cancel(dict(map(reversed, ids))[cancel[0]])
        for event in batch.step(count):
            found.setdefault(dict(ids)[event.id], []).append(event)
        n += 1
        assert n < 200 and batch.live + batch.idle == len(batch._rows)
    assert batch.step() == []
    return {i: joined(events) for i, events in found.items()}


def joined(events):
    assert all(event.finish is None for event in events[:-1]) and events[-1].finish
    join = lambda name: np.concatenate([getattr(x, name) for x in events])  # noqa: E731
    top = None
    if events[0].top is not None:
        top = [np.concatenate([x.top[i] for x in events]).tolist() for i in (0, 1)]
    last = events[-1]
    return join("tokens").tolist(), join("logprobs").tolist(), top, last.finish, last.evictions


ORDERS = [
    {"requests": range(7)},
    {"requests": [6, 4, 2, 0, 5, 3, 1], "count": 5},
    {"requests": [3], "later": [0, 1, 6, 2, 4, 5], "count": 8},
]


@functools.cache
def alone(name, cache_dtype=""):
    """Each request in a batcher that has nothing else."""
    policy = policy_of(name) if cache_dtype else in_one_program(name)
    batch = make(policy, cache_dtype=cache_dtype)
    found = {}
    for i in range(len(REQUESTS)):
        found |= run(batch, [i])
    return found


@pytest.mark.parametrize(
    ("name", "cache_dtype"),
    [
        *((x, "") for x in ("full", "h2o", "random", "foresight", "ada(foresight)")),
        ("random", "int8"),
    ],
)
def test_answers_are_those_alone(name, cache_dtype):
    policy = policy_of(name) if cache_dtype else in_one_program(name)
    want = alone(name, cache_dtype)
    assert [len(want[i][0]) for i in range(7)] == LIMITS
    for order in ORDERS:
        assert run(make(policy, cache_dtype=cache_dtype), **order) == want
    # A request that is cut off, at every stage of its life, disturbs nobody, and frees its row.
    for at in (1, 2):
        found = run(make(policy, cache_dtype=cache_dtype), range(7), count=8, cancel=(0, at))
        tokens, _, _, finish, _ = found.pop(0)
        assert finish == "cancelled" and tokens == want[0][0][: len(tokens)]
        assert found == {i: x for i, x in want.items() if i}


@pytest.mark.parametrize("name", ["full", "ada(foresight)"])
def test_prompts_that_are_read_together_answer_as_alone(name, monkeypatch):
    lengths, limits = [5, 20, 1, 12, 8, 3, 11, 15, 7, 2, 9], [14, 3, 1, 30, 13, 25, 2, 1, 40, 8, 20]
    prompts, keys = random_prompts(lengths, seed=8), jax.random.split(jax.random.key(6), 11)
    requests, read = [*zip(prompts, keys, limits, strict=True)], []
    original = reading.embed
    monkeypatch.setattr(
        reading, "embed", lambda lm, token: read.append(token.shape) or original(lm, token)
    )

    def answers(ids, cancelled=None):
        batch = Batcher(model(), in_one_program(name), CADENCE, 11, 60, piece=96, top=2)
        for i in ids:
            batch.submit(Request(*requests[i], HOW[i % 7], logprobs=2, keep=i == 2))
        batch._read()
        if cancelled is not None:  # read, and not placed yet
            batch.cancel(cancelled)
        found = collect(batch)
        if 2 in ids:  # ended by the first token; the cache is its own
            (kept,) = (x[-1].kept for i, x in found.items() if x[-1].kept)
            assert all(len(x) == 1 for x in jax.tree.leaves(kept.held))
        return {ids[n]: joined(events) for n, events in found.items()}

    alone = {}
    for i in range(11):
        alone |= answers([i])
    assert {shape[0] for shape in read} == {1}
    read.clear()
    assert answers(range(11)) == alone
    assert read == [(8, 12), (2, 24), (1, 12)]
    for cancelled in (0, 10):
        found = answers(range(11), cancelled)
        assert found.pop(cancelled)[3] == "cancelled"
        assert found == {i: x for i, x in alone.items() if i != cancelled}


@pytest.mark.parametrize("name", ["full", "h2o"])
def test_at_a_border_prompts_get_rows_before_more_are_read(name, monkeypatch):
    """What is read ahead has slots of its own: those of all rows would be as many again."""
    batch, held, real = make(policy_of(name), rows=5), [], Batcher._begin

    def spy(self, room):
        held.append(len(self._ready))
        return real(self, room)

    monkeypatch.setattr(Batcher, "_begin", spy)
    for request in REQUESTS[:5]:  # of several widths
        batch.submit(request)
    batch.step()
    assert len(held) > 1 and max(held) == 0


def test_rows_end_at_a_stop_token():
    want = alone("h2o")
    stop = want[2][0][7]
    at = want[2][0].index(stop) + 1
    batch = make(in_one_program("h2o"))
    id = batch.submit(dataclasses.replace(REQUESTS[2], stop=(40, stop)))
    events = []
    while batch.live or batch.waiting:
        events += batch.step(3)
    assert {event.id for event in events} == {id}
    tokens, logprobs, _, finish, evictions = joined(events)
    assert finish == "stop" and tokens == want[2][0][:at] and logprobs == want[2][1][:at]
    assert evictions == CADENCE.evictions_generating(24, at)


def test_logprobs_are_of_the_models_own_distribution():
    tokens, logprobs, top, *_ = alone("full")[2]
    lm = model()
    token = jnp.asarray([[*PROMPTS[2], *tokens]])
    rows = Batch.of(token, np.array([token.shape[1]]))
    hidden, _, _ = jax.jit(replay.replay, static_argnums=3)(lm, rows, policies.get("full"), CADENCE)
    want = jax.nn.log_softmax(models.unembed(lm, hidden), axis=-1)[0, len(PROMPTS[2]) - 1 : -1]
    np.testing.assert_allclose(
        logprobs, np.take_along_axis(np.asarray(want), np.array(tokens)[:, None], 1)[:, 0],
        atol=1e-4,
    )  # fmt: skip
    np.testing.assert_allclose(top[1], -np.sort(-np.asarray(want), -1)[:, :2], atol=1e-4)
    assert np.array(top[0]).tolist() == np.argsort(-np.asarray(want), -1)[:, :2].tolist()
    # Without, they are not computed.
    batch = make(policies.get("full"), top=None)
    batch.submit(dataclasses.replace(REQUESTS[2], logprobs=0))
    [event] = batch.step(4)
    assert np.isnan(event.logprobs).all() and event.tokens.tolist() == tokens[:5]


@pytest.mark.parametrize("name", ["full", "h2o", "foresight"])
def test_a_request_goes_on_from_a_kept_cache(name):
    policy = in_one_program(name)
    first = dataclasses.replace(REQUESTS[2], limit=17, keep=True)
    batch = make(policy)
    for request in (REQUESTS[6], first, REQUESTS[0]):
        batch.submit(request)
    events = collect(batch, 5)
    tokens, *_, evictions = joined(events[1])
    kept = events[1][-1].kept
    assert kept.tokens.tolist() == [*PROMPTS[2], *tokens[:-1]] and evictions == kept.evictions
    assert all(event.kept is None for i in (0, 2) for event in events[i])
    mine = sum(x.nbytes for x in jax.tree.leaves(kept.held))
    # Under eviction the cache at the end of the prompt is kept, too.
    assert 0 < kept.bytes == mine * (1 if name == "full" else 2)
    assert kept.entries == (40 if name == "full" else BUDGET + 4)
    # The same whatever was beside the two; and the kept cache is not used up.
    whole = np.concatenate([PROMPTS[2], tokens, PROMPTS[5][:20]])
    second = dataclasses.replace(REQUESTS[3], prompt=whole, kept=kept, keep=True)
    mixed = batch.submit(second)
    batch.submit(REQUESTS[1])
    found = joined(collect(batch, 5)[mixed])
    alone = make(policy)
    alone.submit(second)
    again = collect(alone)[0]
    assert joined(again) == found and again[-1].kept.tokens.tolist() == [*whole, *found[0][:-1]]
    alone.submit(dataclasses.replace(second, kept=None))
    fresh = joined(collect(alone)[1])
    assert found[4] == (0 if name == "full" else kept.evictions + 3)  # before 9, 12 and 12 more
    if name == "full":  # the same up to rounding
        assert fresh[0] == found[0]
        np.testing.assert_allclose(fresh[1], found[1], atol=1e-4)
    # One token that ends it at once; nothing has come between.
    ids = [alone.submit(request) for request in (first, dataclasses.replace(first, limit=1))]
    one, other = map(collect(alone).get, ids)
    assert one[-1].kept.tokens.tolist() == kept.tokens.tolist()
    for x, y in zip(*map(jax.tree.leaves, (one[-1].kept.held, kept.held)), strict=True):
        assert (np.asarray(x) == np.asarray(y)).all() or x.dtype != jnp.int32
    assert other[-1].kept.tokens.tolist() == PROMPTS[2].tolist()
    with pytest.raises(UserError, match="does not continue the 40 of kept"):
        alone.submit(dataclasses.replace(first, kept=kept))
    with pytest.raises(UserError, match="kept is of another policy, cadence, length or piece"):
        make(policies.get("knorm")).submit(second)


def collect(batch, count=None):
    """Events by id."""
    found, going = {}, True
    while going:
        for event in batch.step(count):
            found.setdefault(event.id, []).append(event)
        going = batch.waiting or batch.live
    return found


def test_prompts_are_cut_by_their_length_alone():
    for length in range(1, 400):
        pieces = requests.cut(np.arange(length), 4, 64)
        tokens, positions = (np.concatenate([x[i][0] for x in pieces]) for i in (0, 1))
        assert [x[0].shape[1] for x in pieces[1:]] == [64] * (len(pieces) - 1)
        first = pieces[0][0].shape[1] // 4
        assert first in (1, 2, 3, 4, 6, 8, 12, 16) and first * 4 < max(2 * length, 5)
        padding = len(tokens) - length
        assert (positions[:padding] == -1).all()
        assert positions[padding:].tolist() == tokens[padding:].tolist() == list(range(length))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": np.array([], np.int32)}, "the prompt is empty: give at least one token"),
        ({"prompt": np.zeros((1, 2), np.int32)}, "the prompt is empty"),
        ({"prompt": np.array([0.5])}, "the prompt has float64 entries: give whole token ids"),
        ({"prompt": np.array([1, 37])}, "the prompt has token 37, beyond the model's 37"),
        ({"prompt": np.array([-1])}, "the prompt has token -1, beyond the model's 37"),
        ({"limit": 0}, "limit = 0 must be a whole number from 1"),
        ({"limit": 2.5}, "limit = 2.5 must be a whole number from 1"),
        ({"limit": 117}, "the prompt of 5 tokens and limit = 117 exceed the 120"),
        ({"sampling": 0.5}, "sampling = 0.5 must be a Sampling"),
        ({"stop": tuple(range(65))}, "stop has 65 tokens: at most 64 are allowed"),
        ({"stop": ("a",)}, "stop: a token = 'a' must be a whole number"),
        ({"logprobs": 3}, "logprobs = 3 must be at most 2"),
        ({"logprobs": -1}, "logprobs = -1 must be a whole number from 0"),
        ({"key": KEYS}, "must be one PRNG key of jax.random.key"),
        ({"key": 3}, "key = 3 must be one PRNG key of jax.random.key"),
    ],
)
def test_requests_that_can_never_run_are_refused(change, message):
    batch = idle()
    with pytest.raises(UserError, match=message):
        batch.submit(dataclasses.replace(REQUESTS[1], **change))
    assert batch.waiting == 0 and batch.step() == []


@functools.cache
def idle():
    return make(policies.get("full"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows = 0 must be a whole number from 1"),
        ({"length": 1}, "length = 1 must be a whole number from 2"),
        ({"piece": 0}, "piece = 0 must be a whole number from 1"),
        ({"top": 38}, "top = 38 must be a whole number from 0 to 37"),
        ({"policy": "h2o"}, "'h2o' is not a policy"),
    ],
)
def test_a_batcher_that_can_not_be_is_refused(change, message):
    sizes = {"policy": policies.get("full"), "rows": 2, "length": 20, "piece": 8, "top": 0} | change
    given = sizes.pop("policy"), CADENCE, sizes.pop("rows"), sizes.pop("length")
    with pytest.raises(UserError, match=message):
        Batcher(model(), *given, **sizes)


def test_what_is_not_known_can_not_be_cancelled_and_does_no_harm():
    batch = make(policies.get("full"))
    batch.cancel(7)
    id = batch.submit(REQUESTS[1])
    batch.cancel(id)
    batch.cancel(id)
    [event] = batch.step()
    assert event.finish == "cancelled" and not event.tokens.size and batch.idle == 3
    with pytest.raises(UserError, match="tokens = 0 must be a whole number from 1"):
        batch.step(0)
