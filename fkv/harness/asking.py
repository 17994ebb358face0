"""What harnesses ask of a model, answered under a policy: text that goes on, and likelihoods.

A text goes on by the batcher, a given one is replayed. Both read the context first, in the same
chunks, and evict as they go, so that a likelihood is that of an answer written token by token.
"""

import binascii
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from fkv import api
from fkv.api import Model
from fkv.cache.cadence import Cadence
from fkv.engine.answers import Answer
from fkv.engine.batch import rounded
from fkv.engine.batcher import Batcher, Request
from fkv.engine.sampling import Sampling
from fkv.errors import UserError
from fkv.evaluation import scoring
from fkv.keys import Purpose, fold, key_of
from fkv.policies.base import Policy

GREEDY = Sampling(0.0)
_SLAB = 4  # passes of likelihoods between two looks at what else is to be done


@dataclasses.dataclass(frozen=True)
class Writing:
    """A generation request: a prompt to continue.

    Attributes:
      prompt: token ids, int32 [t].
      limit: most new tokens.
      sampling: of these.
      until: strings that end the text, which leaves them out.
      stop: tokens that end it, besides the model's.
      number: which of several samples of one prompt it is.
      cut: tokens that were left out of the prompt's beginning.
    """

    prompt: np.ndarray
    limit: int
    sampling: Sampling = GREEDY
    until: tuple[str, ...] = ()
    stop: tuple[int, ...] = ()
    number: int = 0
    cut: int = 0


@dataclasses.dataclass(frozen=True)
class Reading:
    """A scoring request: a text whose log-likelihood is asked for, in one window or several.

    Attributes:
      windows: token ids [t] of each, and how many of these are context.
      cut: tokens that were left out of the beginning.
    """

    windows: tuple[tuple[np.ndarray, int], ...]
    cut: int = 0


@dataclasses.dataclass(frozen=True)
class Reply:
    """To one `Writing` or `Reading`.

    Attributes:
      text, ids: what a `Writing` brought; the tokens, int32 [n].
      logprob, greedy: of a `Reading`, nats; whether each of its tokens was the likeliest.
      tokens: new ones of a `Writing`, counted ones of a `Reading`.
      context: tokens before these.
      evictions: of a head, in all windows, those after which a token attends.
      cut: tokens that were left out of the beginning.
    """

    tokens: int
    context: int
    evictions: int
    cut: int
    text: str = ""
    ids: np.ndarray | None = None
    logprob: float = 0.0
    greedy: bool = False


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model under a policy, as harnesses see it.

    Attributes:
      model: with weights, or without to prepare requests only.
      policy, cadence: of evictions.
      rows: requests at a time; no result depends on it.
      seed: of all draws.
      rest: called every now and then; may raise to end.
    """

    model: Model
    policy: Policy
    cadence: Cadence
    rows: int = 16
    seed: int = 0
    rest: Callable[[], None] = lambda: None

    def write(self, asked: Sequence[Writing], room: int = 0) -> Iterator[tuple[int, Reply]]:
        """Lets texts go on.

        What a text becomes depends on its own prompt, number and settings.

        Args:
          room: tokens of a prompt and its answer, at least those of any that is asked; the shape of
            the caches depends on it.

        Yields:
          Index and reply, as texts end.

        Raises:
          UserError: the model's logits are no numbers.
        """
        if not asked:
            return
        room = max(room, *(len(one.prompt) + one.limit for one in asked))
        rows, unit = min(self.rows, len(asked)), self.cadence.interval
        batcher = Batcher(
            self.model.lm, self.policy, self.cadence, rows, rounded(room, unit), top=None
        )
        numbers = [one.number for one in asked]
        keys = _keys(self.seed, [one.prompt for one in asked], numbers)
        going = {}
        # The longest first: short ones fill the rows that become free at the end.
        for i in sorted(range(len(asked)), key=lambda i: -len(asked[i].prompt)):
            one = asked[i]
            stop = tuple(dict.fromkeys((*self.model.stop, *one.stop)))
            request = Request(one.prompt, keys[i], one.limit, one.sampling, stop)
            model = dataclasses.replace(self.model, stop=stop)
            going[batcher.submit(request)] = i, Answer(model, one.until)
        while going:
            for event in batcher.step():
                if event.id not in going:  # ended by a string
                    continue
                i, answer = going[event.id]
                if event.finish == "error":
                    raise api.not_finite(self.model)
                answer.add(event.tokens, event.finish)
                if answer.finish is not None:
                    del going[event.id]
                    batcher.cancel(event.id)
                    ids, context = np.array(answer.tokens, np.int32), len(asked[i].prompt)
                    fired = self._evictions(context, len(ids))
                    yield i, Reply(len(ids), context, fired, asked[i].cut, answer.text, ids)
            self.rest()

    def read(self, asked: Sequence[Reading]) -> Iterator[tuple[int, Reply]]:
        """Likelihoods of texts.

        What is found for one depends on its own tokens: policies that draw do so by the context,
        and so alike for all that may follow it, or where that is a single token by the whole.

        Yields:
          Index and reply, the longest first.

        Raises:
          UserError: the model's logits are no numbers.
        """
        windows = [(i, *window) for i, one in enumerate(asked) for window in one.windows]
        left = [len(one.windows) for one in asked]
        found: list[list[scoring.Scored]] = [[] for _ in asked]
        for i, one in enumerate(asked):
            if not one.windows:  # an empty text
                yield i, Reply(0, 0, 0, one.cut, greedy=True)
        # Widths come apart only at the borders of slabs.
        windows.sort(key=lambda window: -len(window[1]))
        slab = self.rows * _SLAB
        for start in range(0, len(windows), slab):
            some = windows[start : start + slab]
            _, tokens, contexts = zip(*some, strict=True)
            seen = [x[:n] if n > 1 else x for x, n in zip(tokens, contexts, strict=True)]
            keys = _keys(self.seed, seen, [0] * len(some))
            scored = scoring.score(
                self.model.lm, self.policy, self.cadence, tokens, contexts, rows=self.rows,
                keys=keys,
            )  # fmt: skip
            for (i, *_), one in zip(some, scored, strict=True):
                found[i].append(one)
                left[i] -= 1
                if not left[i]:
                    yield i, self._read(asked[i], found[i])
            self.rest()

    def _read(self, asked: Reading, found: Sequence[scoring.Scored]) -> Reply:
        fired = [self._evictions(n, len(tokens) - n) for tokens, n in asked.windows]
        return Reply(
            sum(len(one.nll) for one in found),
            asked.windows[0][1],
            sum(fired),
            asked.cut,
            # In double precision: a document has many tokens, and their order is not fixed.
            logprob=-float(np.sum([one.nll.sum(dtype=np.float64) for one in found])),
            greedy=all(one.greedy.all() for one in found),
        )

    def _evictions(self, context: int, tokens: int) -> int:
        if not self.policy.evicts or not tokens:
            return 0
        return self.cadence.evictions_generating(context, tokens)


def _keys(seed: int, texts: Sequence[np.ndarray], numbers: Sequence[int]) -> jax.Array:
    """A PRNG key for each text and number."""
    digests = [binascii.crc32(np.asarray(one, np.int32).tobytes()) for one in texts]
    root = key_of(seed, Purpose.ANSWER)
    indices = np.array(digests, np.uint32), np.array(numbers, np.uint32)
    return jax.vmap(lambda i, j: fold(root, i, j))(*indices)


def reading(tokens: Sequence[int], context: int, most: int, what: str) -> Reading:
    """The likelihood of what follows a context, of which the beginning is cut off if need be.

    Args:
      tokens: context and continuation.
      context: how many tokens are the context.
      most: tokens that the model reads; the last one, which it only predicts, is not counted.
      what: names the request in errors.

    Raises:
      UserError: the continuation has no tokens, or too many.
    """
    count = len(tokens) - context
    if not count:
        raise UserError(f"{what}: the tokenizer makes no tokens of the continuation")
    if count > most:
        raise UserError(
            f"{what} has a continuation of {count} tokens, and the model reads {most}: raise "
            "max_length"
        )
    cut = max(len(tokens) - (most + 1), 0)
    return Reading(((np.asarray(tokens[cut:], np.int32), context - cut),), cut)
