"""The supervised stage, from a config to a table: train scorers, save them, measure them."""

import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fkv import policies
from fkv.cache.cadence import Cadence
from fkv.data import traces
from fkv.engine.batch import Batch
from fkv.evaluation import loss_ratio
from fkv.jobs import common, groups
from fkv.keys import Purpose, key_of
from fkv.learning import fit, sft
from fkv.policies import scorer
from fkv.runs import parallel
from fkv.runs.rundir import open_run

# No result depends on these.
MAY_DIFFER = ("sft.log_every", *common.other_jobs("sft"))


def plan_of(config: ConfigDict, mesh: Mesh) -> sft.Plan:
    """The training that a config asks for on these devices."""
    plan = sft.Plan.of(
        config.sft,
        cadence=Cadence(config.budget, config.interval),
        scorer=scorer.ScorerConfig(**config.scorer),
        loss=sft.LossConfig.of(config.sft),
    )
    parts = parallel.parts_of(plan.batch, plan.at_once, "sft.at_once", mesh)
    return dataclasses.replace(plan, micro_batches=parts)


def run(config: ConfigDict, workdir: str) -> list[loss_ratio.Losses]:
    """Trains scorers in `workdir`, or resumes, and measures them on held-out traces.

    Writes checkpoints, metrics and `loss_ratio.{txt,md,csv,png}` there.
    """
    # ---- bad input is found before anything is loaded
    groups.check(config, "sft")
    mesh = parallel.make_mesh(config.model_axis)
    plan = plan_of(config, mesh)
    at = common.cadences(config.eval.budgets, config.interval, "eval.budgets")
    rules = {name: policies.get(name) for name in config.eval.policies}
    shape = common.model_config(config)
    common.announce("sft", config, workdir, shape)
    first_key = key_of(config.seed, Purpose.SCORER)
    learned = policies.Foresight(
        jax.eval_shape(lambda: scorer.init(first_key, shape, plan.scorer)),
        plan.scorer,
        trained=common.trained_for(config, workdir),
    )
    common.check_policies(config, shape, {"foresight": learned}, [plan.cadence])
    common.check_policies(config, shape, rules, at)
    lm = common.load_model(config, "process")
    train, held_out = common.load_both_traces(config, lm.config, plan.batch)
    batches = traces.batches(train, plan.batch, config.seed)

    # ---- state, new or from the newest checkpoint
    inputs = common.training_inputs(config, train, held_out)
    run = open_run(workdir, config, MAY_DIFFER, inputs)
    params = scorer.init(first_key, lm.config, plan.scorer)
    state, place = fit.TrainState.init(params, plan.optimiser), None
    if (saved := run.resume(state)) is not None:
        state, place = saved.state, saved.info["data"]
        common.say(f"resuming from step {saved.step} in {workdir}")

    # ---- training
    start, order = int(state.step), traces.iterate(batches, place)
    everywhere = lm.replace(params=parallel.view(lm.params, mesh))
    step_fn = functools.partial(sft.train_step, plan, axis=parallel.AXIS)
    step_fn = parallel.pmap(step_fn, mesh, constants=2, batched=1)

    def update(state, step):
        ids, found = next(order), []
        for part in fit.micro_batches(Batch.of(*train.rows(ids)), plan.micro_batches):
            state, metrics = step_fn(state, everywhere, part)
            found.append(metrics)
        return state, found, ids

    state = parallel.replicate(state, mesh)
    state = fit.fit(run, plan, state, start, update, _report, order.get_state)

    # ---- measuring
    named = {"foresight": learned.replace(params=jax.device_get(state.params)), **rules}
    copy = parallel.view(lm.params, parallel.make_mesh(config.model_axis, "copy"))
    results = common.measure_losses(config, lm.replace(params=copy), named, held_out)
    common.write_losses(run, results, len(held_out))
    run.close()
    return results


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
