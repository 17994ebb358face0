"""Caches of conversations that may go on: the newest few, each of one session of one model."""

from collections import OrderedDict

import numpy as np

from fkv.engine.requests import Kept


class Sessions:
    """At most `most` caches; the one used longest ago goes first.

    A session's name only finds its cache. What of it serves a prompt, its tokens decide.

    Attributes:
      reused, missed: prompts that a cache served, and that had a session whose cache did not.
      tokens: of prompts that were not read again.
    """

    def __init__(self, most: int):
        self._most, self._kept = most, OrderedDict()
        self.reused = self.missed = self.tokens = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def bytes(self) -> int:
        """That all caches take."""
        return sum(kept.bytes for kept in self._kept.values())

    def find(self, model: str, session: str, prompt: np.ndarray) -> Kept | None:
        """What of the session's cache serves a prompt: the longest beginning that it can."""
        kept = self._kept.get((model, session))
        if kept is None:
            return None
        self._kept.move_to_end((model, session))
        found = kept.serving(prompt)
        if found is None:
            self.missed += 1
            return None
        self.reused += 1
        self.tokens += len(found.tokens)
        return found

    def keep(self, model: str, session: str, kept: Kept) -> None:
        """Keeps a session's newest cache, in place of an older one."""
        self._kept[model, session] = kept
        self._kept.move_to_end((model, session))
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
