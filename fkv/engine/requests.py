"""What is asked of the batcher, and what it tells."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fkv import kinds
from fkv.cache.cadence import Cadence
from fkv.engine.sampling import FREE, Sampling
from fkv.errors import UserError
from fkv.policies.base import Policy

STOPS = 64  # a request's stop tokens, at most
PIECE = 1024  # tokens of a prompt that are read between steps, by default
_TOGETHER = 8, 2, 1  # prompts that are read at a time: few numbers, as each is compiled for


@dataclasses.dataclass(frozen=True)
class Plan:
    """How answers are made, in a job that asks for many alike.

    Attributes:
      cadence: of evictions; for a policy that does not evict, only the interval is used.
      sampling: of the tokens.
      stop: tokens that end an answer.
    """

    cadence: Cadence
    sampling: Sampling = FREE
    stop: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Kept:
    """The cache of an answer, for requests that continue from it or from a part of it.

    It may be used several times. A request that continues has its next evictions earlier than an
    uninterrupted one, whose chunks are not cut by the end of an answer. Where nothing is evicted,
    both are the same up to rounding.

    Attributes:
      tokens: those that entered it: all of prompt and answer but the last, which was only drawn.
      held: per layer, as `reading.read_layer` leaves it: entries and, for a policy that evicts, the
        chunk of which the next eviction is to come. It may hold later tokens' entries, too.
      entries: that a head holds of `tokens`.
      evictions: of a head so far.
      made_by: what the batcher that continues must have in common: policy, cadence and sizes.
      least: the fewest of its tokens that it can be cut to: later evictions have not seen more.
      before: the cache at the end of the prompt, if the answer's can't be cut to it.
    """

    tokens: np.ndarray
    held: tuple[Any, ...]
    entries: int
    evictions: int
    made_by: tuple[Policy, Cadence, tuple[int, int]]
    least: int = 1
    before: "Kept | None" = None

    @property
    def bytes(self) -> int:
        """That it takes."""
        mine = sum(x.nbytes for x in jax.tree.leaves(self.held))
        return mine + (self.before.bytes if self.before else 0)

    def serving(self, prompt: np.ndarray) -> "Kept | None":
        """Cut to the longest beginning that it has in common with a prompt, if it can be.

        At least one token of the prompt is left to read.
        """
        most = min(len(self.tokens), len(prompt) - 1)
        other = np.flatnonzero(self.tokens[:most] != prompt[:most])
        count = int(other[0]) if len(other) else most
        if count >= self.least:
            entries = self.entries - (len(self.tokens) - count)
            return dataclasses.replace(
                self, tokens=self.tokens[:count], entries=entries, before=None
            )
        return self.before.serving(prompt) if self.before else None


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be answered.

    Attributes:
      prompt: token ids, int32, at least one.
      key: PRNG key: equal keys and prompts, equal tokens.
      limit: new tokens, at most.
      sampling: of the tokens.
      stop: tokens that end the answer, at most 64.
      logprobs: so many of the likeliest tokens beside each, at most the batcher's `top`.
      kept: the cache of an earlier answer, with whose tokens `prompt` begins; only the rest is
        read.
      keep: hand out the cache at the end.
      until: makes a function that is called with tokens as they are drawn, stop tokens left out. It
        returns how many of these belong to the answer if it ends there (by a stop string), or None.
    """

    prompt: np.ndarray
    key: Array
    limit: int
    sampling: Sampling = FREE
    stop: tuple[int, ...] = ()
    logprobs: int = 0
    kept: Kept | None = None
    keep: bool = False
    until: Callable[[], Callable[[np.ndarray], int | None]] | None = None


@dataclasses.dataclass(frozen=True)
class Event:
    """What a step brought for a request.

    Attributes:
      id: as `submit` gave it.
      tokens: ids since its last event, int32 [n]; a stop token is the last.
      logprobs: of each, by the model's own distribution, before temperature or top-k: float32 [n];
        NaN in a batcher that computes none.
      top: of the likeliest tokens ids and logprobs, [n, logprobs] each; None if not asked for.
      finish: None while it goes on; `stop`, `length`, `cancelled`, or `error` where the logits are
        NaN or infinite.
      evictions: of a head so far, those after which a token attends.
      kept: the cache at the end, if it was to be kept and the request was not cut off.
      entries: that a head holds, where heads share the budget evenly.
    """

    id: int
    tokens: np.ndarray
    logprobs: np.ndarray
    top: tuple[np.ndarray, np.ndarray] | None
    finish: str | None
    evictions: int
    kept: Kept | None = None
    entries: int = 0


def cut(
    prompt: np.ndarray, interval: int, piece: int, first: int = 0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """A prompt in pieces: tokens and positions [1, t] of each.

    All but the first have `piece` tokens. The first is padded on the left, to one of few widths:
    1, 2, 3, 4, 6, 8, 12, 16 ... chunks.

    Args:
      first: position of the first token.
    """
    count = (len(prompt) - 1) % piece + 1
    chunks = -(-count // interval)
    unit = 1 << max((chunks - 1).bit_length() - 2, 0)
    width = min(-(-chunks // unit) * unit * interval, piece)
    token = np.concatenate([np.zeros(width - count, np.int32), np.asarray(prompt, np.int32)])
    index = np.arange(len(token), dtype=np.int32) - (width - count)
    position = np.where(index < 0, -1, index + np.int32(first))
    ends = range(width, len(token) + 1, piece)
    starts = [0, *ends][:-1]
    return [(token[None, i:j], position[None, i:j]) for i, j in zip(starts, ends, strict=True)]


def piece_of(interval: int, piece: int | None = None) -> int:
    """Tokens of a piece: about so many, in whole chunks."""
    return -(-(piece or PIECE) // interval) * interval


def together(waiting: int, width: int, piece: int) -> int:
    """How many of the prompts of this padded width that wait are read at a time."""
    return next(n for n in _TOGETHER if n <= min(waiting, max(piece // width, 1)))


def check(request: Request, vocab: int, length: int, top: int | None) -> None:
    """Refuses a request that could never be answered."""
    prompt = np.asarray(request.prompt)
    if prompt.ndim != 1 or not prompt.size:
        raise UserError("the prompt is empty: give at least one token")
    if prompt.dtype.kind not in "iu":
        raise UserError(f"the prompt has {prompt.dtype} entries: give whole token ids")
    unknown = prompt[(prompt < 0) | (prompt >= vocab)]
    if unknown.size:
        raise UserError(f"the prompt has token {unknown[0]}, beyond the model's {vocab}")
    kinds.check("limit", request.limit, kinds.whole(1))
    if len(prompt) + request.limit > length:
        raise UserError(
            f"the prompt of {len(prompt)} tokens and limit = {request.limit} exceed the {length} "
            "tokens of a row: shorten either"
        )
    if not isinstance(request.sampling, Sampling):
        raise UserError(f"sampling = {kinds.said(request.sampling)} must be a Sampling")
    if len(request.stop) > STOPS:
        raise UserError(f"stop has {len(request.stop)} tokens: at most {STOPS} are allowed")
    for token in request.stop:
        kinds.check("stop: a token", token, kinds.whole(0))
    kinds.check("logprobs", request.logprobs, kinds.whole(0))
    if request.logprobs > (top or 0):
        raise UserError(f"logprobs = {request.logprobs} must be at most {top or 0}")
    kinds.check("keep", request.keep, kinds.SWITCH)
    if (kept := request.kept) is not None:
        count = len(kept.tokens)
        if not np.array_equal(kept.tokens, prompt[:count]) or count >= len(prompt):
            raise UserError(
                f"the prompt of {len(prompt)} tokens does not continue the {count} of kept"
            )
    key = request.key
    is_key = isinstance(key, Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not is_key or key.shape:
        raise UserError(f"key = {kinds.said(key)} must be one PRNG key of jax.random.key")
