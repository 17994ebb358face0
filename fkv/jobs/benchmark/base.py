"""What the sections share: arms, compiled programs, and interleaved measurement."""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from fkv import policies
from fkv.cache.cadence import FULL
from fkv.engine.batcher import Batcher
from fkv.engine.requests import Plan, Request
from fkv.engine.sampling import Sampling
from fkv.jobs import common, groups, programs
from fkv.jobs.benchmark import device
from fkv.jobs.benchmark.device import timed
from fkv.keys import Purpose, fold, key_of, keys_of
from fkv.models import LM
from fkv.policies.base import Policy

DOES_NOT_FIT = "does not fit"


class Unmeasured(Exception):
    """An arm can't be measured; says why."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One thing to measure.

    Attributes:
      policy: its name.
      budget: B; `FULL` for the full cache.
      batch: rows.
      length: tokens of the longest context: what a full cache has room for.
    """

    policy: str
    budget: int
    batch: int
    length: int

    def __str__(self) -> str:
        budget = f" B={self.budget}" if self.budget else ""
        return f"{self.policy}{budget}, batch {self.batch}, length {self.length}"


@dataclasses.dataclass
class Bench:
    """What every section works with.

    Attributes:
      config, settings: the recipe, and its group `benchmark`.
      peaks: of the device.
      limit: bytes that a program may hold.
      path: the run directory.
      end: the deadline for starting a measurement, on the clock of `time.perf_counter`.
      programs: see `compiled`.
    """

    config: ConfigDict
    settings: groups.Benchmark
    lm: LM
    peaks: device.Peaks
    limit: int
    path: Path
    end: float = float("inf")
    programs: dict = dataclasses.field(default_factory=dict)

    @property
    def interval(self) -> int:
        return self.config.interval

    @property
    def late(self) -> bool:
        """Whether the deadline, `benchmark.minutes`, is exceeded."""
        return time.perf_counter() > self.end

    @property
    def key(self) -> jax.Array:
        return key_of(self.config.seed, Purpose.BENCHMARK)

    def row_keys(self, count: int) -> jax.Array:
        return keys_of(fold(self.key, 0), count)

    def tokens(self, rows: int, length: int) -> np.ndarray:
        """Random traces."""
        rng = np.random.default_rng(self.config.seed)
        return rng.integers(self.lm.config.vocab_size, size=(rows, length)).astype(np.int32)

    def plan(self, budget: int) -> Plan:
        sampling = Sampling.of(vars(self.settings))
        return Plan(common.cadence(self.config, budget), sampling)

    def batcher(self, policy: str, plan: Plan, shape: tuple[int, int, int]) -> Batcher:
        """A batcher of so many rows, tokens of a prompt, and tokens of an answer."""
        rows, prompt, new = shape
        policy = self.policy(policy)
        return Batcher(self.lm, policy, plan.cadence, rows, prompt + new, top=None)

    def submit(
        self, batcher: Batcher, plan: Plan, prompts: np.ndarray, new: int | np.ndarray
    ) -> list[int]:
        """Has prompts [b, t] answered by so many tokens, or [b] of them; returns their ids."""
        keys, new = self.row_keys(len(prompts)), np.broadcast_to(new, len(prompts)).tolist()
        return [
            batcher.submit(Request(prompt, key, limit, plan.sampling))
            for prompt, key, limit in zip(prompts, keys, new, strict=True)
        ]

    def policy(self, name: str) -> Policy:
        """By its name; `foresight` with untrained scorers, which cost what trained ones do."""
        if name != "foresight":
            return policies.get(name)
        return programs.new_scorers(self.config, self.lm.config)

    def arms(self, batches: Sequence[int], lengths: Sequence[int]) -> list[Arm]:
        """Every policy at every budget (the full cache once), batch and length."""
        s = self.settings
        return [
            Arm(name, budget, batch, length)
            for length in lengths
            for batch in batches
            for name in s.policies
            for budget in (s.budgets if self.policy(name).evicts else (FULL,))
        ]

    def compiled(self, key: Any, lower: Callable[[], Any]) -> tuple[Any, dict]:
        """A program, compiled once, with the seconds that this took and the bytes that it holds.

        Raises:
          Unmeasured: it does not fit.
        """
        if key not in self.programs:
            seconds, program = timed(lambda: lower().compile())
            about = {"program_bytes": device.program_bytes(program), "compile_s": seconds}
            self.programs[key] = program, about
        self.check_fits(self.programs[key][1]["program_bytes"])
        return self.programs[key]

    def check_fits(self, size: int) -> None:
        if size > self.limit:
            raise Unmeasured(DOES_NOT_FIT)


# ---- measuring


def failure(call: Callable, *args) -> str:
    """Why a call fails, if it does: out of memory, or `Unmeasured`; other errors are raised."""
    try:
        call(*args)
    except Unmeasured as error:
        return str(error)
    except jax.errors.JaxRuntimeError as error:
        text = str(error).lower()
        if "resource_exhausted" not in text and "out of memory" not in text:
            raise
        return DOES_NOT_FIT
    return ""


def measure(
    bench: Bench,
    arms: Iterable[Any],
    prepare: Callable[[Any], tuple[Callable[[], Any], dict]],
    record: Callable[[Any, dict[Any, list]], dict],
) -> list[dict]:
    """Measures arms, interleaved over the repeats.

    Args:
      arms: dataclasses, of which records have the fields.
      prepare: compiles and warms up an arm; returns a function that measures it once, and more
        fields of its record.
      record: summary of an arm, from the results of all arms.

    Returns:
      A record of every arm, with an `error` where it could not be measured.
    """
    arms, ready, why = list(arms), {}, {}
    found = collections.defaultdict(list)

    def once(arm):
        if arm not in ready:
            ready[arm] = prepare(arm)
        found[arm].append(ready[arm][0]())

    for repeat in range(bench.settings.repeats):
        for arm in arms:
            if not why.get(arm) and not bench.late:
                common.say(f"  repeat {repeat + 1}: {arm}")
                why[arm] = failure(once, arm)
    records = []
    for arm in arms:
        fits = why.get(arm) == ""
        more = {**record(arm, found), **ready[arm][1]} if fits else {}
        more = more or {"error": why.get(arm, "deadline exceeded")}
        records.append({**dataclasses.asdict(arm), "fits": fits, **more})
    return records


def spread(name: str, x_r: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum over repeats."""
    found = {name: np.median(x_r), f"{name}_low": np.min(x_r), f"{name}_high": np.max(x_r)}
    return {key: float(x) for key, x in found.items()}
