"""What the measurements of several jobs share: the open run, batches, and turns of processes."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from fkv import kinds
from fkv.api import Model
from fkv.cache.cadence import Cadence
from fkv.errors import UserError
from fkv.evaluation import answers, loss_ratio, recall
from fkv.evaluation.answers import Samples
from fkv.jobs import common
from fkv.policies.base import Policy, trained_at
from fkv.runs import parallel, preemption
from fkv.runs.rundir import Run

COUNT, NATS = kinds.whole(0), kinds.number(0)
CELL = {"policy": kinds.TEXT, "budget": COUNT, "interval": COUNT}  # of every result


@dataclasses.dataclass(frozen=True)
class Part:
    """A batch that is measured at once.

    Attributes:
      ids: of its prompts or look-ups.
      measure: from a cadence and the names of policies to their rows, without budget and interval.
    """

    ids: Sequence[str]
    measure: Callable[[Cadence, Sequence[str]], Iterator[list[dict]]]


@dataclasses.dataclass(frozen=True)
class Job:
    """An open run with what all of its measurements need."""

    config: ConfigDict
    run: Run
    model: Model
    named: dict[str, Policy]
    asked_to_end: Callable[[], bool]

    settings = property(lambda self: self.config.recall)

    def store(self, name: str, form: answers.Form, interval: bool = False) -> Samples:
        """The file of that name in the run directory."""
        return Samples(self.run.path / name, self.config.interval if interval else None, form)

    @property
    def baseline(self) -> str:
        """The policy that others are compared with; empty for the best rule-based one."""
        return self.config.eval.baseline

    def check_end(self) -> None:
        """Ends the run where the process was asked to."""
        if parallel.anywhere(self.asked_to_end()):
            self.run.close()
            raise preemption.Preempted(f"what was measured is in {self.run.path}")

    def batches(self, items: Sequence) -> list[list]:
        """In batches of `recall.batch`."""
        size = self.settings.batch
        return [list(items[i : i + size]) for i in range(0, len(items), size)]

    def filled(self, part: Sequence) -> list:
        """A batch, filled up with copies of its first entry, for a single program."""
        return [*part, *[part[0]] * (self.settings.batch - len(part))]


def measure(job: Job, parts: Sequence[Part], at: Sequence[Cadence], store: Samples) -> None:
    """Measures what the store lacks; processes take turns."""
    names = [recall.GOLDEN, *job.named]
    total = len(parts) * len(at) * len(names)
    index, count = jax.process_index(), jax.process_count()
    with common.progress(total=total, desc=store.path.stem) as bar:
        for start in range(0, len(parts), count):
            together = parts[start : start + count]
            ids = [one for part in together for one in part.ids]
            for cadence in at:
                there = cadence.budget
                wanted = [n for n in names if any((n, there, i) not in store.rows for i in ids)]
                bar.update((len(names) - len(wanted)) * len(together))
                mine = together[index] if wanted and index < len(together) else None
                results = iter(()) if mine is None else mine.measure(cadence, wanted)
                for _ in wanted:
                    rows = [
                        {"budget": there, "interval": cadence.interval, **row}
                        for row in next(results, [])
                    ]
                    rows = [r for r in parallel.share(rows) if store.form.key(r) not in store.rows]
                    _check_finite(job, rows)
                    store.add(rows)
                    bar.update(len(together))
                    job.check_end()


def _check_finite(job: Job, rows: Sequence[dict]) -> None:
    for row in rows:
        if not np.isfinite(row.get("kl", row.get("nll", 0.0))).all():
            raise UserError(
                f"results of {row['policy']!r} at budget {row['budget']} are NaN or infinite with "
                f"the language model in {job.config.dtype}: set dtype to one with a wider range"
            )


def cells(job: Job, at: Sequence[Cadence]) -> Iterator[tuple[str, int, dict]]:
    """Name, budget, and what tables say of them, of all but the full cache."""
    for cadence in at:
        for name in (recall.GOLDEN, *job.named):
            policy = job.named.get(name)
            about = {
                "rule": loss_ratio.is_rule(policy),
                "trained": trained_at(policy, cadence.interval),
            }
            yield name, cadence.budget, about | {"protect_prompt": cadence.protect_prompt}
