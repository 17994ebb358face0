"""What `sft` and `grpo` share: checks and loading, the loop over traces, the table of losses."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fkv import models, policies
from fkv.data.traces import Traces, batches, iterate
from fkv.evaluation import loss_ratio
from fkv.jobs import common
from fkv.learning import fit, grpo, sft
from fkv.models import LM
from fkv.policies.base import Policy
from fkv.policies.foresight import Trained
from fkv.runs import parallel, provenance
from fkv.runs.rundir import Run, open_run


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage that trains scorers on traces.

    Attributes:
      plan, mesh: the training, and its devices.
      baselines: policies that are measured beside the scorers.
      lm: the language model, one copy on the devices of this process.
      train, held_out: traces to train on, and to measure on.
      batches: of `train`.
    """

    config: ConfigDict
    workdir: str
    plan: sft.Plan | grpo.Plan
    mesh: Mesh
    baselines: dict[str, Policy]
    lm: LM
    train: Traces
    held_out: Traces
    batches: grain.MapDataset

    def lm_on(self, mesh: Mesh) -> LM:
        """The language model on these devices."""
        return self.lm.replace(params=parallel.view(self.lm.params, mesh))

    def learn(
        self,
        state: fit.TrainState,
        train_step: Callable,
        rows_of: Callable[[np.ndarray, int], Any],
        report: fit.Report,
        may_differ: Sequence[str],
        inputs: Mapping[str, str],
    ) -> tuple[Run, fit.TrainState]:
        """Trains from `state`, or the newest checkpoint, to the last step; leaves the run open.

        Args:
          train_step: of the stage.
          rows_of: from ids of traces and the index of a step to the batch of `train_step`.
          inputs: digests of what `state` was made from.
        """
        inputs = training_inputs(self.config, self.train, self.held_out) | inputs
        run, place = open_run(self.workdir, self.config, may_differ, inputs), None
        if (saved := run.resume(state)) is not None:
            state, place = saved.state, saved.info["data"]
            common.say(f"resuming from step {saved.step} in {self.workdir}")
        start, lm, order = int(state.step), self.lm_on(self.mesh), iterate(self.batches, place)
        step_fn = functools.partial(train_step, self.plan, axis=parallel.AXIS)
        step_fn = parallel.pmap(step_fn, self.mesh, constants=2, batched=1)

        def update(state, step):
            ids, found = next(order), []
            for part in fit.micro_batches(rows_of(ids, step), self.plan.micro_batches):
                state, metrics = step_fn(state, lm, part)
                found.append(metrics)
            return state, found, ids

        state = parallel.replicate(state, self.mesh)
        return run, fit.fit(run, self.plan, state, start, update, report, order.get_state)

    def measure(self, run: Run, learned: Mapping[str, Policy]) -> list[loss_ratio.Losses]:
        """Losses of scorers and baselines on the held-out traces; closes the run."""
        lm = self.lm_on(parallel.make_mesh(self.config.model_axis, "copy"))
        named = {**learned, **self.baselines}
        results = common.measure_losses(self.config, lm, named, self.held_out)
        common.write_losses(run, results)
        run.close()
        return results


def prepare(
    config: ConfigDict,
    workdir: str,
    plan: sft.Plan | grpo.Plan,
    mesh: Mesh,
    scorers: tuple[str, Policy],
    batch: int,
) -> Stage:
    """Checks what can be checked before weights are loaded, then loads model and traces.

    Args:
      scorers: to be trained, and their name in errors.
      batch: traces of a step.
    """
    at = common.cadences(config.eval.budgets, config.interval, "eval.budgets")
    baselines = {name: policies.get(name) for name in config.eval.policies}
    shape = common.model_config(config)
    common.announce(plan.group, config, workdir, shape)
    common.check_policies(config, shape, dict([scorers]), [plan.cadence])
    common.check_policies(config, shape, baselines, at)
    lm = common.load_model(config, "process")
    words = lm.config.vocab_size
    train = common.load_traces(config, "train", config.data.traces, config.budget, words, batch)
    most = max(config.eval.budgets)
    held_out = common.load_traces(config, "eval", config.eval.traces, most, words)
    longest = max(train.length_n.max(), held_out.length_n.max())
    common.warn_of_length(lm.config, longest, "the longest trace")
    order = batches(train, batch, config.seed)
    return Stage(config, workdir, plan, mesh, baselines, lm, train, held_out, order)


def training_inputs(config: ConfigDict, train: Traces, held_out: Traces) -> dict[str, str]:
    """Digests of the model and the traces that scorers learn from, for `open_run`."""
    directory = models.find(common.model_path(config), common.revision(config))
    return {
        "model: its weights": provenance.of_weights(directory),
        "data.path: traces": provenance.of_traces(train),
        "data.eval_path: held-out traces": provenance.of_traces(held_out),
    }


def trained_for(config: ConfigDict, workdir: str) -> Trained:
    """What is known of the scorers that a run of this config trains in `workdir`."""
    where = (config.model, config.revision, config.budget, config.interval)
    return Trained(str(workdir), *where)
