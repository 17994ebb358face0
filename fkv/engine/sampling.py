"""How the next token of each row is drawn: settings are arrays, so that none is compiled for."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fkv import kinds
from fkv.models import numerics

# So many of the likeliest tokens are looked at: the fewest that serve all rows by their top-k, or
# the most. Where those don't serve a row, its vocabulary is sorted.
_FEWEST, _MOST = 32, 128


@dataclasses.dataclass(frozen=True)
class Sampling(kinds.Settings):
    """How the next token is sampled; applied in this order, as in `transformers`.

    Attributes:
      temperature: divides the logits; 0 is greedy.
      top_k: only the `k` likeliest tokens can be sampled; 0 for all.
      top_p: of these, the smallest set of likeliest tokens with at least this share of the
        probability; 1 for all.
      min_p: of these, tokens with at least this share of the likeliest one's probability.
    """

    temperature: float = kinds.setting(kinds.number(0), 1.0)
    top_k: int = kinds.setting(kinds.whole(0), 0)
    top_p: float = kinds.setting(kinds.number(0, 1, above=True), 1.0)
    min_p: float = kinds.setting(kinds.number(0, 1), 0.0)


FREE = Sampling()  # the model's own distribution


@flax.struct.dataclass
class Samplings:
    """The `Sampling` of each row, as arrays [b]."""

    temperature_b: Array
    top_k_b: Array
    top_p_b: Array
    min_p_b: Array

    @classmethod
    def of(cls, rows: Sequence[Sampling]) -> Self:
        def column(name, dtype):
            return np.array([getattr(row, name) for row in rows], dtype)

        top_k = np.array([min(row.top_k, 2**30) for row in rows], np.int32)
        others = (column(name, np.float32) for name in ("temperature", "top_p", "min_p"))
        temperature, top_p, min_p = others
        return cls(temperature, top_k, top_p, min_p)


def sample(logits_bv: Array, key_b: Array, how: Samplings | Sampling) -> Array:
    """Samples one token per row [b], int32, each with its own key.

    A draw depends on the row's logits, key and settings only. Nothing is drawn if all rows are
    greedy, and the vocabulary is sorted only while a row needs more than its 128 likeliest tokens.

    Args:
      how: of each row, or of all.
    """
    if isinstance(how, Sampling):
        how = jax.tree.map(jnp.asarray, Samplings.of([how] * len(logits_bv)))
    greedy, warm_b = logits_bv.argmax(-1).astype(jnp.int32), how.temperature_b > 0

    def draw():
        return jnp.where(warm_b, _draw(logits_bv.astype(jnp.float32), key_b, how, warm_b), greedy)

    return _if("warm", warm_b.any(), draw, lambda: greedy)


def never(how: Sampling, vocab: int) -> tuple[str, ...]:
    """Names of the branches of `sample` that rows of these settings don't take.

    Operations bear them, so that a compiled program can be counted without these branches.
    """
    if how.temperature == 0:
        return ("warm",)
    top_k = min(how.top_k or vocab, vocab)
    plain = top_k == vocab and how.top_p >= 1
    wide = not plain and top_k > _MOST
    taken = {
        "some": not plain, "narrow": top_k <= _FEWEST, "not_narrow": top_k > _FEWEST,
        "wide": wide, "more": wide, "plain": plain,
    }  # fmt: skip
    return tuple(name for name, so in taken.items() if not so)


def _if(name: str, condition: Array, then: Callable[[], Any], other: Callable[[], Any]) -> Any:
    """`lax.cond` with branches `name` and `not_name`, see `never`."""

    def called(branch, name):
        with jax.named_scope(name):
            return branch()

    branches = ((then, name), (other, f"not_{name}"))
    return jax.lax.cond(condition, *(functools.partial(called, *one) for one in branches))


def _draw(x_bv, key_b, how, warm_b):
    vocab = x_bv.shape[-1]
    # A larger one has no effect.
    top_k_b = jnp.where((how.top_k_b == 0) | (how.top_k_b > vocab), vocab, how.top_k_b)
    how = how.replace(
        temperature_b=jnp.where(warm_b, how.temperature_b, 1.0)[:, None], top_k_b=top_k_b[:, None],
        top_p_b=how.top_p_b[:, None], min_p_b=how.min_p_b[:, None],
    )  # fmt: skip
    fewest, most = min(_FEWEST, vocab), min(_MOST, vocab)
    plain_b = warm_b & (top_k_b == vocab) & (how.top_p_b[:, 0] >= 1)  # in the vocabulary's order
    wide_b = warm_b & ~plain_b & (top_k_b > most)

    def whole():
        """The logarithm of the vocabulary's probability, without a factor."""
        return jax.nn.logsumexp(x_bv / how.temperature_b, axis=-1, keepdims=True)

    def among(count):
        total_b1 = _if("wide", wide_b.any(), whole, lambda: jnp.zeros_like(how.temperature_b))
        x, token = numerics.top_k(x_bv, count)
        drawn, enough_b = _among_likeliest(x, token, key_b, how, total_b1, top_k_b == vocab)
        return drawn, wide_b & ~enough_b

    def among_few():
        narrow = (plain_b | ~warm_b | (top_k_b <= fewest)).all()
        return _if("narrow", narrow, lambda: among(fewest), lambda: among(most))

    def among_all():
        token = jnp.argsort(-x_bv, axis=-1)
        x = jnp.take_along_axis(x_bv, token, axis=-1)
        return _among_likeliest(x, token, key_b, how, whole(), top_k_b == vocab)[0]

    def unsorted():
        x = _at_least(x_bv / how.temperature_b, x_bv.max(-1, keepdims=True), how)
        return _pick(key_b, x)

    none = jnp.zeros(len(x_bv), jnp.int32)
    some = (warm_b & ~plain_b).any()
    drawn, more_b = _if("some", some, among_few, lambda: (none, jnp.zeros_like(warm_b)))
    drawn = jnp.where(more_b, _if("more", more_b.any(), among_all, lambda: none), drawn)
    return jnp.where(plain_b, _if("plain", plain_b.any(), unsorted, lambda: none), drawn)


def _at_least(x_bn, likeliest_b1, how):
    """Without tokens below `min_p`."""
    return jnp.where(
        x_bn >= likeliest_b1 / how.temperature_b + jnp.log(how.min_p_b), x_bn, -jnp.inf
    )


def _pick(key_b, x_bn):
    """Draws an index [b]. Noise is that of the rank, however many candidates there are."""
    return jax.vmap(jax.random.categorical)(key_b, x_bn).astype(jnp.int32)


def _among_likeliest(x_bn, token_bn, key_b, how, total_b1, whole_b):
    """A draw among a row's `n` likeliest tokens, and whether they are all that it may draw."""
    count = x_bn.shape[-1]
    inside = how.top_k_b <= count
    x = x_bn / how.temperature_b
    x = jnp.where(jnp.arange(count)[None] < how.top_k_b, x, -jnp.inf)
    p = jnp.exp(x - jnp.where(inside, jax.nn.logsumexp(x, axis=-1, keepdims=True), total_b1))
    before = jnp.cumsum(p, axis=-1) - p  # of likelier tokens: the first always stays
    kept = jnp.where((before < how.top_p_b) | (how.top_p_b >= 1), x, -jnp.inf)
    # Not the first of the sorted, a slice that keeps XLA from seeing that few are needed.
    kept = _at_least(kept, x_bn.max(-1, keepdims=True), how)
    # If the last one is too unlikely, so are all after it. (Of more than `n` likeliest tokens the
    # share of each is not known here.)
    enough_b = inside[:, 0] | jnp.isneginf(kept[:, -1]) & whole_b
    drawn = jnp.take_along_axis(token_bn, _pick(key_b, kept)[:, None], axis=-1)[:, 0]
    return drawn.astype(jnp.int32), enough_b
