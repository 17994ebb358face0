"""Prompts that go on from the cache of an answer, as if all had been read."""

import jax
import numpy as np
import pytest

from fkv.cache.cadence import Cadence
from fkv.engine.batcher import Batcher, Request
from fkv.engine.sampling import Sampling
from tests.engine.test_decoding import model, policy_of, random_prompts, with_config

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
