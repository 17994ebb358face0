"""The reinforcement stage, from a config to a table: improve scorers, save them, measure them."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fkv import api, policies
from fkv.data.traces import Traces
from fkv.engine import replay
from fkv.engine.batch import Batch
from fkv.errors import UserError
from fkv.evaluation import loss_ratio
from fkv.jobs import common, evaluate, groups, training
from fkv.keys import Purpose, key_of
from fkv.learning import grpo, replayed, tokens
from fkv.models import LM, ModelConfig
from fkv.policies import scorer
from fkv.runs import parallel, provenance
from fkv.tasks import ledger

# More of these may be asked for, or no result depends on them.
MAY_DIFFER = (
    *("grpo.log_every", "grpo.steps", "grpo.answers", "eval.baseline"),
    *common.other_jobs("grpo"),
)


def plan_of(config: ConfigDict, mesh: Mesh) -> grpo.Plan:
    """The training that a config asks for on these devices."""
    plan = grpo.Plan.of(
        config.grpo,
        cadence=common.cadence(config),
        scorer=scorer.ScorerConfig(**config.scorer),
        grpo=grpo.GRPOConfig.of(config.grpo),
    )
    rollouts = plan.grpo.rollouts
    parts = parallel.parts_of(
        plan.traces * rollouts, plan.traces_at_once * rollouts, "grpo.traces_at_once", mesh
    )
    return dataclasses.replace(plan, micro_batches=parts)


def step_of(plan: grpo.Plan) -> Callable:
    """The training step: several updates per batch of rollouts need a replay each."""
    return replayed.train_step if plan.grpo.epochs > 1 else grpo.train_step


def run(config: ConfigDict, workdir: str) -> list[loss_ratio.Losses]:
    """Trains in `workdir` from the scorers of the run `grpo.scorer`, or resumes.

    Writes what the supervised job writes, with both scorers in the table, and what they answer.
    """
    groups.check(config, "grpo")
    results, answers = _train(config, workdir)
    if answers:  # scorers that have been trained on since answer anew
        evaluate.run(*answers, anew=("grpo",))
    return results


def _train(
    config: ConfigDict, workdir: str
) -> tuple[list[loss_ratio.Losses], tuple[ConfigDict, str] | None]:
    """Losses in the end, and what to evaluate; by then the language model is freed."""
    mesh = parallel.make_mesh(config.model_axis)
    plan, supervised = plan_of(config, mesh), _supervised(config)
    common.check_baseline(config, ["supervised", "grpo", *config.eval.policies])
    scorers = {"grpo.scorer": supervised}
    stage = training.prepare({workdir: config}, workdir, plan, mesh, scorers, plan.traces)
    answers = _evaluation(config, workdir)
    if answering := _can_answer(config, stage.lm.config):
        try:
            evaluate.check(*answers, later=("grpo",))
        except UserError as error:
            raise UserError(f"{error}; or set grpo.answers to 0 for no answers") from error
    params = supervised.params
    inputs = {"grpo.scorer: scorers to start from": provenance.of_arrays(params)}
    run = stage.open(workdir, config, MAY_DIFFER, **inputs)
    state = grpo.TrainState.init(params, plan.optimiser, reference=params)
    full = FullCache(plan, stage.lm_on(mesh), stage.train, mesh)

    def rows_of(ids, step):
        key = key_of(config.seed, Purpose.ROLLOUT, step)
        return _rollouts(plan, stage.train, full, ids, key)

    def step(states, lm, rows, axis):
        state, metrics = step_of(plan)(plan, states[0], lm, rows, axis)
        return [state], [metrics]

    (state,) = stage.learn([run], [state], step, rows_of, _report)
    trained = training.trained_for(config, workdir)
    learned = {
        "supervised": supervised.replace(params=jax.device_get(state.reference)),
        "grpo": supervised.replace(params=jax.device_get(state.params), trained=trained),
    }
    results = stage.measure(learned)
    common.write_curves(run, "reward", "loss_ratio_low", "kl", "grad_norm")
    common.write_losses(run, results, config.eval.baseline)
    run.close()
    return results, answers if answering else None


def _can_answer(config: ConfigDict, model: ModelConfig) -> bool:
    """Whether answers are asked for, and there are questions for this model."""
    if not config.grpo.answers:
        return False
    if config.evaluate.benchmark == api.EMBEDDED and model.vocab_size != len(ledger.VOCABULARY):
        common.say("the scorers answer no questions: set evaluate.benchmark to some for this model")
        return False
    return True


def _evaluation(config: ConfigDict, workdir: str) -> tuple[ConfigDict, str]:
    """The config and the directory of the evaluation in the end."""
    part = ConfigDict(config).copy_and_resolve_references()
    part.evaluate.update(
        scorers=(f"supervised={config.grpo.scorer}", f"grpo={workdir}"), policies=("full",),
        budgets=config.eval.budgets, problems=config.grpo.answers, traces=0, compare="",
    )  # fmt: skip
    return part, f"{workdir}/answers"


def _supervised(config: ConfigDict) -> policies.Foresight:
    """The scorers to start from."""
    source = config.grpo.scorer
    with common.scorers_of(f"grpo.scorer = {source!r}", source, "sft"):
        policy = api.load_scorer(source)
    if not isinstance(policy, policies.Foresight):
        raise UserError(
            f"grpo.scorer = {source!r} holds weights of another method: give a run of sft or grpo"
        )
    wanted = scorer.ScorerConfig(**config.scorer)
    if policy.config != wanted:
        raise UserError(
            f"grpo.scorer = {source!r} holds scorers of {policy.config}, but config.scorer is "
            f"{wanted}"
        )
    return policy


class FullCache:
    """Losses and entropies under the full cache, unquantised, computed once a trace and kept on the
    host.
    """

    def __init__(self, plan: grpo.Plan, lm: LM, found: Traces, mesh: Mesh):
        self.found = found
        # A fixed number of rows, a multiple of the devices, needs one program.
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
    """The rows of a step: every trace, repeated for each of its rollouts."""
    rows = (Batch.of(*found.rows(ids)), *full(ids))
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
    """With loss ratios and added losses per token in place of the sums behind them."""
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
    """Metrics of every epoch by name and epoch; those of the last also by name alone."""
    flat = {}
    for name, value in metrics.items():
        value = np.asarray(value)
        if value.ndim:
            flat |= {f"{name}/epoch_{i}": float(x) for i, x in enumerate(value)}
            value = value[-1]
        flat[name] = float(value)
    return flat
