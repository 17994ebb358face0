"""What `sft` and `grpo` share: checks and loading, the loop over traces, the table of losses."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
from fkv.runs.rundir import Run, open_run, resume_together

if TYPE_CHECKING:
    import grain


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage that trains scorers on traces, in one run or in several side by side.

    Attributes:
      configs: of the runs, by their directories; they share what other attributes come from.
      plan, mesh: the training, and its devices.
      baselines: policies that are measured beside the scorers.
      lm: the language model, one copy on the devices of this process.
      train, held_out: traces to train on, and to measure on.
      batches: of `train`.
    """

    configs: Mapping[str, ConfigDict]
    plan: sft.Plan | grpo.Plan
    mesh: Mesh
    baselines: dict[str, Policy]
    lm: LM
    train: Traces
    held_out: Traces
    batches: "grain.MapDataset"

    def lm_on(self, mesh: Mesh) -> LM:
        """The language model on these devices."""
        return self.lm.replace(params=parallel.view(self.lm.params, mesh))

    @property
    def config(self) -> ConfigDict:
        """Of any of the runs, for what they share."""
        return next(iter(self.configs.values()))

    def open(self, workdir: str, config: ConfigDict, may_differ: Sequence[str], **inputs) -> Run:
        """Opens a run directory that records the model, the traces, and these inputs."""
        return open_run(workdir, config, may_differ, {**self.inputs, **inputs})

    @functools.cached_property
    def inputs(self) -> dict[str, str]:
        """Digests of the model and the traces."""
        return training_inputs(self.config, self.train, self.held_out)

    def learn(
        self,
        runs: Sequence[Run],
        states: Sequence[fit.TrainState],
        train_step: Callable,
        rows_of: Callable[[np.ndarray, int], Any],
        report: fit.Report,
    ) -> Sequence[fit.TrainState]:
        """Trains from `states`, or the newest checkpoints, to the last step; leaves runs open.

        Args:
          train_step: of the stage, from (states, language model, batch, axis) to the new states and
            the metrics of each run.
          rows_of: from ids of traces and the index of a step to the batch of `train_step`.
        """
        states, place = list(states), None
        if saved := resume_together(runs, states):
            states, place = [one.state for one in saved], saved[0].info["data"]
            where = f"{runs[0].path}{f' and {len(runs) - 1} more' if runs[1:] else ''}"
            common.say(f"resuming from step {saved[0].step} in {where}")
        start, lm, order = int(states[0].step), self.lm_on(self.mesh), iterate(self.batches, place)
        step_fn = functools.partial(train_step, axis=parallel.AXIS)
        step_fn = parallel.pmap(step_fn, self.mesh, constants=2, batched=1)

        def update(states, step):
            ids, found = next(order), []
            for part in fit.micro_batches(rows_of(ids, step), self.plan.micro_batches):
                states, metrics = step_fn(states, lm, part)
                found.append(metrics)
            return states, found, ids

        states = parallel.replicate(states, self.mesh)
        return fit.fit(runs, self.plan, states, start, update, report, order.get_state)

    def measure(self, named: Mapping[str, Policy]) -> list[loss_ratio.Losses]:
        """Losses of scorers and baselines on the held-out traces."""
        lm = self.lm_on(parallel.make_mesh(self.config.model_axis, "copy"))
        named = {**named, **self.baselines}
        return common.measure_losses(self.config, lm, named, self.held_out)


def prepare(
    configs: Mapping[str, ConfigDict],
    where: str,
    plan: sft.Plan | grpo.Plan,
    mesh: Mesh,
    scorers: Mapping[str, Policy],
    batch: int,
) -> Stage:
    """Checks what can be checked before weights are loaded, then loads model and traces.

    Args:
      configs: of the runs, by their directories.
      where: they are, in what is printed.
      scorers: to be trained, by their names in errors.
      batch: traces of a step.
    """
    config = next(iter(configs.values()))
    at = common.cadences(config, "eval.budgets")
    baselines = {name: policies.get(name) for name in config.eval.policies}
    shape = common.model_config(config)
    count = f"{len(configs)} variants of " if len(configs) > 1 else ""
    what = f"{count}foresight", common.said_cadence(config), common.said_traces(config)
    common.announce(plan.group, config, where, shape, what)
    common.check_policies(config, shape, scorers, [plan.cadence])
    common.check_policies(config, shape, baselines, at)
    lm = common.load_model(config, "process")
    words = lm.config.vocab_size
    train = common.load_traces(config, "train", config.data.traces, config.budget, words, batch)
    most = max(config.eval.budgets)
    held_out = common.load_traces(config, "eval", config.eval.traces, most, words)
    longest = max(train.length_n.max(), held_out.length_n.max())
    common.warn_of_length(lm.config, longest, "the longest trace")
    order = batches(train, batch, config.seed)
    return Stage(configs, plan, mesh, baselines, lm, train, held_out, order)


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
    return Trained(str(workdir), *where, config.protect_prompt)
