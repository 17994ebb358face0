"""The supervised stage, from a config to a table: train scorers, save them, measure them."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fkv import policies
from fkv.engine.batch import Batch
from fkv.errors import UserError
from fkv.evaluation import loss_ratio
from fkv.jobs import common, groups, training, variants
from fkv.keys import Purpose, key_of
from fkv.learning import sft
from fkv.policies import scorer
from fkv.runs import parallel

NAME = "foresight"  # of the scorers of a run in its table
# No result depends on these.
MAY_DIFFER = ("sft.log_every", "eval.baseline", *common.other_jobs("sft"))


def plan_of(config: ConfigDict, mesh: Mesh) -> sft.Plan:
    """The training that a config asks for on these devices, without its variants."""
    plan = sft.Plan.of(
        config.sft,
        cadence=common.cadence(config),
        scorer=scorer.ScorerConfig(**config.scorer),
        loss=sft.LossConfig.of(config.sft),
    )
    parts = parallel.parts_of(plan.batch, plan.at_once, "sft.at_once", mesh)
    return dataclasses.replace(plan, micro_batches=parts)


def plans_of(configs: Mapping[str, ConfigDict], mesh: Mesh) -> tuple[sft.Plan, ...]:
    """The plans of runs that train side by side; errors name the run where there are several."""
    found = []
    for name, config in configs.items():
        try:
            groups.check(config, "sft")
            found.append(plan_of(config, mesh))
        except UserError as error:
            raise UserError(f"{name}: {error}" if len(configs) > 1 else str(error)) from error
    return tuple(found)


def run(config: ConfigDict, workdir: str) -> list[loss_ratio.Losses]:
    """Trains scorers in `workdir`, or resumes, and measures them on held-out traces.

    Writes checkpoints, metrics and `{training,loss_ratio}.*` there. With variants each has all
    of this in `workdir/<name>`, as a run of its own would, and `workdir` a table of all of them.

    Returns:
      The losses in the table of `workdir`.
    """
    groups.check(config, "sft")
    named = variants.resolve(config, groups.FIELDS)
    if not named:
        return together({workdir: config}, workdir)
    return together({f"{workdir}/{name}": one for name, one in named.items()}, workdir, config)


def together(
    configs: Mapping[str, ConfigDict], where: str, whole: ConfigDict | None = None
) -> list[loss_ratio.Losses]:
    """Trains runs side by side, from one golden pass, each in a directory of its own.

    Args:
      configs: of the runs, by their directories; they differ in `variants.FIELDS` at most.
      where: the directory that they are in.
      whole: the config that they are variants of; `where` then gets a table of all.

    Returns:
      The losses of all scorers, by the names of their directories (of one, `foresight`), and of the
      baselines.
    """
    first = next(iter(configs.values()))
    mesh = parallel.make_mesh(first.model_axis)
    plans, shape = plans_of(configs, mesh), common.model_config(first)
    names = dict.fromkeys(configs, NAME) if len(configs) == 1 else {x: x for x in configs}
    inits, learned = [], {}
    for (workdir, config), plan in zip(configs.items(), plans, strict=True):
        key = key_of(variants.scorer_seed(config), Purpose.SCORER)
        inits.append(functools.partial(scorer.init, key, shape, plan.scorer))
        about = training.trained_for(config, workdir)
        shapes = jax.eval_shape(inits[-1])
        learned[names[workdir]] = policies.Foresight(shapes, plan.scorer, trained=about)
    tabled = [Path(name).name for name in learned]
    common.check_baseline(first, [*tabled, *first.eval.policies])
    stage = training.prepare(configs, where, plans[0], mesh, learned, plans[0].batch)
    table = [] if whole is None else [stage.open(where, whole, MAY_DIFFER)]
    runs = [stage.open(workdir, config, MAY_DIFFER) for workdir, config in configs.items()]
    states = [plan.start(init()) for init, plan in zip(inits, plans, strict=True)]

    def rows_of(ids, step):
        return Batch.of(*stage.train.rows(ids))

    step = functools.partial(sft.train_step, plans)
    states = stage.learn(runs, states, step, rows_of, _report)
    for name, state in zip(learned, states, strict=True):
        learned[name] = learned[name].replace(params=jax.device_get(state.params))
    results = stage.measure(learned)
    for run, name in zip(runs, learned, strict=True):
        others = learned.keys() - {name}
        own = [_named(x, {name: NAME}) for x in results if x.policy not in others]
        common.write_curves(run, "loss", "overlap", "grad_norm")
        common.write_losses(run, own, first.eval.baseline, show=len(runs) == 1)
        run.close()
    results = [_named(x, {name: Path(name).name for name in learned}) for x in results]
    for run in table:
        common.write_losses(run, results, first.eval.baseline)
        run.close()
    return results


def _named(result: loss_ratio.Losses, names: Mapping[str, str]) -> loss_ratio.Losses:
    return dataclasses.replace(result, policy=names.get(result.policy, result.policy))


def _report(metrics):
    loss, overlap = float(np.sum(metrics["loss"])), float(np.mean(metrics["overlap"]))
    layers = {
        f"{name}/layer_{i}": float(x)
        for name in ("loss", "overlap")
        for i, x in enumerate(metrics[name])
    }
    norm = float(metrics["grad_norm"])
    logged = {"loss": loss, "overlap": overlap, "grad_norm": norm, **layers}
    return logged, {"loss": f"{loss:.4f}", "overlap": f"{overlap:.3f}"}
