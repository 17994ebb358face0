"""Protected prompts: by a cadence and by the wrapper of that name, whatever the policy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fkv import api, policies
from fkv.cache.cadence import Cadence
from fkv.engine import replay
from fkv.engine.batch import Batch
from fkv.errors import UserError
from fkv.policies import scorer
from tests import oracles
from tests.policies import BY_NAME, WEIGHTED, weighted
from tests.policies.test_policies import random_view

LM = oracles.make_lm()
RULES = scorer.ScorerConfig(norm="rms")
NAMES = [*BY_NAME, *WEIGHTED]
NAMES += ["random:sinks=4", "ada(h2o)", "ada(pyramid(rkv))", "pyramid(random)", "foresight"]
NAMES += [f"foresight, {action}" for action in ("sample", "multinomial")]


def policy_of(name, lm=LM):
    if name in WEIGHTED:
        return jax.tree.map(lambda x: x[0], weighted(name, lm.config))
    name, _, action = name.partition(", ")
    if name != "foresight":
        return policies.get(name)
    params = scorer.init(jax.random.key(1), lm.config, RULES)
    params = jax.tree.map(lambda x: x[0], params)  # of one layer
    return policies.Foresight(params, RULES, action or "top")


@pytest.mark.parametrize("name", NAMES)
def test_protected_entries_are_never_dropped(name):
    """Over prompts of all lengths, and caches that miss some entries of theirs."""
    budget, interval, rows = 36, 4, 5
    view = random_view(4, rows, budget, interval, 4, 2, 0)
    prompt = np.array([0, 3, 14, 25, 72])
    for protect in (0, 1, 14, budget - 2 * interval, budget - interval):
        # As many of the prompt's entries as may be there.
        held = np.asarray(view.cache.position_bks).copy()
        if name == "tova":  # whose heads hold the same entries
            held[:] = held[:, :1]
        for row, head in np.ndindex(held.shape[:2]):
            kept = min(prompt[row], protect)
            lowest = np.argsort(held[row, head])[:kept]
            held[row, head, lowest] = np.arange(kept)
        cadence = Cadence(budget, interval, protect)
        cache = view.cache.replace(position_bks=held)
        seen = view.replace(
            cache=cache, cadence=cadence, prompt_b=prompt, layer=jnp.int32(1),
            protect_prompt=protect,
        )  # fmt: skip
        policy = policy_of(name)
        slots = policy.capacity(budget) + interval
        if slots > budget + interval:
            pad = [(0, 0), (0, 0), (slots - budget - interval, 0)]

            def grown(x, pad=pad):
                return np.pad(x, pad + [(0, 0)] * (x.ndim - 3))

            at = np.pad(held, pad, constant_values=-1)
            cache = jax.tree.map(grown, cache).replace(position_bks=at)
            dropped = np.where(np.asarray(policy.drop(seen.replace(cache=cache))), at, -1)
            assert (dropped >= 0).any((1, 2)).all()
        else:
            dropped = np.take_along_axis(held, np.asarray(policy.evict(seen)), axis=-1)
            assert (np.diff(np.sort(dropped, axis=-1), axis=-1) > 0).all()
        kept = np.minimum(prompt, protect)[:, None, None]
        assert ((dropped < 0) | (dropped >= kept)).all(), (name, protect)


def held_at_evictions(policy, cadence, batch):
    def look(acc, policy, view, evict):
        return acc, view.cache.position_bks

    call = jax.jit(replay.replay, static_argnums=3, static_argnames="observe")
    return np.asarray(call(LM, batch, policy, cadence, observe=look)[2])


def test_prompts_stay_through_a_replay_in_any_batch():
    lengths, prompts = [70, 70, 55, 61], np.array([5, 40, 0, 11])
    token, length = oracles.make_tokens(LM.config, lengths)
    batch, cadence = Batch.of(token, length, prompts), Cadence(24, 4, 12)
    plain, kept = policies.get("random"), policies.get("prompt(random):tokens=12")
    held = held_at_evictions(plain, cadence, batch)  # [layers, e, b, k, s]
    for row, n in enumerate(np.minimum(prompts, 12)):
        there = (held[..., row, :, :, None] == np.arange(n)).any(-2)
        assert there.all(), row
    # The wrapper does what the cadence does.
    np.testing.assert_array_equal(held, held_at_evictions(kept, Cadence(24, 4), batch))
    # Without either they go.
    free = held_at_evictions(plain, Cadence(24, 4), batch)
    assert not (free[:, -1, 1, :, :, None] == np.arange(12)).any(-2).all()
    # A prompt that is not known is not protected.
    none = held_at_evictions(plain, cadence, batch.replace(prompt_b=0 * prompts))
    np.testing.assert_array_equal(none, free)


def test_prompts_on_top_of_the_budget_leave_it_whole():
    lengths, prompts, budget = [70, 70, 55, 61], np.array([5, 40, 0, 11]), 12
    token, length = oracles.make_tokens(LM.config, lengths)
    batch, cadence = Batch.of(token, length, prompts), Cadence(budget, 4)
    policy = policies.get("prompt(streaming_llm):tokens=20,on_top=True")
    held = held_at_evictions(policy, cadence, batch)
    for row, n in enumerate(np.minimum(prompts, 20)):
        at = held[:, : lengths[row] // 4 - 1, row]  # evictions with a full ring, after L tokens
        number = np.minimum(4 * (1 + np.arange(at.shape[1])), budget + n + 4)
        np.testing.assert_array_equal(
            (at >= 0).sum(-1), np.broadcast_to(number[:, None], at.shape[:3])
        )
        there = np.minimum(n, number)[:, None] > np.arange(n)
        assert ((at[..., None] == np.arange(n)).any(-2) >= there[:, None]).all(), row
        one = jax.tree.map(lambda x, row=row: x[row : row + 1], batch)
        alone = held_at_evictions(policy, cadence, one)
        np.testing.assert_array_equal(np.sort(alone[:, :, 0]), np.sort(held[:, :, row]))


def test_candidates_are_held_and_not_protected():
    view = random_view(3, 2, 24, 12, 4, 2, 5).replace(prompt_b=np.array([9, 30]))
    position = np.asarray(view.cache.position_bks)
    np.testing.assert_array_equal(view.candidate_bkn, position[..., :24] >= 0)
    assert not view.kept_prompt_bks.any()
    view = view.replace(protect_prompt=12)
    want = (position >= 0) & (position < np.array([9, 12])[:, None, None])
    assert want.any()
    np.testing.assert_array_equal(view.kept_prompt_bks, want)
    np.testing.assert_array_equal(view.candidate_bkn, ((position >= 0) & ~want)[..., :24])


def test_features_are_scaled_by_the_candidates_alone():
    view = random_view(3, 2, 24, 12, 4, 2, 0).replace(prompt_b=np.array([9, 30]))
    view = view.replace(protect_prompt=12)
    key = np.asarray(view.key_bksd)[:, :, :24]
    free = np.asarray(view.candidate_bkn)
    got = np.asarray(scorer.features(RULES, view))[..., : key.shape[-1]]
    for row, head in np.ndindex(free.shape[:2]):
        size = (key[row, head, free[row, head]] ** 2).mean() ** 0.5
        np.testing.assert_allclose(got[row, head], key[row, head] / size, rtol=1e-5)


def test_generation_keeps_what_it_is_asked_to(monkeypatch):
    seen = []
    real = api.Batcher
    fake = lambda lm, policy, cadence, *rest, **more: (  # noqa: E731
        seen.append(cadence) or real(lm, policy, cadence, *rest, **more)
    )
    monkeypatch.setattr(api, "Batcher", fake)
    api.generate(api.Model(LM, None, (), "a model"), [[1, 2]], "knorm", 16, 4, 1, protect_prompt=10)
    assert seen == [Cadence(16, 4, 10)]


# ---- what does not fit


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (13, "protect_prompt = 13 must be at most 12: an eviction at budget = 16, interval = 4 "
             "needs 4 other candidates"),
        (-1, "protect_prompt = -1 must be a whole number from 0"),
        (2.0, "protect_prompt = 2.0 must be a whole number"),
        ("4", "protect_prompt = '4' must be a whole number"),
        (None, "protect_prompt = None must be"),
        (True, "protect_prompt = True must be"),
    ],
)  # fmt: skip
def test_prompts_that_do_not_fit_are_refused(value, message):
    with pytest.raises(UserError) as error:
        Cadence(16, 4, value)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_wrappers_are_checked():
    cadence = Cadence(16, 4)
    for name in ("prompt(tova)", "prompt(ada(pyramid(h2o)))", "prompt:window=2", "prompt(random)"):
        replay.check(policies.get(name), LM.config, cadence)
    assert policies.get("prompt:window=2,tokens=3").tokens == 3
    for name, message in {
        "prompt(snapkv):tokens=13": "prompt: tokens = 13 must be at most 12 at budget = 16",
        "prompt(random:sinks=13)": "random: sinks = 13 must be at most 12",
    }.items():
        with pytest.raises(UserError, match=message):
            replay.check(policies.get(name), LM.config, cadence)
    replay.check(policies.get("prompt(ada(h2o)):tokens=99,on_top=True"), LM.config, cadence)
    with pytest.raises(UserError, match="prompt: on_top = 1 must be"):
        policies.get("prompt(h2o):on_top=1")
    for name in ("prompt(full)", "prompt(prompt(h2o))", "prompt(h2o):tokens=-1", "ada(prompt)"):
        with pytest.raises(UserError, match=r"must be a (policy that|whole number)"):
            policies.get(name)
    params = scorer.init(jax.random.key(1), LM.config, RULES)
    drawn = policies.Foresight(params, RULES, "sample")
    replay.check(drawn, LM.config, Cadence(16, 4, 8))
    for policy, at in (
        (drawn, Cadence(16, 4, 9)), (policies.Prompt(drawn, tokens=9), Cadence(16, 4)),
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"protect_prompt = 9 must be at most 8: .* needs 8"):
            replay.check(policy, LM.config, at)
    replay.check(dataclasses.replace(drawn, action="top"), LM.config, Cadence(16, 4, 9))
