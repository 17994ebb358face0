"""Scores against replays of each sequence alone, answers of the batcher, and PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fkv import models, policies
from fkv.cache.cadence import Cadence
from fkv.engine import replay
from fkv.engine.batch import Batch, rounded
from fkv.engine.batcher import Batcher, Request
from fkv.errors import UserError
from fkv.evaluation import scoring
from fkv.evaluation.scoring import score
from tests.engine.test_steps import model, policy_of, random_prompts
from tests.models import torch_logits, torch_model

CADENCE = Cadence(16, 8)
# (tokens, prompt): evictions or none, prompts that end at a border or not, one counted token.
SIZES = [(60, 21), (27, 3), (24, 0), (61, 40), (57, 56), (2, 0), (62, 0), (9, 8)]
SEQUENCES = random_prompts([n for n, _ in SIZES], seed=5)
# Logits are of the order of 20, so rounding shows at 1e-5.
ATOL = 1e-4
PROMPTS = [p for _, p in SIZES]
KEYS = jax.random.split(jax.random.key(3), len(SIZES))


def nll_and_greedy(logits_tv, tokens, prompt):
    """From the logits of all tokens, by the definition."""
    first = max(prompt, 1)
    x = np.asarray(logits_tv, np.float64)[first - 1 : len(tokens) - 1]
    nll = np.log(np.exp(x).sum(-1)) - x[np.arange(len(x)), tokens[first:]]
    return nll, x.argmax(-1) == tokens[first:]


@functools.partial(jax.jit, static_argnums=3)
def plain(lm, batch, policy, cadence, key_b):
    hidden, _, _ = replay.replay(lm, batch, policy, cadence, key_b)
    return models.unembed(lm, hidden)


@pytest.mark.parametrize("name", ["full", "random", "ada(h2o)"])
def test_scores_are_those_of_each_sequence_alone(name):
    lm, policy = model(), policy_of(name)
    found = score(lm, policy, CADENCE, SEQUENCES, PROMPTS, rows=3, keys=KEYS)
    for tokens, prompt, key, one in zip(SEQUENCES, PROMPTS, KEYS, found, strict=True):
        padding = -prompt % CADENCE.interval
        row = np.zeros((1, 64), np.int32)
        row[0, padding : padding + len(tokens)] = tokens
        sizes = (np.array([n], np.int32) for n in (len(tokens), prompt, padding))
        logits = plain(lm, Batch(row, *sizes), policy, CADENCE, key[None])
        nll, greedy = nll_and_greedy(logits[0, padding:], tokens, prompt)
        assert one.nll.dtype == np.float32 and len(one.nll) == len(tokens) - max(prompt, 1)
        np.testing.assert_allclose(one.nll, nll, atol=ATOL)
        np.testing.assert_array_equal(one.greedy, greedy)


def test_scores_depend_on_the_sequence_only():
    lm, policy = models.separate(model(), consume=False), policy_of("random")
    together = score(lm, policy, CADENCE, SEQUENCES, PROMPTS, rows=2, keys=KEYS)
    for order in ([0], [4, 0, 3, 6, 1], [1, 2, 7]):
        some = [SEQUENCES[i] for i in order], [PROMPTS[i] for i in order]
        found = score(lm, policy, CADENCE, *some, rows=2, keys=KEYS[np.array(order)])
        for i, one in zip(order, found, strict=True):
            np.testing.assert_array_equal(one.nll, together[i].nll)
            np.testing.assert_array_equal(one.greedy, together[i].greedy)


def test_scores_are_logprobs_of_what_was_decoded():
    lm, policy = model(), policy_of("random")
    batcher = Batcher(lm, policy, CADENCE, 2, 80, piece=16)
    prompts = [x[:n] for x, n in zip(SEQUENCES, (21, 27, 3), strict=False)]
    ids = [batcher.submit(Request(x, KEYS[i], 33)) for i, x in enumerate(prompts)]
    tokens, logprobs = ({i: [] for i in ids} for _ in range(2))
    while batcher.waiting or batcher.live:
        for event in batcher.step():
            tokens[event.id] += event.tokens.tolist()
            logprobs[event.id] += event.logprobs.tolist()
    whole = [np.concatenate([x, tokens[i]]) for i, x in zip(ids, prompts, strict=True)]
    found = score(lm, policy, CADENCE, whole, list(map(len, prompts)), rows=3, keys=KEYS[:3])
    for i, one in zip(ids, found, strict=True):
        np.testing.assert_allclose(-one.nll, logprobs[i], atol=ATOL)


def test_with_a_full_cache_they_are_those_of_transformers(tmp_path):
    torch = torch_model("qwen3")
    torch.save_pretrained(tmp_path)
    lm = models.load(tmp_path, np.float32, separate=True)
    found = score(lm, policies.get("full"), CADENCE, SEQUENCES, PROMPTS, rows=4)
    for tokens, prompt, one in zip(SEQUENCES, PROMPTS, found, strict=True):
        nll, greedy = nll_and_greedy(torch_logits(torch, tokens[None])[0], tokens, prompt)
        np.testing.assert_allclose(one.nll, nll, atol=ATOL)
        np.testing.assert_array_equal(one.greedy, greedy)


def test_sums_over_a_page_are_those_of_double_precision():
    # PyTorch's log_softmax in float32 is 2.4e-4 nats beside it: errors of one sign.
    rng = np.random.default_rng(0)
    logits = (20 + 3 * rng.normal(size=(256, 49152))).astype(np.float32)
    target = rng.integers(0, 49152, 256)
    x = logits.astype(np.float64)
    want = (np.log(np.exp(x - 20).sum(-1)) + 20 - x[np.arange(256), target]).sum()
    nll, _ = scoring.likelihood(jnp.asarray(logits)[None], jnp.asarray(target)[None])
    assert abs(np.sum(nll, dtype=np.float64) - want) < 5e-5


def test_widths_are_few_and_near():
    widths = [rounded(n, 8) for n in range(1, 5000)]
    assert all(w >= n and w % 8 == 0 for n, w in enumerate(widths, 1))
    assert all(w <= max(n + 7, n * 1.25) for n, w in enumerate(widths, 1))
    assert widths == sorted(widths) and len(set(widths)) <= 48


@pytest.mark.parametrize(
    ("tokens", "prompt", "says"),
    [
        ([1, 2, 3], 3, "sequence 1 has 3 tokens, of which its prompt is 3: none is left"),
        ([1], 0, "sequence 1 has 1 tokens, of which its prompt is 0"),
        ([1, 2], -1, "prompts.1. = -1 must be a whole number"),
        ([1, 99], 1, "sequence 1 has a token beyond the model's 37"),
        ([1.0, 2.0], 1, "sequence 1 must be a flat array of whole token ids"),
    ],
)
def test_what_cannot_be_scored_is_named(tokens, prompt, says):
    some = [np.array([1, 2]), np.array(tokens)]
    with pytest.raises(UserError, match=says):
        score(model(), policy_of("h2o"), CADENCE, some, [1, prompt])
