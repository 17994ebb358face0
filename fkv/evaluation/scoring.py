"""How likely given texts are under a policy: each token's loss, and whether it is the likeliest.

The tokens are known, so they are replayed. Evictions come where decoding would have them: chunks of
`L` are counted from the end of a sequence's prompt, so that the numbers are those of an answer that
was written token by token.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fkv import kinds, models, policies
from fkv.cache.cadence import Cadence
from fkv.engine import replay
from fkv.engine.batch import Batch, rounded
from fkv.engine.memory_maps import make_room
from fkv.engine.replay import Site
from fkv.errors import UserError
from fkv.keys import Purpose, key_of
from fkv.learning.tokens import of_logits
from fkv.models import LM
from fkv.policies.base import Policy

# Tokens of a pass in all its rows together, at most, where a row has fewer; and of a block of
# logits.
_PASS, _LOGITS = 2**14, 128
_UNIT = 32  # widths where nothing is evicted are multiples of this


@dataclasses.dataclass(frozen=True)
class Scored:
    """One sequence; arrays over its n counted tokens: those after its prompt, never the first.

    Attributes:
      nll: of each token given those before, under the policy, nats, float32 [n].
      greedy: whether it is the likeliest (of equal ones, the lowest id), bool [n].
    """

    nll: np.ndarray
    greedy: np.ndarray


def score(
    lm: LM,
    policy: Policy,
    cadence: Cadence,
    sequences: Sequence[np.ndarray],
    prompts: Sequence[int],
    *,
    rows: int = 8,
    keys: Array | None = None,
) -> list[Scored]:
    """Scores sequences under a policy.

    Sequences run together with others of about their length, padded to one of few widths, so that
    few programs are compiled; memory is linear in their tokens. What is found for one does not
    depend on the others.

    Args:
      lm: with separate or stacked layers; one layer at a time is read.
      policy: any.
      cadence: of evictions; for a policy that does not evict, nothing of it matters.
      sequences: token ids, each [t].
      prompts: how many of each one's first tokens are given: they are not counted. Evictions are
        those of decoding after a prompt of that length. 0 counts all tokens but the first, which
        nothing predicts.
      rows: sequences of a pass, at most; long ones take fewer. Short of that many, a pass repeats
        some, so give 1 for a single sequence.
      keys: one PRNG key per sequence, for policies that draw; by default those of `replay`, by
        their order.

    Returns:
      One result per sequence, in their order.

    Raises:
      UserError: the policy does not fit the model, a sequence has no token to count or one that the
        model does not know, or the logits are NaN or infinite.
    """
    kinds.check("rows", rows, kinds.whole(1))
    replay.check(policy, lm.config, cadence)
    make_room()
    _check(sequences, prompts, lm.config.vocab_size)
    if keys is None:
        keys = replay.row_keys(key_of(0, Purpose.REPLAY), len(sequences))
    found: dict[int, Scored] = {}
    for one in passes(policy, cadence, sequences, prompts, rows):
        first = np.maximum(one.batch.prompt_b, 1)
        count = one.batch.length_b - first
        hidden = last_hidden(lm, one.policy, cadence, one.batch, keys[one.rows])
        nll, greedy = jax.device_get(_likelihoods(lm, hidden, one.batch, first, one.counted))
        for row, index in enumerate(one.rows):
            some = slice(count[row])
            found[int(index)] = Scored(nll[row, some], greedy[row, some])
    if not all(np.isfinite(one.nll).all() for one in found.values()):
        raise UserError("the model's logits are NaN or infinite: check its weights and dtype")
    return [found[i] for i in range(len(sequences))]


def last_hidden(lm: LM, policy: Policy, cadence: Cadence, batch: Batch, key_b: Array) -> Array:
    """Hidden states after the last layer [b, t, m] under a policy, as `replay` gives them.

    Layer after layer, so that either form of a model's layers is read in place.
    """
    position_bt = batch.position_bt
    hidden = _embed(lm, jnp.asarray(batch.token_bt))
    site = Site(lm.config, cadence, 0, key_b, jnp.asarray(batch.prompt_b))
    for i in range(lm.config.layers):
        weights = models.layer(lm, i)
        hidden = _layer(weights, policy, site.replace(layer=np.int32(i)), hidden, position_bt)
    return hidden


@jax.jit
def _embed(lm, token_bt):
    return models.embed(lm, token_bt)


@functools.partial(jax.jit, donate_argnames="hidden_btm")
def _layer(weights, policy, site, hidden_btm, position_bt):
    policy = jax.tree.map(lambda x: x[site.layer], policy)
    qkv = replay.project(policy, site.config, site.layer, weights, hidden_btm, position_bt)
    if policy.evicts:
        out, *_ = replay.layer_pass(policy, site, qkv, position_bt)
    else:
        out, *_ = replay.full_pass(site.config, qkv, position_bt)
    return models.finish(site.config, weights, hidden_btm, out)


def likelihood(logits_btv: Array, target_bt: Array) -> tuple[Array, Array]:
    """Losses of tokens, nats, and whether they are the likeliest, [b, t] each."""
    x = logits_btv - logits_btv.max(-1, keepdims=True)
    own = jnp.take_along_axis(x, target_bt[..., None], axis=-1)[..., 0]
    return jnp.log(jnp.exp(x).sum(-1)) - own, jnp.argmax(logits_btv, axis=-1) == target_bt


@functools.partial(jax.jit, static_argnames="count")
def _likelihoods(lm, hidden_btm, batch, first_b, count):
    """Loss and greediness [b, count] of each row's tokens from token `first_b` on."""
    # The state before a token predicts it. What is beyond a row's end is cut off later.
    at = batch.padding_b[:, None] + first_b[:, None] + jnp.arange(count)[None]
    last = hidden_btm.shape[1] - 1
    hidden = jnp.take_along_axis(hidden_btm, jnp.minimum(at - 1, last)[..., None], axis=1)
    target = jnp.take_along_axis(batch.token_bt, jnp.minimum(at, last), axis=1)

    blocks = max(_LOGITS // len(hidden), 1), _LOGITS
    return of_logits(lm, likelihood, hidden, target, blocks=blocks)


@dataclasses.dataclass(frozen=True)
class Pass:
    """What runs at a time.

    Attributes:
      policy: `full` where nothing is evicted from these rows.
      batch: the rows, with padding on both sides.
      rows: which sequences they are; some may be repeated.
      counted: at least as many tokens as any row counts.
    """

    policy: Policy
    batch: Batch
    rows: np.ndarray
    counted: int


def passes(policy, cadence, sequences, prompts, rows) -> Iterator[Pass]:
    """All sequences, those of one width together; the shape of a pass depends on its width only."""
    full, groups = policies.get("full"), {}
    for i, (tokens, prompt) in enumerate(zip(sequences, prompts, strict=True)):
        padding = -prompt % cadence.interval
        padded = padding + len(tokens)
        # As long as nothing is evicted, it does not matter where chunks end.
        evicts = policy.evicts and padded > replay.beginning(policy, cadence, padded)
        unit = cadence.interval if evicts else _UNIT
        width = rounded(padded if evicts else len(tokens), unit)
        groups.setdefault((evicts, width), []).append((i, padding if evicts else 0))
    for (evicts, width), members in sorted(groups.items(), reverse=True):  # large ones fail first
        at_once = max(min(rows, _PASS // width), 1)
        for start in range(0, len(members), at_once):
            some = [members[j % len(members)] for j in range(start, start + at_once)]
            index = np.array([i for i, _ in some])
            token = np.zeros((at_once, width), np.int32)
            for row, (i, padding) in zip(token, some, strict=True):
                row[padding : padding + len(sequences[i])] = sequences[i]
            length, prompt = (
                np.array([given[i] for i in index], np.int32)
                for given in (list(map(len, sequences)), prompts)
            )
            batch = Batch(token, length, prompt, np.array([p for _, p in some], np.int32))
            counted = rounded(int((length - np.maximum(prompt, 1)).max()), _LOGITS)
            yield Pass(policy if evicts else full, batch, index, counted)


def _check(sequences, prompts, vocab):
    if len(sequences) != len(prompts):
        raise UserError(f"{len(sequences)} sequences and {len(prompts)} prompts: give one each")
    for i, (tokens, prompt) in enumerate(zip(sequences, prompts, strict=True)):
        kinds.check(f"prompts[{i}]", prompt, kinds.whole(0))
        if len(tokens) <= max(prompt, 1):
            raise UserError(
                f"sequence {i} has {len(tokens)} tokens, of which its prompt is {prompt}: none is "
                "left to be scored"
            )
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise UserError(f"sequence {i} must be a flat array of whole token ids")
        if not (0 <= tokens.min() and tokens.max() < vocab):
            raise UserError(f"sequence {i} has a token beyond the model's {vocab}")
