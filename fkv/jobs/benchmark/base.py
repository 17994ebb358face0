"""What every section of the benchmark works with: its settings, arms and programs."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from fkv import policies
from fkv.cache.cadence import FULL, Cadence
from fkv.engine import decoding
from fkv.jobs.benchmark import device
from fkv.keys import Purpose, fold, key_of, keys_of
from fkv.models import LM, ModelConfig
from fkv.policies import scorer
from fkv.policies.base import Policy


@dataclasses.dataclass(frozen=True)
class Arm:
    """One thing to time.

    Attributes:
      policy: its name.
      budget: B; 0 for the full cache.
      batch: rows.
      length: tokens that the longest context has: what a full cache has room for.
      kernel: of attention while decoding.
    """

    policy: str
    budget: int
    batch: int
    length: int
    kernel: str = "plain"

    def record(self) -> dict:
        return dataclasses.asdict(self)


@dataclasses.dataclass
class Bench:
    """What every section works with.

    Attributes:
      config: the recipe.
      lm: the language model.
      peaks: what the device can do.
      limit: bytes that a program may hold.
      path: the run directory.
      end: when nothing more is begun, as `time.perf_counter` has it.
      programs: compiled programs, with the seconds that compiling took and what they hold.
    """

    config: ConfigDict
    lm: LM
    peaks: device.Peaks
    limit: int
    path: Path
    end: float = float("inf")
    programs: dict = dataclasses.field(default_factory=dict)

    @property
    def model(self) -> ModelConfig:
        return self.lm.config

    @property
    def settings(self) -> ConfigDict:
        return self.config.benchmark

    @property
    def interval(self) -> int:
        return self.config.interval

    @property
    def late(self) -> bool:
        """Whether `benchmark.minutes` are over."""
        return time.perf_counter() > self.end

    @property
    def chunks(self) -> int:
        """Timed chunks of `L` decoding steps in a repeat."""
        return -(-self.settings.new_tokens // self.interval)

    def plan(self, arm: Arm) -> decoding.Plan:
        cadence = Cadence.of(arm.budget, self.interval)
        return decoding.Plan(cadence, decoding.Sampling.of(self.settings))

    @property
    def key(self) -> jax.Array:
        return key_of(self.config.seed, Purpose.BENCHMARK)

    def row_keys(self, count: int) -> jax.Array:
        return keys_of(fold(self.key, 0), count)

    def policy(self, name: str) -> Policy:
        if name != "foresight":
            return policies.get(name)
        rules = scorer.ScorerConfig(**self.config.scorer)
        params = scorer.init(key_of(self.config.seed, Purpose.SCORER), self.model, rules)
        return policies.Foresight(params, rules)  # what untrained scorers cost, trained ones do

    def arms(
        self, batches: Sequence[int], lengths: Sequence[int], kernels: Sequence[str] = ()
    ) -> list[Arm]:
        """Every policy at every budget (the full cache once), batch, length and kernel."""
        s = self.settings
        return [
            Arm(name, budget, batch, length, kernel)
            for length in lengths
            for batch in batches
            for name in s.policies
            for budget in (s.budgets if self.policy(name).evicts else (FULL,))
            for kernel in kernels or (self.config.attention_kernel,)
        ]

    def compiled(self, key: Any, lower: Callable[[], Any]) -> tuple[Any, float, int]:
        """A program, the seconds that compiling it took, and the bytes that it holds."""
        if key not in self.programs:
            start = time.perf_counter()
            program = lower().compile()
            seconds = time.perf_counter() - start
            self.programs[key] = (program, seconds, device.program_bytes(program))
        return self.programs[key]


class DoesNotFit(Exception):
    """A program needs more memory than there is."""


def only_memory(error: Exception) -> None:
    """Raises again what is not about memory."""
    text = str(error).lower()
    if not isinstance(error, DoesNotFit) and not (
        "resource_exhausted" in text or "out of memory" in text
    ):
        raise error


def name_of(arm: Arm) -> str:
    budget = f" B={arm.budget}" if arm.budget else ""
    kernel = "" if arm.kernel == "plain" else f", {arm.kernel}"
    return f"{arm.policy}{budget}, batch {arm.batch}, length {arm.length}{kernel}"


def interleaved(bench: Bench, calls: dict[Any, Callable[[], Any]]) -> dict[Any, np.ndarray]:
    """Seconds of each call in every repeat, after one that is not counted."""
    found = {name: [] for name in calls}
    for repeat in range(bench.settings.repeats + 1):
        if repeat > 1 and bench.late:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if repeat:
                found[name].append(time.perf_counter() - start)
    return {name: np.array(x) for name, x in found.items()}


def spread(seconds_r: np.ndarray) -> dict:
    return {
        "seconds": float(np.median(seconds_r)),
        "seconds_low": float(seconds_r.min()),
        "seconds_high": float(seconds_r.max()),
    }


def random_tokens(bench: Bench, rows: int, length: int) -> np.ndarray:
    rng = np.random.default_rng(bench.config.seed)
    return rng.integers(bench.model.vocab_size, size=(rows, length)).astype(np.int32)
