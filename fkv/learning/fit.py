"""The training loop of every stage: updates, metrics, checkpoints and preemption."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from fkv import kinds
from fkv.errors import DivergedError
from fkv.runs import checkpoint, console, parallel, preemption
from fkv.runs.rundir import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit(kinds.Settings):
    """What `fit` needs of a stage's plan, besides `steps`; `group` names the stage.

    Attributes:
      log_every, checkpoint_every: steps.
    """

    log_every: int = kinds.setting(kinds.whole(1))
    checkpoint_every: int = kinds.setting(kinds.whole(1))


@flax.struct.dataclass
class TrainState:
    """Everything a training step changes.

    Attributes:
      step: number of updates made, int32.
      params: scorer parameters of all layers, stacked.
      opt_state: the optimiser's.
    """

    step: Array
    params: dict
    opt_state: optax.OptState

    @classmethod
    def init(cls, params: dict, optimiser: optax.GradientTransformation, **fields: Any) -> Any:
        """A state at step 0."""
        return cls(jnp.zeros((), jnp.int32), params, optimiser.init(params), **fields)


# (states of the runs, index of the step) -> the new states, the metrics of each micro-batch (on the
# device), each with one entry per run, and the ids of the step's traces.
Update = Callable[[Any, int], tuple[Any, Sequence[Sequence[Mapping]], Sequence[int]]]
# A step's metrics (on the host) -> what is logged, and what the progress bar shows.
Report = Callable[[Mapping[str, Any]], tuple[Mapping[str, Any], Mapping[str, str]]]


def fit(
    runs: Sequence[Run],
    plan: Fit,
    states: Sequence[Any],
    start: int,
    update: Update,
    report: Report,
    place: Callable[[], Any] = lambda: None,
) -> Sequence[Any]:
    """Trains from step `start` to `plan.steps`; a resumed run gives the same result.

    Metrics of a step are read while the next one runs. `times.jsonl` has the seconds that a step
    takes, the mean since the line before, compilation included, and rates; they are not among the
    metrics, which are the same in every run.

    Args:
      runs: that train side by side, on the same batches; `states` are theirs.
      plan: of any of them.
      place: returns the state of the data iterator, kept in checkpoints.

    Returns:
      The last states.

    Raises:
      DivergedError: a metric is NaN or infinite.
      Preempted: on SIGTERM or the like, after saving the last step.
    """
    bar = console.progress(
        range(start, plan.steps), initial=start, total=plan.steps, desc=plan.group
    )
    pending = None
    since, read, rows = time.monotonic(), start, 0  # of what was logged last

    def settle():
        nonlocal since, read, rows
        if pending is None:
            return
        step, found, ids = pending
        rows += len(ids)
        found = jax.device_get(list(found))
        of_runs = [merged([part[i] for part in found]) for i in range(len(runs))]
        for run, metrics in zip(runs, of_runs, strict=True):
            try:
                check_finite(plan.group, metrics, step, run, ids)
            except DivergedError as error:
                raise DivergedError(f"{run.path}: {error}" if runs[1:] else str(error)) from None
        if step % plan.log_every == 0 or step == plan.steps:
            reports = [report(metrics) for metrics in of_runs]
            now = time.monotonic()
            each = max(now - since, 1e-9) / (step - read)
            spent = {"seconds": each, "steps_per_second": 1 / each}
            if rows:
                spent["traces_per_second"] = rows / (step - read) / each
            since, read, rows = now, step, 0
            for run, (logged, _) in zip(runs, reports, strict=True):
                run.log(step, logged)
                run.log_times(step, spent)
            bar.set_postfix(reports[0][1], refresh=False)

    with preemption.noticed() as asked_to_end:
        for step in bar:
            states, found, ids = update(states, step)
            settle()
            pending = (step + 1, found, ids)
            end = parallel.anywhere(asked_to_end())
            if (step + 1) % plan.checkpoint_every == 0 or step + 1 == plan.steps or end:
                settle()
                pending = None
                for run, state in zip(runs, states, strict=True):
                    run.save(step + 1, state, data=place())
            if end:
                bar.close()
                for run in runs:
                    run.close()
                where = f"{runs[0].path}{f' and {len(runs) - 1} more' if runs[1:] else ''}"
                raise preemption.Preempted(f"step {step + 1} is saved in {where}")
    bar.close()
    return states


def micro_batches(batch: Any, count: int) -> list:
    """The batch cut into `count` parts along the first axis of all its arrays."""
    rows = len(jax.tree.leaves(batch)[0]) // count
    return [jax.tree.map(lambda x, i=i: x[i * rows : (i + 1) * rows], batch) for i in range(count)]


def merged(found: Sequence[Mapping]) -> dict:
    """Metrics of a step from those of its equal micro-batches, all on the host.

    Means, except the largest `ratio_off` and the last `grad_norm`, which covers them all.
    """
    reduce = {"ratio_off": lambda x: np.max(x, axis=0), "grad_norm": lambda x: x[-1]}
    mean = lambda x: np.mean(x, axis=0)  # noqa: E731
    return {name: reduce.get(name, mean)([part[name] for part in found]) for name in found[0]}


def check_finite(stage: str, metrics: Mapping, step: int, run: Run, ids: Sequence[int]) -> None:
    """Stops the run if a metric of a step, on these traces, is NaN or infinite."""
    bad = [name for name, value in metrics.items() if not np.all(np.isfinite(value))]
    if bad:
        of = f" (traces {np.asarray(ids).tolist()})" if len(ids) else ""
        saved = checkpoint.latest_step(run.path) is not None
        raise DivergedError(
            f"{', '.join(bad)} of step {step}{of} {'are' if bad[1:] else 'is'} NaN or infinite: "
            f"set {stage}.learning_rate lower, or dtype to one with a wider range, and use another "
            "--workdir" + (f"; the checkpoints in {run.path} are intact" if saved else "")
        )


# ---- gradient accumulation


def adam(schedule: optax.Schedule, clip: float, micro_batches: int) -> optax.GradientTransformation:
    """Adam after clipping by global norm.

    Updates once every `micro_batches` calls, by the mean of their gradients, which is clipped.
    """
    optimiser = optax.chain(optax.clip_by_global_norm(clip), optax.adam(schedule))
    if micro_batches == 1:
        return optimiser
    return optax.MultiSteps(optimiser, micro_batches).gradient_transformation()


def mean_so_far(grads: dict, opt_state: optax.OptState) -> dict:
    """The mean of these gradients and those of the step's earlier micro-batches.

    Args:
      opt_state: before `grads`; with the last micro-batch the mean is what is clipped.
    """
    if not isinstance(opt_state, optax.MultiStepsState):
        return grads
    share = 1 / (opt_state.mini_step + 1)
    return jax.tree.map(lambda old, new: old + (new - old) * share, opt_state.acc_grads, grads)


def updates_made(step: Array, opt_state: optax.OptState) -> Array:
    """Number of updates after a call, of which `step` were made before it."""
    if isinstance(opt_state, optax.MultiStepsState):
        return opt_state.gradient_step
    return step + 1
