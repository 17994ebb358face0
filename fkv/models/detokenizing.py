"""Text of tokens as they are drawn: never half a character, never beyond a stop string."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fkv.models.chat import unsure

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_PARTS = 3  # at most so many bytes of a character wait for the rest of it


class Detokenizer:
    """The text of tokens that come one after another, without special tokens.

    The pieces together are the text of all tokens. Only a window of the newest tokens is decoded
    again, whatever came before.

    Args:
      tokenizer: of `transformers`, or None: there is no text then.
      stop: strings that end the text, before the first of them that is complete.

    Attributes:
      stopped: a stop string came.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        # Tokens of the window, how many of them were there at the last shift, characters shown.
        self._window, self._read, self._shown = [], 0, 0
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False

    def add(self, tokens: Sequence[int], last: bool = False) -> tuple[str, int]:
        """The text that is sure after more tokens, and how many of these belong to the answer.

        That is all of them unless a stop string came: then those up to its end.

        Args:
          last: none follows.
        """
        before = copy.copy(self)
        before._window = list(self._window)
        piece = self._add(tokens, last)
        if not self.stopped:
            return piece, len(tokens)
        for count, token in enumerate(tokens, 1):
            before._add([token], False)
            if before.stopped:
                return piece, count
        return piece, len(tokens)

    def _add(self, tokens, last):
        self._held += self._decoded(tokens, last)
        found = [(at + len(x), at) for x in self._stop if (at := self._held.find(x)) >= 0]
        if found:
            self.stopped, sure = True, min(found)[1]
        else:
            sure = len(self._held) - (0 if last else unsure(self._held, *self._stop))
        piece, self._held = self._held[:sure], self._held[sure:]
        return piece

    def _decoded(self, tokens, last):
        """New text, of whole characters."""
        if self._tokenizer is None:
            return ""
        self._window += [int(x) for x in tokens]
        text = self._text(self._window)
        cut = len(text) - len(text.rstrip(_UNKNOWN))
        sure = len(text) - (0 if last else min(cut, _PARTS))
        piece, self._shown = text[self._shown : sure], max(sure, self._shown)
        # The next window begins with the tokens of this piece: what a token's text is may depend on
        # the one before.
        kept = self._window[self._read :]
        if not cut and (front := self._text(kept)).strip():
            self._window, self._read, self._shown = kept, len(kept), len(front)
        return piece

    def _text(self, tokens):
        return self._tokenizer.decode(np.asarray(tokens, np.int32), skip_special_tokens=True)


def until(tokenizer: Any, stop: Sequence[str]) -> Callable[[np.ndarray], int | None]:
    """A function that takes an answer's tokens as they come, and tells where a stop string ends it.

    It returns how many of the tokens of this call belong to the answer then, and None before.
    """
    text = Detokenizer(tokenizer, stop)

    def take(tokens: np.ndarray) -> int | None:
        count = text.add(tokens)[1]
        return count if text.stopped else None

    return take
