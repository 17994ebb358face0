"""The reinforcement stage, from a config to a table: improve scorers, save them, measure them."""

import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fkv import api, policies
from fkv.cache.cadence import Cadence
from fkv.data import traces
from fkv.data.traces import Traces
from fkv.engine import replay
from fkv.engine.batch import Batch
from fkv.errors import UserError
from fkv.evaluation import loss_ratio
from fkv.jobs import common, evaluate, groups
from fkv.keys import Purpose, key_of
from fkv.learning import fit, grpo, tokens
from fkv.models import LM, ModelConfig
from fkv.policies import scorer
from fkv.runs import parallel, provenance
from fkv.runs.rundir import open_run
from fkv.tasks import ledger

# What a run may be asked for more of, and what no result depends on.
MAY_DIFFER = ("grpo.log_every", "grpo.steps", "grpo.answers", *common.other_jobs("grpo"))


def plan_of(config: ConfigDict, mesh: Mesh) -> grpo.Plan:
    """The training that a config asks for on these devices."""
    plan = grpo.Plan.of(
        config.grpo,
        cadence=Cadence(config.budget, config.interval),
        scorer=scorer.ScorerConfig(**config.scorer),
        grpo=grpo.GRPOConfig.of(config.grpo),
    )
    rollouts = plan.grpo.rollouts
    parts = parallel.parts_of(
        plan.traces * rollouts, plan.traces_at_once * rollouts, "grpo.traces_at_once", mesh
    )
    return dataclasses.replace(plan, micro_batches=parts)


def run(config: ConfigDict, workdir: str) -> list[loss_ratio.Losses]:
    """Trains in `workdir` from the scorers of the run `grpo.scorer`, or resumes.

    Writes what the supervised job writes, with both scorers in the table, and what they answer.
    """
    # ---- bad input is found before anything is loaded
    groups.check(config, "grpo")
    mesh = parallel.make_mesh(config.model_axis)
    plan = plan_of(config, mesh)
    at = common.cadences(config.eval.budgets, config.interval, "eval.budgets")
    rules = {name: policies.get(name) for name in config.eval.policies}
    supervised = _supervised(config)
    shape = common.model_config(config)
    common.announce("grpo", config, workdir, shape)
    common.check_policies(config, shape, {"grpo.scorer": supervised}, [plan.cadence])
    common.check_policies(config, shape, rules, at)
    lm = common.load_model(config, "process")
    if answering := _can_answer(config, lm.config):
        _check_answers(config, workdir)
    train, held_out = common.load_both_traces(config, lm.config, plan.traces)
    batches = traces.batches(train, plan.traces, config.seed)

    # ---- state, new or from the newest checkpoint
    inputs = common.training_inputs(config, train, held_out)
    inputs["grpo.scorer: scorers to start from"] = provenance.of_arrays(supervised.params)
    run = open_run(workdir, config, MAY_DIFFER, inputs)
    params, place = supervised.params, None
    state = grpo.TrainState.init(params, plan.optimiser, reference=params)
    if (saved := run.resume(state)) is not None:
        state, place = saved.state, saved.info["data"]
        common.say(f"resuming from step {saved.step} in {workdir}")

    # ---- training
    start, order = int(state.step), traces.iterate(batches, place)
    everywhere = lm.replace(params=parallel.view(lm.params, mesh))
    step_fn = functools.partial(grpo.train_step, plan, axis=parallel.AXIS)
    step_fn = parallel.pmap(step_fn, mesh, constants=2, batched=1)
    full = FullCache(plan, everywhere, train, mesh)

    def update(state, step):
        ids, found = next(order), []
        key = key_of(config.seed, Purpose.ROLLOUT, step)
        for part in fit.micro_batches(_rollouts(plan, train, full, ids, key), plan.micro_batches):
            state, metrics = step_fn(state, everywhere, part)
            found.append(metrics)
        return state, found, ids

    state = parallel.replicate(state, mesh)
    state = fit.fit(run, plan, state, start, update, _report, order.get_state)

    # ---- measuring
    trained = common.trained_for(config, workdir)
    learned = {
        "supervised": supervised.replace(params=jax.device_get(state.reference)),
        "grpo": supervised.replace(params=jax.device_get(state.params), trained=trained),
    }
    copy = parallel.view(lm.params, parallel.make_mesh(config.model_axis, "copy"))
    lm = lm.replace(params=copy)
    results = common.measure_losses(config, lm, {**learned, **rules}, held_out)
    common.write_losses(run, results, len(held_out))
    run.close()
    if answering:
        _answers(config, workdir)
    return results


def _can_answer(config: ConfigDict, model: ModelConfig) -> bool:
    """Whether answers are asked for, and there are questions for this model."""
    if not config.grpo.answers:
        return False
    if config.evaluate.benchmark == "embedded" and model.vocab_size != len(ledger.VOCABULARY):
        common.say("no answers: set evaluate.benchmark to questions for this model")
        return False
    return True


def _check_answers(config: ConfigDict, workdir: str) -> None:
    """Finds out now what would be wrong in the end, such as a tokenizer that is missing."""
    part, path = _evaluation(config, workdir)
    try:
        evaluate.check(part, path, later=("grpo",))
    except UserError as error:
        raise UserError(f"{error}; or set grpo.answers to 0, for no answers in the end") from error


def _answers(config: ConfigDict, workdir: str) -> None:
    """What both scorers answer; the reinforced ones anew if they have been trained on since."""
    evaluate.run(*_evaluation(config, workdir), anew=("grpo",))


def _evaluation(config: ConfigDict, workdir: str) -> tuple[ConfigDict, str]:
    """What `launch.evaluate` is to do, and where."""
    part = ConfigDict(config).copy_and_resolve_references()
    part.evaluate.scorers = (f"supervised={config.grpo.scorer}", f"grpo={workdir}")
    part.evaluate.policies = ("full",)
    part.evaluate.budgets = config.eval.budgets
    part.evaluate.problems = config.grpo.answers
    part.evaluate.traces = 0
    part.evaluate.compare = ""
    return part, f"{workdir}/answers"


def _supervised(config: ConfigDict) -> policies.Foresight:
    """The scorers to start from."""
    source = config.grpo.scorer
    with common.scorers_of(f"grpo.scorer = {source!r}", source, "sft"):
        policy = api.load_scorer(source)
    wanted = scorer.ScorerConfig(**config.scorer)
    if policy.config != wanted:
        raise UserError(
            f"grpo.scorer = {config.grpo.scorer!r} holds scorers of {policy.config}, but "
            f"config.scorer says {wanted}"
        )
    return policy


class FullCache:
    """Losses and entropies of the full cache, computed once a trace and kept on the host.

    What rewards compare with is the model itself: nothing is quantised here.
    """

    def __init__(self, plan: grpo.Plan, lm: LM, found: Traces, mesh: Mesh):
        self.found = found
        # Always as many rows, a multiple of the devices, so that one program serves.
        rows, each = plan.traces_at_once or plan.traces, parallel.device_count(mesh)
        self.rows = -(-rows // each) * each
        self._known: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lm = lm.replace(config=dataclasses.replace(lm.config, cache_dtype=""))

        def device_pass(lm, batch):
            hidden, _, _ = replay.replay(lm, batch, policies.get("full"), plan.cadence)
            return parallel.gather(tokens.token_losses(lm, hidden, batch.token_bt)), ()

        self._pass = parallel.pmap(device_pass, mesh, constants=1, batched=1)

    def __call__(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Losses and entropies [n, t - 1] of these traces, which share a bucket."""
        new = [i for i in ids.tolist() if i not in self._known]
        for start in range(0, len(new), self.rows):
            some = new[start : start + self.rows]
            asked = (some * self.rows)[: self.rows]
            losses, _ = self._pass(self._lm, Batch.of(*self.found.rows(np.array(asked))))
            nll, entropy = np.asarray(losses.nll_bt), np.asarray(losses.entropy_bt)
            self._known |= {i: (nll[j], entropy[j]) for j, i in enumerate(some)}
        both = [self._known[i] for i in ids.tolist()]
        return np.stack([nll for nll, _ in both]), np.stack([entropy for _, entropy in both])


def _rollouts(plan: grpo.Plan, found: Traces, full: FullCache, ids, key) -> grpo.Rollouts:
    """The rows of a step: every trace as often as it has rollouts."""
    rows = (Batch.of(*found.rows(ids), found.prompt_n[ids]), *full(ids))
    rows = jax.tree.map(lambda x: np.repeat(x, plan.grpo.rollouts, axis=0), rows)
    random = replay.row_keys(key, len(ids) * plan.grpo.rollouts)
    return grpo.Rollouts(*rows, np.asarray(jax.random.key_data(random)))


def _report(metrics):
    metrics = _with_ratios(metrics)
    shown = {
        "reward": f"{metrics['reward']:.4f}",
        "low": f"{metrics['added_low']:.4f}",
        "entropy": f"{metrics['entropy'][-1]:.2f}",
    }
    return _flat(metrics), shown


def _with_ratios(metrics: dict) -> dict:
    """With the loss ratio and the added loss per token in place of the sums that they are from."""
    metrics = dict(metrics)
    for name in ("low", "high"):
        evicted, full, tokens = (
            float(metrics.pop(f"{kind}_{name}")) for kind in ("evicted", "full", "tokens")
        )
        if tokens:  # no token is high-entropy where high_fraction is 0
            metrics[f"loss_ratio_{name}"] = evicted / full
            metrics[f"added_{name}"] = (evicted - full) / tokens
    return metrics


def _flat(metrics) -> dict:
    """Per-epoch metrics under the name of their epoch; the last also under its own."""
    flat = {}
    for name, value in metrics.items():
        value = np.asarray(value)
        if value.ndim:
            flat |= {f"{name}/epoch_{i}": float(x) for i, x in enumerate(value)}
            value = value[-1]
        flat[name] = float(value)
    return flat
