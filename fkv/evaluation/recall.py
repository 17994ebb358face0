"""More than loss: what a policy says where the full cache's answer is known, and what it finds.

Nothing is decoded here: under greedy decoding the first of the given tokens that is not the
likeliest is where an answer leaves them, so one replay along the given tokens tells what decoding
would do, and how it would go on from every later token of the full cache's answer, too.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fkv import models, policies
from fkv.cache.cadence import Cadence
from fkv.data.lookups import Context, Lookup
from fkv.engine import beginnings, replay
from fkv.engine.batch import Batch
from fkv.engine.memory_maps import make_room
from fkv.evaluation import loss_ratio
from fkv.keys import Purpose, key_of
from fkv.learning import golden
from fkv.models import LM
from fkv.policies.base import Policy
from fkv.policies.forced import Forced

GOLDEN = "golden"
_BLOCK = 128  # tokens whose logits are computed at a time

_begin = jax.jit(beginnings.begin, static_argnums=3)


def _by_blocks(function, *arrays_x):
    """`function` of arrays of the same tokens [x, ...], a block of tokens at a time."""
    count = len(arrays_x[0])
    block = min(_BLOCK, count)

    def split(x):
        x = jnp.pad(x, [(0, -count % block), *[(0, 0)] * (x.ndim - 1)])
        return x.reshape(-1, block, *x.shape[1:])

    found = jax.lax.map(lambda one: function(*one), tuple(map(split, arrays_x)))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], found)


def _log_probs(lm, hidden_xm):
    return jax.nn.log_softmax(models.unembed(lm, hidden_xm[None])[0], axis=-1)


def _flat(x):
    return x.reshape(-1, *x.shape[2:])


# ---- agreement with the full cache's continuation


@flax.struct.dataclass
class Given:
    """Prompts with their continuations.

    Attributes:
      rows: prompts of one length, of at least `B + L` tokens, and continuations of at most c.
      key_b: one PRNG key per row.
      full_bcm: see `full_hidden`.
    """

    rows: Batch
    key_b: Array
    full_bcm: Array


@functools.partial(jax.jit, static_argnums=2)
def full_hidden(lm: LM, rows: Batch, count: int) -> Array:
    """Hidden states [b, c, m] of the full cache that predict the last `count` = c tokens."""
    hidden, _, _ = replay.replay(lm, rows, policies.get("full"), Cadence.of(0, 1))
    return hidden[:, -count - 1 : -1]


@jax.jit
def _compare(lm, hidden_btm, full_bcm, token_bt):
    shape = full_bcm.shape[:2]
    c = shape[1]
    hidden, target = hidden_btm[:, -c - 1 : -1], token_bt[:, -c:]

    def block(hidden, full, target):
        ours, theirs = _log_probs(lm, hidden), _log_probs(lm, full)
        return ours.argmax(-1) == target, (jnp.exp(theirs) * (theirs - ours)).sum(-1)

    hit, kl = _by_blocks(block, _flat(hidden), _flat(full_bcm), target.reshape(-1))
    return hit.reshape(shape), kl.reshape(shape)


@jax.jit
def _agree(lm, begun, policy, given):
    hidden, _, _ = beginnings.replay_from(lm, given.rows, begun, policy, given.key_b)
    return _compare(lm, hidden, given.full_bcm, given.rows.token_bt)


@functools.partial(jax.jit, static_argnums=2)
def _agree_golden(lm, given, cadence):
    forced, _, _ = golden.policy(lm, given.rows, cadence)
    hidden, _, _ = replay.replay(lm, given.rows, forced, cadence, given.key_b)
    return _compare(lm, hidden, given.full_bcm, given.rows.token_bt)


def agree(
    lm: LM, named: Mapping[str, Policy], given: Given, cadence: Cadence, wanted: Sequence[str]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """What policies say along given continuations, each as soon as it is known.

    Args:
      named: policies by reported name.
      wanted: names of those to run, `golden` or in `named`.

    Yields:
      A name; whether each token of the continuation is the likeliest one [b, c]; and KL(full ||
      policy) of its distribution [b, c], nats. Those after a row's end mean nothing.
    """
    if GOLDEN in wanted:
        yield GOLDEN, *map(np.asarray, _agree_golden(lm, given, cadence))
    for name, policy, begun in _begun(lm, named, given.rows, cadence, wanted):
        yield name, *map(np.asarray, _agree(lm, begun, policy, given))


def _begun(lm, named, rows, cadence, wanted):
    """(name, policy, its beginning) of the wanted ones; most share one (`loss_ratio.shares`)."""
    make_room()
    together = {name: p for name, p in named.items() if loss_ratio.shares(p, cadence)}
    several, shared = tuple(together.values()), None
    for i, name in enumerate(together):
        if name not in wanted:
            continue
        one = loss_ratio.one_of(several, i, lm.config.layers)
        shared = shared or _begin(lm, rows, one, cadence)
        yield name, one, shared
    for name, policy in named.items():
        if name in wanted and name not in together:
            make_room()
            yield name, policy, _begin(lm, rows, policy, cadence)


# ---- look-ups


@dataclasses.dataclass(frozen=True)
class Asked:
    """Questions about contexts, as arrays; int32 but for the mask.

    Attributes:
      context: of c contexts, left-padded, of a multiple of `L` tokens; they are the prompts.
      rows: contexts, each as often as it has questions, each followed by a question and its answer.
      answer_bw: which of the tokens after the context are the answer.
      joined: contexts followed by all their questions and answers.
      counts: how many of the rows of each context are questions; the others fill it up.
    """

    context: Batch
    rows: Batch
    answer_bw: np.ndarray
    joined: Batch
    counts: tuple[int, ...]

    @property
    def repeats(self) -> int:
        """Rows per context."""
        return len(self.rows.length_b) // len(self.counts)

    def real(self, x_b: Array) -> list:
        """Of results per row those of questions, context by context."""
        by_context = np.asarray(x_b).reshape(len(self.counts), self.repeats).tolist()
        return [x for row, n in zip(by_context, self.counts, strict=True) for x in row[:n]]


def ask(
    contexts: Sequence[np.ndarray], lookups: Sequence[Sequence[Lookup]], shape: tuple[int, int, int]
) -> Asked:
    """Puts questions behind contexts.

    Args:
      shape: tokens of a context, rows per context, most tokens of a question and its answer.
    """
    width, repeats, room = shape
    c = len(contexts)
    token = np.zeros((c, width), np.int32)
    padding = np.array([width - len(ids) for ids in contexts], np.int32)
    after = np.zeros((c, repeats, room), np.int32)
    answer = np.zeros((c, repeats, room), bool)
    length = np.zeros((c, repeats), np.int32)
    joined = np.zeros((c, width + repeats * room), np.int32)
    ends = np.zeros(c, np.int32)
    for i, (ids, asked) in enumerate(zip(contexts, lookups, strict=True)):
        token[i, padding[i] :] = ids
        for j in range(repeats):
            one = asked[j] if j < len(asked) else asked[0]
            n = length[i, j] = len(one.ids)
            after[i, j, :n] = one.ids
            answer[i, j, len(one.question) : n] = True
        whole = np.concatenate([token[i], *(one.ids for one in asked)])
        joined[i, : len(whole)] = whole
        ends[i] = len(whole)
    rows = np.concatenate([np.repeat(token, repeats, 0), after.reshape(-1, room)], axis=1)
    pad = np.repeat(padding, repeats)
    lengths = width - pad + length.reshape(-1)
    return Asked(
        Batch(token, width - padding, width - padding, padding),
        Batch(rows, lengths, width - pad, pad),
        answer.reshape(-1, room),
        Batch.of(joined, ends, width - padding),
        tuple(len(asked) for asked in lookups),
    )


def _judge(lm, hidden_bwm, rows, answer_bw):
    """Whether each row's answer is the greedy one, and its negative log-likelihood in nats, [b]."""
    target = rows.token_bt[:, -answer_bw.shape[1] :]

    def block(hidden, target):
        log_p = _log_probs(lm, hidden)
        return log_p.argmax(-1) == target, -jnp.take_along_axis(log_p, target[:, None], -1)[:, 0]

    found = _by_blocks(block, _flat(hidden_bwm[:, :-1]), target.reshape(-1))
    hit, nll = (x.reshape(target.shape) for x in found)
    return (hit | ~answer_bw).all(-1), jnp.where(answer_bw, nll, 0.0).sum(-1)


@jax.jit
def _recall(lm, begun, policy, asked, answer_bw, key_c):
    context, rows = asked
    repeats = len(rows.length_b) // len(context.length_b)
    ended = beginnings.go_on(lm, context, begun, policy, key_c)
    if isinstance(policy, Forced):  # which lists the evictions of every row
        policy = Forced(jnp.repeat(policy.position_yebkl, repeats, axis=2))
    key_b = jnp.repeat(key_c, repeats)
    hidden, _, _ = beginnings.replay_from(lm, rows, ended, policy, key_b)
    return _judge(lm, hidden, rows, answer_bw)


@functools.partial(jax.jit, static_argnums=2)
def _golden(lm, joined, cadence):
    return golden.policy(lm, joined, cadence)[0]


def recall_full(lm: LM, asked: Asked, interval: int) -> tuple[np.ndarray, np.ndarray]:
    """`recall` of the full cache: of a budget that nothing exceeds. Contexts may be padded."""
    budget = -(-asked.rows.token_bt.shape[1] // interval) * interval
    cadence, any_policy = Cadence(budget, interval), policies.get("streaming_llm")
    key_c = replay.row_keys(key_of(0, Purpose.REPLAY), len(asked.counts))
    begun = _begin(lm, asked.context, any_policy, cadence)
    found = _recall(lm, begun, any_policy, (asked.context, asked.rows), asked.answer_bw, key_c)
    right, nll = map(np.asarray, found)
    return right, nll


def recall(
    lm: LM,
    named: Mapping[str, Policy],
    asked: Asked,
    key_c: Array,
    cadence: Cadence,
    wanted: Sequence[str],
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Which look-ups policies answer, each policy as soon as it is known.

    What is evicted before the question does not depend on it, so all questions about a context
    share the cache at its end. Golden eviction knows all of them: it is an upper bound.

    Args:
      asked: unpadded contexts of more than `B + L` tokens, with questions and answers of at most
        `L` tokens.
      named, wanted: see `agree`.

    Yields:
      A name; whether the answer is the greedy one [b]; its negative log-likelihood [b], nats.
    """

    def run(policy, begun):
        both = asked.context, asked.rows
        return map(np.asarray, _recall(lm, begun, policy, both, asked.answer_bw, key_c))

    if GOLDEN in wanted:
        forced = _golden(lm, asked.joined, cadence)
        yield GOLDEN, *run(forced, _begin(lm, asked.context, forced, cadence))
    for name, policy, begun in _begun(lm, named, asked.context, cadence, wanted):
        yield name, *run(policy, begun)


def select(
    lm: LM, contexts: Sequence[Context], shape: tuple[int, int, int], interval: int
) -> list[tuple[bool, bool]]:
    """Whether the full cache answers each candidate, and without the lines that have the answers.

    Context by context.

    Args:
      shape: see `ask`.
    """
    lookups = [context.lookups for context in contexts]
    found = []
    for ids in ([x.ids for x in contexts], [x.bare for x in contexts]):
        asked = ask(ids, lookups, shape)
        found.append(asked.real(recall_full(lm, asked, interval)[0]))
    return list(zip(*found, strict=True))
