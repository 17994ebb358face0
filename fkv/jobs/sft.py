"""The supervised stage, from a config to a table: train scorers, save them, measure them."""

import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fkv import policies
from fkv.cache.cadence import Cadence
from fkv.engine.batch import Batch
from fkv.evaluation import loss_ratio
from fkv.jobs import common, groups, training
from fkv.keys import Purpose, key_of
from fkv.learning import fit, sft
from fkv.policies import scorer
from fkv.runs import parallel

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
    groups.check(config, "sft")
    mesh = parallel.make_mesh(config.model_axis)
    plan, shape = plan_of(config, mesh), common.model_config(config)

    def init():
        return scorer.init(key_of(config.seed, Purpose.SCORER), shape, plan.scorer)

    about = training.trained_for(config, workdir)
    learned = policies.Foresight(jax.eval_shape(init), plan.scorer, trained=about)
    stage = training.prepare(config, workdir, plan, mesh, ("foresight", learned), plan.batch)
    state = fit.TrainState.init(init(), plan.optimiser)

    def rows_of(ids, step):
        return Batch.of(*stage.train.rows(ids))

    run, state = stage.learn(state, sft.train_step, rows_of, _report, MAY_DIFFER, {})
    learned = learned.replace(params=jax.device_get(state.params))
    return stage.measure(run, {"foresight": learned})


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
