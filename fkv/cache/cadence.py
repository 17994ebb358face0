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

    Raises:
      UserError: the two don't fit together.
    """

    budget: int
    interval: int

    def __post_init__(self):
        kinds.check_fields("", self, budget=kinds.whole(1), interval=kinds.whole(1))
        if self.budget <= self.interval:
            raise UserError(
                f"budget = {self.budget} must be larger than interval = {self.interval}"
            )
        if self.budget % self.interval:
            raise UserError(
                f"budget = {self.budget} must be a multiple of interval = {self.interval}"
            )

    @classmethod
    def of(cls, budget: int, interval: int) -> Self:
        """The cadence of a table's cell; for `FULL` only the interval matters."""
        return cls(budget or 2 * interval, interval)

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
