"""Texts that are read once: what is kept of them, questions about them, losses and receipts."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fkv
from fkv import models, policies
from fkv.cache.cadence import Cadence
from fkv.engine import replay
from fkv.engine.batch import Batch
from fkv.errors import UserError
from fkv.evaluation.losses import mean_interval
from fkv.learning.tokens import low_entropy
from fkv.models.named import Model
from tests.engine.test_steps import model as tiny
from tests.engine.test_steps import random_prompts
from tests.test_api import TEMPLATE, save_words

L = 8
TEXT, ASKED, OTHER = random_prompts([61, 5, 11], seed=4)
SIZES = dict(budget=16, interval=L)
WARM = dict(new_tokens=20, temperature=0.9, top_k=0, top_p=1.0)


@functools.cache
def model():
    return Model(tiny(), None, (), "tiny")


def dropped(acc, policy, view, evict):
    return acc, jnp.take_along_axis(view.cache.position_bks, evict, axis=-1)


def test_a_text_that_streams_keeps_what_a_prompt_keeps():
    """Evictions of a plain replay, the one at its end included."""
    context = fkv.Context(model(), TEXT, policy="snapkv", **SIZES)
    padding = np.array([-len(TEXT) % L], np.int32)
    length = np.array([len(TEXT)], np.int32)
    # Another chunk, so that there is an eviction before it.
    token = np.pad(TEXT, (padding[0], L))[None]
    batch = Batch(token, length, length, padding)
    policy, cadence = policies.get("snapkv"), Cadence(**SIZES)
    _, _, gone = jax.jit(replay.replay, static_argnums=(3, 5))(
        tiny(), batch, policy, cadence, None, dropped
    )
    gone = np.asarray(gone)  # [y, e, 1, k, l]
    for layer, heads in enumerate(context.positions):
        for head, kept in enumerate(heads):
            want = set(range(len(TEXT))) - set(gone[layer, :, 0, head].ravel().tolist())
            assert kept.tolist() == sorted(want) and len(kept) == SIZES["budget"]


def plain_keydiff(text, budget, protected):
    """Positions that the most distinctive keys of a full pass leave, and the newest."""
    at = jnp.arange(len(text))[None]

    def layer(hidden, weights):
        qkv = models.project(tiny().config, weights, hidden, at)
        out, keys, _ = replay.full_pass(tiny().config, qkv, at)
        return models.finish(tiny().config, weights, hidden, out), keys[0]

    hidden = models.embed(tiny(), jnp.asarray(text)[None])
    _, keys = jax.lax.scan(layer, hidden, models.stacked(tiny()))
    found = []
    for key in np.asarray(keys, np.float64):  # [t, k, d]
        key = key / np.linalg.norm(key, axis=-1, keepdims=True)
        anchor = key.sum(0) / np.linalg.norm(key.sum(0), axis=-1, keepdims=True)
        same = (key * anchor).sum(-1)
        same[len(text) - protected :] = -2
        found.append(np.sort(np.argsort(same, axis=0)[:budget], axis=0).T.tolist())
    return found


@pytest.mark.parametrize("newest", [None, 0])
def test_a_text_that_is_evicted_at_its_end_is_read_with_the_full_cache(newest):
    context = fkv.Context(model(), TEXT, policy="keydiff", when="end", newest=newest, **SIZES)
    want = plain_keydiff(TEXT, SIZES["budget"], L if newest is None else newest)
    assert [[head.tolist() for head in heads] for heads in context.positions] == want


def test_heads_and_layers_share_the_budget_of_a_text_unevenly():
    layers = tiny().config.layers
    context = fkv.Context(model(), TEXT, policy="ada(knorm):room=2", when="end", **SIZES)
    counts = [[len(head) for head in heads] for heads in context.positions]
    assert all(sum(heads) == 2 * SIZES["budget"] for heads in counts)
    assert any(a != b for a, b in counts)
    context = fkv.Context(model(), TEXT, policy="pyramid:beta=4,window=2", when="end", **SIZES)
    totals = [len(heads[0]) for heads in context.positions]
    assert totals == [28, 4] and sum(totals) == layers * SIZES["budget"]
    # They are what an eviction of such a head leaves, so decoding can go on from them.
    assert len(context.ask(ASKED, **WARM).tokens) == WARM["new_tokens"]


@pytest.mark.parametrize(
    ("policy", "when", "room"),
    [("full", "stream", 0), ("h2o", "stream", 0), ("random", "end", 0), ("ada(h2o)", "end", 32)],
)
def test_answers_are_those_of_a_fresh_context(policy, when, room):
    """To the bit, whatever was asked before; and their logprobs are those of a replay."""
    make = functools.partial(fkv.Context, model(), TEXT, policy, **SIZES, when=when, room=room)
    context = make()
    more = dict(logprobs=True, seed=3, **WARM)
    first, second = context.ask([ASKED, OTHER], **more)
    context.ask([OTHER, ASKED], seed=9, **WARM)
    again, fresh = context.ask([ASKED, OTHER], **more), make().ask([ASKED, OTHER], **more)
    for some in (again[0], fresh[0]):
        assert some.tokens.tolist() == first.tokens.tolist()
        assert some.logprobs.tolist() == first.logprobs.tolist()
    if policy == "h2o":  # in a batch of another size, products round differently
        alone = make().ask(ASKED, **more)
        assert alone.tokens.tolist() == first.tokens.tolist()
        np.testing.assert_allclose(alone.logprobs, first.logprobs, atol=1e-4)
    assert fresh[1].tokens.tolist() == second.tokens.tolist()
    assert second.prompt_tokens == len(TEXT) + len(OTHER)
    receipt = fkv.receipt(model(), second)
    np.testing.assert_allclose(-receipt.nll, second.logprobs, atol=1e-4)
    assert (receipt.kl.max() < 1e-6) == (policy == "full")
    told = context.loss(OTHER, second.tokens, seed=3)
    if policy != "random":  # draws of the second question's row
        np.testing.assert_allclose(told.nll, receipt.nll, atol=1e-4)
        np.testing.assert_allclose(told.full, receipt.full_nll, atol=1e-4)


def test_with_a_full_cache_answers_are_those_of_the_whole_prompt():
    context = fkv.Context(model(), TEXT, interval=L)
    # Together 96 tokens, as a context rounds them: the programs are the same.
    more = dict(logprobs=True, seed=1) | WARM | dict(new_tokens=24)
    found = context.ask([ASKED, OTHER], **more)
    whole = [np.concatenate([TEXT, x]) for x in (ASKED, OTHER)]
    for one, [want] in zip(found, fkv.generate(model(), whole, interval=L, **more), strict=True):
        assert one.tokens.tolist() == want.tokens.tolist()
        np.testing.assert_allclose(one.logprobs, want.logprobs, atol=1e-4)
        assert one.cache_bytes == want.cache_bytes and one.prompt_tokens == want.prompt_tokens


def test_room_holds_question_and_answer_beside_what_was_kept():
    """Nothing more is evicted, and the cache is larger."""
    keep = fkv.Context(model(), TEXT, "random", when="end", room=32, **SIZES)
    answer, _ = keep.ask([OTHER, ASKED], logprobs=True, **WARM)
    assert answer.evictions == 1
    short = fkv.Context(model(), TEXT, "random", when="end", **SIZES)
    short, _ = short.ask([OTHER, ASKED], logprobs=True, **WARM)
    assert short.evictions > 1 and short.cache_bytes < answer.cache_bytes


def test_a_receipt_is_a_comparison_of_two_replays(tmp_path):
    [[answer]] = fkv.generate(model(), TEXT[:21], "h2o", **SIZES, logprobs=True, seed=2, **WARM)
    receipt = fkv.receipt(model(), answer)
    np.testing.assert_allclose(-receipt.nll, answer.logprobs, atol=1e-4)
    whole = np.concatenate([TEXT[:21], answer.tokens])
    batch = Batch.of(whole[None], np.array([len(whole)]))
    hidden, _, _ = replay.replay(tiny(), batch, policies.get("full"), Cadence(**SIZES))
    logits = np.asarray(models.unembed(tiny(), hidden), np.float64)[0, 20:-1]
    full = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(-receipt.full_nll, full[range(20), answer.tokens], atol=1e-4)
    np.testing.assert_array_equal(receipt.full_likeliest, full.argmax(-1))
    entropy = -(np.exp(full) * full).sum(-1)
    np.testing.assert_allclose(receipt.entropy, entropy, atol=1e-4)
    low = low_entropy(jnp.asarray(entropy)[None], jnp.ones((1, 20), bool), 0.2)[0]
    np.testing.assert_array_equal(receipt.low, low)
    assert receipt.low.sum() == 16
    differs = np.flatnonzero(receipt.likeliest != full.argmax(-1))
    assert receipt.divergence == differs[0] > 0  # nothing is evicted before the first few
    assert set(np.flatnonzero(receipt.broken)) == set(differs) & set(np.flatnonzero(low))
    assert receipt.kl[0] < 1e-6 < 0.01 < receipt.kl.max() and (receipt.kl > -1e-6).all()
    assert f"first at token {differs[0]}" in repr(receipt) and "\n" not in repr(receipt)
    rows = receipt.table(most=2).splitlines()
    assert len(rows) == 4 and rows[0] == repr(receipt)
    receipt.save(tmp_path)
    lines = [json.loads(x) for x in (tmp_path / "receipt.jsonl").read_text().splitlines()]
    assert [x["broken"] for x in lines] == receipt.broken.tolist()
    assert (tmp_path / "receipt.png").stat().st_size > 1000
    assert len(receipt.plot().axes) == 2


def test_a_loss_is_that_of_replays():
    one = fkv.loss(model(), TEXT, "h2o", **SIZES, prompt=5)
    same = fkv.loss(model(), TEXT[5:], "h2o", **SIZES, prompt=TEXT[:5])
    assert one.nll.tolist() == same.nll.tolist() and len(one.nll) == 56
    full = fkv.loss(model(), TEXT, **SIZES, prompt=5)
    np.testing.assert_allclose(one.full, full.nll, atol=1e-5)
    assert full.difference[0] == 0.0 and full.ratio == 1.0
    assert one.ratio == pytest.approx(one.mean / full.mean) and one.ratio != 1.0
    value, half = one.difference
    assert value == pytest.approx(one.mean - full.mean, abs=1e-6) and half > 0
    assert "difference" in repr(one) and "\n" not in repr(one)
    assert len(fkv.loss(model(), TEXT, **SIZES, full=False).nll) == 60


def test_intervals_of_means_know_of_neighbours():
    rng = np.random.default_rng(0)
    alone = rng.normal(size=400)
    together = np.repeat(rng.normal(size=40), 10)
    assert mean_interval(alone)[1] == pytest.approx(1.96 / 20, rel=0.4)
    # Tokens that go ten by ten tell as little as their tenth.
    assert mean_interval(together)[1] == pytest.approx(1.96 / 40**0.5, rel=0.5)
    # Of many such texts, 95 % of the intervals hold the mean.
    hits = [
        abs(value) <= half
        for value, half in (mean_interval(np.repeat(rng.normal(size=80), 5)) for _ in range(400))
    ]
    assert 0.9 < np.mean(hits) < 0.98


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: fkv.Context(m, []), "the text is empty"),
        (lambda m: fkv.Context(m, TEXT, "h2o", 64, L), "budget = 64 holds all 61 tokens"),
        (lambda m: fkv.Context(m, TEXT, "h2oo", **SIZES), "policy 'h2oo' is not known"),
        (lambda m: fkv.Context(m, TEXT, "h2o", **SIZES, when="now"), "when = 'now' must be one of"),
        (lambda m: fkv.Context(m, TEXT, "h2o", **SIZES, room=-1), "room = -1 must be a whole"),
        (lambda m: fkv.Context(m, TEXT, "h2o", **SIZES, newest=0), "newest = 0 is for when"),
        (lambda m: fkv.Context(m, [1, 99]), "the text has token 99"),
        (lambda m: fkv.Context(m, "text"), "model tiny has no tokenizer"),
        (lambda m: fkv.Context(m, TEXT, interval=L).ask([]), "no questions given"),
        (lambda m: fkv.Context(m, TEXT, interval=L).ask([[1], []]), "question 1 is empty"),
        (lambda m: fkv.Context(m, TEXT, interval=L).ask(""), "question 0 is empty"),
        (lambda m: fkv.Context(m, TEXT, interval=L).loss([1], []), "the answer is empty"),
        (lambda m: fkv.loss(m, []), "the text is empty"),
        (lambda m: fkv.loss(m, [1]), "the text has 1 tokens, 1 of them given"),
        (lambda m: fkv.loss(m, [1, 2], prompt=2), "prompt = 2 leaves none of the text's 2 tokens"),
        (lambda m: fkv.loss(m, [1, 2], prompt=-1), "prompt = -1 must be a whole number"),
        (lambda m: fkv.loss(m, [1, 2], policy="h2o", budget=8, interval=8), "budget = 8 must be"),
        (lambda m: fkv.receipt(m, "text"), "'text' is not a Generation"),
        (lambda m: fkv.receipt(m, fkv.Generation("", TEXT, "stop", 0)), "does not say how"),
    ],
)
def test_bad_input_is_named_in_one_line(call, says):
    with pytest.raises(UserError, match=says) as error:
        call(model())
    assert "\n" not in str(error.value)


def test_texts_and_questions_share_one_message_of_the_template(tmp_path):
    words = fkv.load(save_words(tmp_path, TEMPLATE))
    text, talk = "w1 w2 w3 w4", [{"role": "user", "content": "w1 w2"}]
    more = dict(new_tokens=4, temperature=0.0)
    encoded = functools.partial(words.tokenizer.encode, add_special_tokens=False)
    context = fkv.Context(words, text, interval=L, chat=True)
    assert context.tokens.tolist() == encoded("<user> w1 w2 w3 w4")
    [[want]] = fkv.generate(words, text + " w5 w6", interval=L, chat=True, **more)
    asked = (
        context.ask(" w5 w6", **more),
        context.ask([{"role": "user", "content": " w5 w6"}], **more),
    )
    assert {(x.text, x.prompt_tokens) for x in asked} == {(want.text, want.prompt_tokens)}
    # A text that looks like a control token is none.
    [[want]] = fkv.generate(words, text + " <eos>", interval=L, chat=True, **more)
    origin = context.ask(" <eos>", **more).origin
    assert origin.prompt.tolist() == want.origin.prompt.tolist()
    after = fkv.Context(words, talk, interval=L)
    [[want]] = fkv.generate(words, [*talk, {"role": "user", "content": "w9"}], interval=L, **more)
    assert after.ask("w9", **more).prompt_tokens == want.prompt_tokens
    assert after.ask("w9", **more).text == want.text
    plain = fkv.Context(words, text, interval=L)
    assert plain.ask("w5", **more).prompt_tokens == 5
    with pytest.raises(UserError, match="question 0 is messages, and the text is not in a chat"):
        plain.ask(talk)
    with pytest.raises(UserError, match="has no place for a question"):
        fkv.Context(words, "w1 <fkv:question>", chat=True)


def test_a_receipt_is_for_the_model_that_wrote():
    [[answer]] = fkv.generate(model(), ASKED, interval=L, new_tokens=1)
    other = dataclasses.replace(model(), revision="other")
    with pytest.raises(UserError, match="the generation is of model tiny, not of tiny@other"):
        fkv.receipt(other, answer)
