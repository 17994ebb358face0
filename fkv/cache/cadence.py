"""When evictions happen: after every `L` tokens once `B + L` are held."""

import dataclasses
from typing import Self

from fkv import kinds
from fkv.errors import UserError

FULL = 0  # stands for the full cache, which has no budget, in tables


@dataclasses.dataclass(frozen=True)
class Cadence:
    """The cadence of eviction. Eviction `e` of a trace happens after `B + L + e * L` tokens.

    Attributes:
      budget: B, entries that a KV head keeps after an eviction.
      interval: L, tokens between evictions; B is a larger multiple of L.
      protect_prompt: this many tokens of a prompt, its first, are never evicted. They are part of
        the budget.

    Raises:
      UserError: the two don't fit together.
    """

    budget: int
    interval: int
    protect_prompt: int = 0

    def __post_init__(self):
        size = kinds.whole(1)
        kinds.check_fields("", self, budget=size, interval=size, protect_prompt=kinds.whole(0))
        if self.budget <= self.interval:
            raise UserError(
                f"budget = {self.budget} must be larger than interval = {self.interval}"
            )
        if self.budget % self.interval:
            raise UserError(
                f"budget = {self.budget} must be a multiple of interval = {self.interval}"
            )
        self.check_protected(1)

    def check_protected(self, intervals: int) -> None:
        """Refuses a protected prompt that leaves fewer candidates than this many intervals."""
        free = intervals * self.interval
        if self.protect_prompt > self.budget - free:
            raise UserError(
                f"protect_prompt = {self.protect_prompt} must be at most {self.budget - free}: an "
                f"eviction at budget = {self.budget}, interval = {self.interval} needs {free} "
                "other candidates"
            )

    @classmethod
    def of(cls, budget: int, interval: int, protect_prompt: int = 0) -> Self:
        """The cadence of a table's cell; for `FULL` only the interval matters."""
        return cls(budget, interval, protect_prompt) if budget else cls(2 * interval, interval)

    @property
    def slots(self) -> int:
        """Slots of a cache: B kept entries and the staging ring of L."""
        return self.budget + self.interval

    @property
    def fill_chunks(self) -> int:
        """Chunks of L tokens that fill the first B slots, before anything is evicted."""
        return self.budget // self.interval

    @property
    def first_evicting_token(self) -> int:
        """Index of the first token that attends after an eviction."""
        return self.slots

    def evictions(self, length: int) -> int:
        """Evictions of a trace of `length` tokens that affect a later token."""
        return max(0, -(-(length - self.budget) // self.interval) - 1)

    def evictions_generating(self, prompt: int, generated: int) -> int:
        """How many evictions of a generated row a later token attends after.

        Counted for heads that keep B entries; with uneven budgets some evict earlier.

        Args:
          prompt, generated: tokens of the row. The last generated token never enters attention.
        """
        cached = prompt + generated - 1
        first = (prompt - 1) % self.interval + 1  # the prompt's first chunk is the partial one
        return sum(end > self.budget for end in range(first, cached, self.interval))


def said_budget(budget: int, protect_prompt: int) -> str:
    """A budget, and how many tokens of the prompt it protects, as tables show them."""
    return f"{budget}, prompt {protect_prompt}" if budget and protect_prompt else str(budget or "")
