"""Answers as their tokens come: text in pieces, stop strings, and what is said at the end."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jax import Array

from fkv.cache.cadence import Cadence
from fkv.engine.batcher import Batcher
from fkv.engine.compressed import Compressed
from fkv.engine.requests import Request
from fkv.errors import UserError
from fkv.kinds import said
from fkv.models import detokenizing
from fkv.models.detokenizing import Detokenizer
from fkv.models.named import Model
from fkv.policies.base import Policy

Top = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Origin:
    """How an answer was made, for who replays it.

    Attributes:
      model: its name, and its revision if it has one.
      prompt: token ids, int32 [t]; with a `context`, its text first.
      policy, cadence: of its cache.
      key: of its row.
      context: the text that was read before, if any.
    """

    model: str
    prompt: np.ndarray
    policy: Policy
    cadence: Cadence
    key: Array
    context: Compressed | None = None


@dataclasses.dataclass(frozen=True)
class Generation:
    """One sampled continuation.

    Attributes:
      text: decoded without special tokens, and without the stop token or string that ended it;
        empty when the model has no tokenizer.
      tokens: ids [n], the stop token included, or those of the stop string.
      finish: what ended it: `stop`, a stop token or string, or `length`, the limit on new tokens.
      evictions: of a head, those after which a token attends.
      prompt_tokens: of its prompt.
      cache_bytes: keys, values and positions of its cache: B + L entries of a head, whatever the
        length (more of policies that share the budget unevenly), or with a full cache the prompt
        and the answer.
      logprobs: float32 [n], of each token under the model's own distribution, before temperature
        and top-k; None unless asked for.
      top: likeliest tokens, ids [n, top] and their logprobs [n, top]; None unless asked for.
      origin: how it was made; None if that is not known.
    """

    text: str
    tokens: np.ndarray
    finish: str
    evictions: int
    prompt_tokens: int = 0
    cache_bytes: int = 0
    logprobs: np.ndarray | None = None
    top: Top | None = None
    origin: Origin | None = dataclasses.field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        ended = {"stop": "ended by itself", "length": "cut off"}.get(self.finish, self.finish)
        text = self.text if len(self.text) <= 60 else f"{self.text[:40]} ... {self.text[-15:]}"
        size = f"{self.cache_bytes / 2**20:,.2f} MiB of cache"
        return (
            f"Generation({text!r}, {len(self.tokens):,} tokens, {ended}, "
            f"{self.evictions:,} evictions, {size})"
        )

    @property
    def truncated(self) -> bool:
        """The limit on new tokens came before a stop token or string."""
        return self.finish == "length"


class Answer:
    """One answer in the making.

    Args:
      model: its tokenizer and stop tokens.
      stop: strings that end the answer.

    Attributes:
      tokens: all so far.
      pieces: their text; together it is the answer's.
      logprobs, top: of these tokens, an array for each call of `add`.
      finish: what ended it, None while it goes on.
    """

    def __init__(self, model: Model, stop: Sequence[str] = ()):
        if stop and model.tokenizer is None:
            raise UserError(f"model {model.name} has no tokenizer: stop = {said(stop)} is text")
        self._model, self._text = model, Detokenizer(model.tokenizer, stop)
        self.tokens: list[int] = []
        self.pieces: list[str] = []
        self.logprobs: list[np.ndarray] = []
        self.top: list[Top] = []
        self.finish: str | None = None

    def add(
        self,
        tokens: np.ndarray,
        finish: str | None = None,
        logprobs: np.ndarray | None = None,
        top: Top | None = None,
    ) -> str:
        """Takes more tokens, and returns the text that is sure now.

        Tokens behind a stop string are dropped: `finish` is then `stop`, and what makes them should
        end. Those that come after `finish` are dropped, too.

        Args:
          finish: nothing follows, and why.
        """
        if self.finish is not None:
            return ""
        # A stop token is no text, whether it is marked as special or not.
        ends = finish == "stop" and len(tokens) and int(tokens[-1]) in self._model.stop
        piece, count = self._text.add(tokens[:-1] if ends else tokens, finish is not None)
        count += ends and not self._text.stopped
        self.tokens += [int(x) for x in tokens[:count]]
        self.pieces.append(piece)
        if logprobs is not None:
            self.logprobs.append(logprobs[:count])
        if top is not None:
            self.top.append(tuple(x[:count] for x in top))
        self.finish = "stop" if self._text.stopped else finish
        return piece

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def generation(
        self,
        evictions: int,
        prompt_tokens: int,
        cache_bytes: int,
        origin: Origin | None = None,
    ) -> Generation:
        """What it is at the end."""
        join = np.concatenate
        top = tuple(map(join, zip(*self.top, strict=True))) if self.top else None
        return Generation(
            self.text,
            np.asarray(self.tokens, np.int32),
            self.finish or "length",
            evictions,
            prompt_tokens,
            cache_bytes,
            join(self.logprobs) if self.logprobs else None,
            top,
            origin,
        )


def pieces(
    model: Model,
    batcher: Batcher,
    requests: Sequence[Request],
    answers: Sequence[Answer],
    top: int | None = None,
    every: int | None = None,
) -> Iterator[str]:
    """Has requests answered; yields pieces of text as they come, whosever they are.

    Args:
      answers: of the requests, which take what comes.
      top: of the likeliest tokens beside each; None for no logprobs.
      every: tokens between two pieces.

    Raises:
      UserError: the model's logits are NaN or infinite.
    """
    going = dict(zip([batcher.submit(one) for one in requests], answers, strict=True))
    while going:
        for event in batcher.step(every):
            answer = going[event.id]
            if event.finish == "error":
                raise not_finite(model)
            logprobs = None if top is None else event.logprobs
            yield answer.add(event.tokens, event.finish, logprobs, event.top)
            if event.finish is not None:
                del going[event.id]


def until(model: Model, stop: tuple[str, ...]) -> Callable[[], Any] | None:
    """`Request.until` of stop strings; None without any."""
    return functools.partial(detokenizing.until, model.tokenizer, stop) if stop else None


def not_finite(model: Model) -> UserError:
    """What is said where the model's logits are no numbers."""
    dtype = dtype_of(model)
    other = "float32" if dtype == "bfloat16" else "bfloat16 or float32"
    cure = "check its weights" if dtype == "float32" else f"set dtype to {other}"
    return UserError(f"the language model's logits are NaN or infinite in {dtype}: {cure}")


def dtype_of(model: Model) -> str:
    return str(model.lm.params["embed_vm"].dtype) if model.lm.params else "float32"


def stop_strings(value: str | Sequence[str], what: str = "stop", most: int = 16) -> tuple[str, ...]:
    """One stop string or several.

    Raises:
      UserError: they are none, are empty or too many.
    """
    given = (value,) if isinstance(value, str) else value
    listed = isinstance(given, Sequence) and not isinstance(given, bytes)
    if not listed or not all(isinstance(x, str) and 0 < len(x) <= 1024 for x in given):
        raise UserError(f"{what} = {said(value)} must be text of 1 to 1024 characters, or several")
    if len(given) > most:
        raise UserError(f"{what} has {len(given)} texts: at most {most} are allowed")
    return tuple(given)
