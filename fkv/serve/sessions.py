"""Caches of conversations that may go on: the newest few, each of one session of one model."""

from collections import OrderedDict
from typing import Any

import numpy as np


class Sessions:
    """At most `most` caches; the one used longest ago goes first.

    A session's name only finds its cache. Whether it serves a prompt, its tokens decide.

    Attributes:
      reused, missed: prompts that a cache served, and that had a session whose cache did not.
    """

    def __init__(self, most: int):
        self._most, self._kept = most, OrderedDict()
        self.reused = self.missed = 0

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, model: str, session: str, prompt: np.ndarray) -> Any | None:
        """The cache of the session, if the prompt goes on from its tokens."""
        kept = self._kept.get((model, session))
        if kept is None:
            return None
        self._kept.move_to_end((model, session))
        count = len(kept.tokens)
        if 0 < count < len(prompt) and np.array_equal(kept.tokens, prompt[:count]):
            self.reused += 1
            return kept
        self.missed += 1
        return None

    def keep(self, model: str, session: str, kept: Any) -> None:
        """Keeps a session's newest cache, in place of an older one."""
        self._kept[model, session] = kept
        self._kept.move_to_end((model, session))
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
