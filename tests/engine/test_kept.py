"""Prompts that go on from the cache of an answer, as if all had been read."""

import jax
import numpy as np
import pytest

from fkv.cache.cadence import Cadence
from fkv.engine.batcher import Batcher, Request
from fkv.engine.sampling import Sampling
from tests.engine.test_steps import model, policy_of, random_prompts, with_config

GREEDY, KEY = Sampling(0.0), jax.random.key(1)
PROMPT, OTHER, MORE = random_prompts([21, 30, 37], seed=2)
L = 8


def make(policy, budget, cache_dtype="", rows=2):
    lm = with_config(model(), cache_dtype=cache_dtype)
    return Batcher(lm, policy, Cadence(budget, L), rows, 160, piece=16, top=0)


def answers(batch, *requests, every=None):
    """Tokens, logprobs and kept cache of each."""
    ids = [batch.submit(one) for one in requests]
    found = {i: ([], [], []) for i in ids}
    while batch.waiting or batch.live:
        for event in batch.step(every):
            tokens, logprobs, caches = found[event.id]
            tokens += event.tokens.tolist()
            logprobs += event.logprobs.tolist()
            assert (event.kept is None) or event.finish
            caches += [event.kept] * (event.finish is not None)
    return [found[i] for i in ids]


def whole(prompt, tokens, more):
    return np.concatenate([prompt, np.array(tokens, np.int32), more]).astype(np.int32)


@pytest.mark.parametrize(
    ("name", "cache_dtype", "every"),
    [("full", "int8", 3), ("h2o", "", None)],
)
def test_without_evictions_nothing_is_lost(name, cache_dtype, every):
    """Answers of any length, which end anywhere in a chunk, and more prompt of any length."""
    batch = make(policy_of(name), 152, cache_dtype)
    for limit, count in ((1, 1), (12, 20), (11, 37)):
        ask = Request(PROMPT, KEY, limit, GREEDY, keep=True)
        [(tokens, _, [cache])] = answers(batch, ask, every=every)
        assert cache.tokens.tolist() == [*PROMPT.tolist(), *tokens[:-1]]
        prompt = whole(PROMPT, tokens, MORE[:count])
        again = Request(prompt, KEY, 15, GREEDY, keep=True)
        [plain] = answers(batch, again, every=every)
        going = Request(prompt, KEY, 15, GREEDY, kept=cache, keep=True)
        one, other = answers(batch, going, Request(OTHER, KEY, 9, GREEDY), every=every)
        assert one[0] == plain[0], (limit, count)
        np.testing.assert_allclose(one[1], plain[1], atol=0.02 if cache_dtype else 1e-4)
        assert one[2][0].tokens.tolist() == plain[2][0].tokens.tolist()
        assert other[2] == [None]
        # A cache serves as often as wanted, and one that was read on from serves, too.
        assert answers(batch, going, every=every)[0][0] == one[0]
        last = whole(prompt, one[0], MORE[:5])
        both = [Request(last, KEY, 6, GREEDY, kept=x) for x in (one[2][0], None)]
        (a, _, _), (b, _, _) = answers(batch, *both, every=every)
        assert a == b


def ends_after(count):
    """As a stop string would that ends with this token of the answer."""

    def make():
        seen = []

        def take(tokens):
            seen.extend(tokens)
            return len(tokens) - (len(seen) - count) if len(seen) >= count else None

        return take

    return make


@pytest.mark.parametrize("name", ["full", "h2o"])
def test_an_answer_that_is_ended_from_outside_is_kept_as_one_of_its_length(name):
    """What was drawn behind its end is in nothing that is kept, nor in any eviction."""
    batch, limits = make(policy_of(name), 16), (1, 6, 13)
    for count in limits:
        whole_one = Request(PROMPT, KEY, count, GREEDY, keep=True)
        cut = Request(PROMPT, KEY, 20, GREEDY, keep=True, until=ends_after(count))
        (want, logprobs, [one]), got = answers(batch, whole_one, cut)
        assert got[:2] == (want, logprobs) and len(want) == count
        [other] = got[2]
        assert other.tokens.tolist() == one.tokens.tolist()
        assert (other.entries, other.evictions, other.least) == (
            one.entries, one.evictions, one.least
        )  # fmt: skip
        prompt = whole(PROMPT, want, MORE)
        asks = [Request(prompt, KEY, 9, GREEDY, kept=x) for x in (one, other)]
        a, b = answers(batch, *asks)
        assert a == b


@pytest.mark.parametrize("name", ["full", "h2o", "rkv"])
def test_the_longest_beginning_in_common_serves(name):
    """As of templates that leave thoughts out of earlier answers."""
    batch = make(policy_of(name), 16)
    [(_, _, [cache])] = answers(batch, Request(PROMPT, KEY, 20, GREEDY, keep=True))
    # A prompt that leaves the old one 3 tokens before its end: its last chunk, which no eviction
    # has seen, can be cut there. It began behind 13 tokens.
    prompt = np.concatenate([PROMPT[:18], (PROMPT[18:19] + 1) % 61, MORE[:15]]).astype(np.int32)
    some = cache.serving(prompt)
    assert some.tokens.tolist() == PROMPT[:18].tolist()
    if name == "full":
        begun = None
    else:
        assert (cache.least, cache.before.least) == (38, 14) and some.evictions == 0
        [(_, _, [begun])] = answers(batch, Request(PROMPT[:13], KEY, 1, GREEDY, keep=True))
    asks = [Request(prompt, KEY, 12, GREEDY, kept=x, keep=True) for x in (some, begun)]
    (tokens, logprobs, [a]), (want, others, [b]) = answers(batch, *asks)
    assert tokens == want
    np.testing.assert_allclose(logprobs, others, atol=1e-4)
    assert (a.entries, a.evictions) == (b.entries, b.evictions)
    # It serves again; a shorter beginning only where nothing was evicted; a prompt that adds
    # nothing is cut by a token.
    assert answers(batch, asks[0])[0][0] == tokens
    assert (cache.serving(prompt[12:]) is None) and cache.serving(PROMPT[:1]) is None
    short = cache.serving(np.concatenate([PROMPT[:10], MORE]))
    assert short is None if name != "full" else len(short.tokens) == 10
    assert len(cache.serving(cache.tokens).tokens) == len(cache.tokens) - 1
