"""Draws per row: the law of `transformers`' warpers, whatever the other rows need."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fkv.engine import sampling
from fkv.engine.sampling import Sampling, Samplings

HOWS = [
    Sampling(), Sampling(0.5), Sampling(1.0, 5), Sampling(1.0, 0, 0.7), Sampling(0.6, 20, 0.95),
    Sampling(1.0, 600, 0.5), Sampling(1.0, 0, 1e-9), Sampling(0.0), Sampling(3.0, 200, 0.99),
    Sampling(3.0, 0, 0.999), Sampling(0.8, 40),
]  # fmt: skip
MIN_P = [Sampling(1.0, 0, 1.0, 0.1), Sampling(1.5, 30, 0.9, 0.2), Sampling(2.0, 200, 0.97, 0.01)]
draw = jax.jit(sampling.sample)


def arrays(hows):
    return jax.tree.map(jnp.asarray, Samplings.of(hows))


@functools.cache
def given(vocab=500, rows=64):
    logits = 2 * np.random.default_rng(vocab).normal(size=(rows, vocab))
    return jnp.asarray(logits, jnp.float32), jax.random.split(jax.random.key(vocab), rows)


def plain(logits_bv, key_b, sampling):
    """One token per row by the definition, compiled for its settings."""
    if sampling.temperature == 0:
        return logits_bv.argmax(-1).astype(jnp.int32)
    x, token = logits_bv.astype(jnp.float32), None
    if sampling.top_k and sampling.top_k < x.shape[-1]:
        x, token = jax.lax.top_k(x, sampling.top_k)
    elif sampling.top_p < 1:
        token = jnp.argsort(-x, axis=-1)
        x = jnp.take_along_axis(x, token, axis=-1)
    x = x / sampling.temperature
    if sampling.top_p < 1:
        p = jax.nn.softmax(x, axis=-1)
        before = jnp.cumsum(p, axis=-1) - p  # of likelier tokens: the first always stays
        x = jnp.where(before < sampling.top_p, x, -jnp.inf)
    if sampling.min_p:
        least = x.max(-1, keepdims=True) + jnp.log(jnp.float32(sampling.min_p))
        x = jnp.where(x >= least, x, -jnp.inf)
    drawn = jax.vmap(jax.random.categorical)(key_b, x)
    if token is not None:
        drawn = jnp.take_along_axis(token, drawn[:, None], axis=-1)[:, 0]
    return drawn.astype(jnp.int32)


@pytest.mark.parametrize("vocab", [16, 500])
def test_a_row_draws_what_it_draws_in_any_company(vocab):
    """Here among rows of all settings, there by a program for its settings alone."""
    logits, keys = given(vocab)
    hows = HOWS + MIN_P
    mixed = [hows[i % len(hows)] for i in range(len(logits))]
    found = np.asarray(draw(logits, keys, arrays(mixed)))
    static = jax.jit(plain, static_argnums=2)
    for n, how in enumerate(hows):
        alone = np.asarray(static(logits, keys, how))
        assert (alone == np.asarray(draw(logits, keys, arrays([how] * len(logits))))).all(), how
        assert (alone[n :: len(hows)] == found[n :: len(hows)]).all(), how


@pytest.mark.parametrize("how", [*HOWS[:7], *HOWS[8:], *MIN_P], ids=str)
def test_what_may_be_drawn_is_what_transformers_allows(how):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as warpers

    logits, x = given()[0][0], torch.tensor(np.asarray(given()[0][:1]))
    x = warpers.TemperatureLogitsWarper(float(how.temperature))(None, x)
    if how.top_k:
        x = warpers.TopKLogitsWarper(how.top_k)(None, x)
    if how.top_p < 1:
        x = warpers.TopPLogitsWarper(how.top_p)(None, x)
    if how.min_p:
        x = warpers.MinPLogitsWarper(how.min_p)(None, x)
    p, draws = torch.softmax(x, -1)[0].double().numpy(), 4000
    keys = jax.random.split(jax.random.key(1), draws)
    rows = jnp.broadcast_to(logits[None], (draws, len(logits)))
    count = np.bincount(np.asarray(draw(rows, keys, arrays([how] * draws))), minlength=len(p))
    assert (count[p == 0] == 0).all()
    often = draws * p > 5
    p, count = p[often], count[often]
    assert (abs(count - draws * p) < 5 * (draws * p * (1 - p)) ** 0.5 + 1).all()
    chi2 = ((count - draws * p) ** 2 / (draws * p)).sum()
    assert chi2 < len(p) + 5 * (2 * len(p)) ** 0.5


@pytest.mark.parametrize("vocab", [16, 500])
def test_branches_that_are_said_never_to_be_taken_are_not(vocab, monkeypatch):
    def followed(name, condition, then, other):
        taken.append(name if condition else f"not_{name}")
        return then() if condition else other()

    monkeypatch.setattr(sampling, "_if", followed)
    logits, keys = given(vocab)
    often = set()
    for how in [*HOWS, *MIN_P, Sampling(4.0, 0, 0.9999)]:
        taken, never = [], sampling.never(how, vocab)
        sampling.sample(logits, keys, how)
        assert taken and not set(taken) & set(never), (how, taken, never)
        often |= set(taken)
        # Only of a sort that the logits ask for is nothing known.
        known = {"warm", "some", "narrow", "not_narrow", "wide", "plain"}
        assert set(taken) & known >= {x for x in ("warm",) if how.temperature} - set(never)
    assert often >= {"warm", "some", "narrow", "plain"}
    assert vocab == 16 or often >= {"not_narrow", "wide", "more"}


def test_the_vocabulary_is_sorted_only_where_a_row_needs_it():
    vocab = 5003
    text = draw.lower(*given(vocab, 2), arrays([HOWS[4]] * 2)).compile().as_text()
    inside, sorts, taken = "", [], []
    for line in text.splitlines():
        if line and not line.startswith(" "):
            inside = line.split()[0]
        if " sort(" in line and f",{vocab}]" in line:
            sorts.append(inside)
        taken += [line] if "TopK" in line else []
    assert len(sorts) == 1 and len(taken) >= 2  # of the likeliest 32, or 128
    [branch] = sorts
    [caller] = [line for line in text.splitlines() if branch in line and line.startswith(" ")]
    assert " conditional(" in caller
