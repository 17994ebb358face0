"""Texts that go on, and likelihoods, under a policy: one and the same model."""

import dataclasses

import numpy as np
import pytest

from fkv import policies
from fkv.cache.cadence import Cadence
from fkv.engine.sampling import Sampling
from fkv.harness.asking import Reading, Subject, Writing
from fkv.models import ModelConfig
from fkv.models.named import Model
from tests.models import random_lm

CONFIG = ModelConfig("qwen3", 61, 16, 2, 2, 1, 8, 16, qk_norm=True)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(61, size=n).astype(np.int32) for n in (40, 7, 40, 55)]


@pytest.fixture(scope="module")
def subject():
    model = Model(random_lm(CONFIG), None, (60,), "x")
    return Subject(model, policies.get("random:sinks=2"), Cadence(16, 8), rows=4)


@pytest.fixture(scope="module")
def written(subject):
    asked = [Writing(prompt, 12, cut=i) for i, prompt in enumerate(PROMPTS)]
    return dict(subject.write(asked, 96))


def texts(written):
    return [np.concatenate([PROMPTS[i], written[i].ids]) for i in range(len(PROMPTS))]


def test_what_was_written_is_what_a_reader_finds_likeliest(subject, written):
    """The context is read first, with the evictions of an answer, also where a policy draws."""
    asked = [
        Reading(((text, len(prompt)),), cut=i)
        for i, (text, prompt) in enumerate(zip(texts(written), PROMPTS, strict=True))
    ]
    found = dict(subject.read(asked))
    for i, one in found.items():
        assert one.greedy and one.logprob < 0
        for name in ("tokens", "context", "evictions", "cut"):
            assert getattr(one, name) == getattr(written[i], name), name
    assert [found[i].evictions > 0 for i in range(4)] == [True, False, True, True]
    # Of a text that it would not write, it knows.
    other = texts(written)[0].copy()
    other[-1] = (other[-1] + 1) % 60
    reply = dict(subject.read([Reading(((other, len(PROMPTS[0])),))]))[0]
    assert not reply.greedy and reply.logprob < found[0].logprob


def test_no_reply_depends_on_the_others(subject, written):
    (alone,) = subject.write([Writing(PROMPTS[2], 12, cut=2)], 96)
    assert alone[1].ids.tolist() == written[2].ids.tolist()
    asked = [Reading(((text, 5),)) for text in texts(written)]
    (alone,) = subject.read(asked[3:])
    assert alone[1] == dict(subject.read(asked))[3]


def test_choices_share_what_was_drawn_for_their_context(subject):
    """With draws of their own, a last token would change how likely those before it are."""
    first = PROMPTS[3]
    both = [np.concatenate([first[:50], [7, x]]).astype(np.int32) for x in (3, 4)]
    (_, a), (_, b) = sorted(subject.read([Reading(((x[:51], 50),)) for x in both]))
    assert a == b
    one, two = (dict(subject.read([Reading(((x, 50),))]))[0].logprob for x in both)
    assert one != two
    # Without a context there is nothing to share.
    (_, c), (_, d) = sorted(subject.read([Reading(((x, 1),)) for x in both]))
    assert c.logprob != d.logprob


def test_windows_of_a_text_are_added(subject):
    parts = [(PROMPTS[0], 1), (PROMPTS[3], 30)]
    ((_, whole),) = subject.read([Reading(tuple(parts))])
    found = [dict(subject.read([Reading((part,))]))[0] for part in parts]
    assert whole.logprob == pytest.approx(sum(one.logprob for one in found))
    assert whole.tokens == 39 + 25 and whole.evictions == sum(one.evictions for one in found)
    assert dict(subject.read([Reading(())]))[0].tokens == 0


def test_samples_differ_and_come_again(subject):
    warm = Sampling(1.0)
    asked = [Writing(PROMPTS[1], 12, warm, number=i) for i in (0, 1, 0)]
    found = dict(subject.write(asked, 96))
    assert found[0].ids.tolist() == found[2].ids.tolist() != found[1].ids.tolist()
    other = dataclasses.replace(subject, seed=1)
    assert dict(other.write(asked[:1], 96))[0].ids.tolist() != found[0].ids.tolist()


def test_it_can_be_ended(subject):
    class Enough(Exception):
        pass

    def stop():
        raise Enough

    ended = dataclasses.replace(subject, rest=stop)
    with pytest.raises(Enough):
        list(ended.write([Writing(PROMPTS[1], 12)], 96))
    with pytest.raises(Enough):
        list(ended.read([Reading(((PROMPTS[0], 20),))]))
