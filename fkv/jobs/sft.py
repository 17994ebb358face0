"""The supervised stage, from a config to a table: train scorers, save them, measure them."""

import functools
from collections.abc import Callable

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fkv import policies
from fkv.cache import slots as cache
from fkv.data import traces
from fkv.evaluation import loss_ratio
from fkv.jobs import common, fields
from fkv.keys import Purpose, key_of
from fkv.learning import sft
from fkv.policies import scorer
from fkv.runs import parallel, preemption
from fkv.runs.rundir import open_run

# No result depends on these.
MAY_DIFFER = ("sft.log_every", *common.other_jobs("sft"))


def run(config: ConfigDict, workdir: str) -> list[loss_ratio.Losses]:
    """Trains (or goes on training) scorers in `workdir` and measures them on held-out traces.

    Writes checkpoints, metrics and `loss_ratio.{txt,md,csv,png}` there.
    """
    # ---- what can be wrong is found out first
    fields.check(config, "sft")
    cache.check_sizes(config.budget, config.interval)
    common.check_budgets(config.eval.budgets, config.interval, "eval.budgets")
    mesh = parallel.make_mesh(config.model_axis)
    parts, scorer_config, optimiser, make_step = recipe(config, mesh)
    rules = {name: policies.get(name) for name in config.eval.policies}
    shape = common.model_config(config)
    common.announce("sft", config, workdir, shape)
    first_key = key_of(config.seed, Purpose.SCORER)
    scorers = jax.eval_shape(lambda: scorer.init(first_key, shape, scorer_config))
    learned = policies.Foresight(
        scorers, scorer_config, trained=common.trained_for(config, workdir)
    )
    common.check_policies(config, shape, {"foresight": learned}, [config.budget])
    common.check_policies(config, shape, rules, config.eval.budgets)
    model, model_params = common.load_model(config, "process")
    train = common.load_traces(
        config, "train", config.data.traces, config.budget, model.vocab_size, config.sft.batch
    )
    held_out = common.load_traces(
        config, "eval", config.eval.traces, max(config.eval.budgets), model.vocab_size
    )
    longest = max(train.length_n.max(), held_out.length_n.max())
    common.warn_of_length(model, longest, "the longest trace")
    batches = traces.batches(train, config.sft.batch, config.seed)

    # ---- state, new or from the newest checkpoint
    inputs = common.training_inputs(config, train, held_out)
    run = open_run(workdir, config, MAY_DIFFER, inputs)
    params = scorer.init(first_key, model, scorer_config)
    state = sft.init_state(params, optimiser)
    place = None
    if (saved := run.resume(state)) is not None:
        state, place = saved.state, saved.info["data"]
        common.say(f"going on from step {saved.step} in {workdir}")

    # ---- training
    state, everywhere = parallel.replicate(state, mesh), parallel.view(model_params, mesh)

    step_fn = parallel.pmap(make_step(model), mesh, constants=2, batched=2)
    start, steps = int(state.step), config.sft.steps
    order = traces.iterate(batches, place)
    bar = common.progress(
        range(start, steps), initial=start, total=steps, desc="sft", mininterval=0.5
    )
    pending = None
    with preemption.noticed() as asked_to_end:
        for step in bar:
            found = []
            for part in common.parts(train.rows(next(order)), parts):
                state, metrics = step_fn(state, everywhere, *part)
                found.append(metrics)
            if pending is not None:  # of the step before, while this one runs
                _report(run, bar, *pending, config)
            pending = (step + 1, found)
            end = parallel.anywhere(asked_to_end())
            if (step + 1) % config.sft.checkpoint_every == 0 or step + 1 == steps or end:
                _report(run, bar, *pending, config)
                pending = None
                run.save(step + 1, state, data=order.get_state())
            if end:
                raise common.preempted(run, bar, step + 1)
    bar.close()

    # ---- measuring
    learned = learned.replace(params=jax.device_get(state.params))
    policies_by_name = {"foresight": learned, **rules}
    copy = parallel.view(model_params, parallel.make_mesh(config.model_axis, "copy"))
    results = common.measure_losses(config, model, copy, policies_by_name, held_out)
    common.write_losses(run, results, len(held_out))
    run.close()
    return results


def recipe(
    config: ConfigDict, mesh: Mesh
) -> tuple[int, scorer.ScorerConfig, optax.GradientTransformation, Callable]:
    """What the config says of a step, apart from the model.

    Returns:
      How many parts a batch is worked off in, the scorers' config, the optimiser, and what makes
      the per-device step (state, model_params, token, length) of a model.

    Raises:
      UserError: the config is wrong.
    """
    parts = parallel.parts_of(config.sft.batch, config.sft.at_once, "sft.at_once", mesh)
    scorer_config = scorer.ScorerConfig(**config.scorer)
    loss_config = sft.LossConfig(config.sft.margin, config.sft.weighting)
    optimiser = sft.optimizer(
        config.sft.learning_rate, config.sft.warmup, config.sft.steps, config.sft.clip
    )
    optimiser = sft.accumulated(optimiser, parts)

    def make_step(model):
        return functools.partial(
            sft.train_step,
            model,
            scorer_config,
            loss_config,
            optimiser,
            config.budget,
            config.interval,
            parallel.AXIS,
        )

    return parts, scorer_config, optimiser, make_step


def _report(run, bar, step, found, config) -> None:
    metrics = common.step_metrics(found)
    common.check_finite("sft", metrics, step, run.path)
    loss, overlap = float(np.sum(metrics["loss"])), float(np.mean(metrics["overlap"]))
    if step % config.sft.log_every == 0 or step == config.sft.steps:
        layers = {
            f"{name}/layer_{i}": float(x)
            for name in ("loss", "overlap")
            for i, x in enumerate(metrics[name])
        }
        run.log(
            step,
            {"loss": loss, "overlap": overlap, "grad_norm": float(metrics["grad_norm"]), **layers},
        )
        bar.set_postfix(loss=f"{loss:.4f}", overlap=f"{overlap:.3f}", refresh=False)
