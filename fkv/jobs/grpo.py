"""The reinforcement stage, from a config to a table: improve scorers, save them, measure them."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fkv import api, policies
from fkv.cache import slots as cache
from fkv.data import traces
from fkv.data.traces import Traces
from fkv.engine import replay
from fkv.errors import UserError
from fkv.evaluation import loss_ratio
from fkv.jobs import common, evaluate, fields
from fkv.keys import Purpose, key_of
from fkv.learning import grpo, sft
from fkv.models import ModelConfig
from fkv.policies import scorer
from fkv.runs import parallel, preemption, provenance
from fkv.runs.rundir import open_run
from fkv.tasks import ledger

# What a run may be asked for more of, and what no result depends on.
MAY_DIFFER = ("grpo.log_every", "grpo.steps", "grpo.answers", *common.other_jobs("grpo"))


def settings_of(config: ConfigDict) -> grpo.GRPOConfig:
    """The part of `config.grpo` that the train step knows."""
    fields = grpo.GRPOConfig.__dataclass_fields__
    return grpo.GRPOConfig(**{name: config.grpo[name] for name in fields})


def recipe(
    config: ConfigDict, mesh: Mesh
) -> tuple[grpo.GRPOConfig, int, optax.GradientTransformation, Callable]:
    """What the config says of a step, apart from the model.

    Returns:
      The stage's settings, how many parts a step is worked off in, the optimiser, and what makes
      the per-device step (state, model_params, reference, batch) of a model and its scorers.

    Raises:
      UserError: the config is wrong.
    """
    settings = settings_of(config)
    rows = config.grpo.traces * settings.rollouts
    at_once = config.grpo.traces_at_once * settings.rollouts
    parts = parallel.parts_of(rows, at_once, "grpo.traces_at_once", mesh)
    if parts > 1 and settings.epochs > 1:
        raise UserError(
            "grpo.epochs must be 1 where a step is worked off in parts (traces_at_once)"
        )
    optimiser = grpo.optimizer(config.grpo.learning_rate, config.grpo.warmup, config.grpo.clip_norm)
    optimiser = sft.accumulated(optimiser, parts)

    def make_step(model, scorer_config):
        return functools.partial(
            grpo.train_step,
            model,
            scorer_config,
            settings,
            optimiser,
            config.budget,
            config.interval,
            parallel.AXIS,
        )

    return settings, parts, optimiser, make_step


def run(config: ConfigDict, workdir: str) -> list[loss_ratio.Losses]:
    """Trains (or goes on training) in `workdir`, from the scorers of the run `grpo.scorer`.

    Writes what the supervised job writes, with both scorers in the table, and what they answer.
    """
    # ---- what can be wrong is found out first
    fields.check(config, "grpo")
    cache.check_sizes(config.budget, config.interval)
    common.check_budgets(config.eval.budgets, config.interval, "eval.budgets")
    mesh = parallel.make_mesh(config.model_axis)
    settings, parts, optimiser, make_step = recipe(config, mesh)
    rules = {name: policies.get(name) for name in config.eval.policies}
    supervised = _supervised(config)
    shape = common.model_config(config)
    common.announce("grpo", config, workdir, shape)
    common.check_policies(config, shape, {"grpo.scorer": supervised}, [config.budget])
    common.check_policies(config, shape, rules, config.eval.budgets)
    model, model_params = common.load_model(config, "process")
    if answering := _can_answer(config, model):
        _check_answers(config, workdir)
    train = common.load_traces(
        config, "train", config.data.traces, config.budget, model.vocab_size, config.grpo.traces
    )
    held_out = common.load_traces(
        config, "eval", config.eval.traces, max(config.eval.budgets), model.vocab_size
    )
    longest = max(train.length_n.max(), held_out.length_n.max())
    common.warn_of_length(model, longest, "the longest trace")
    batches = traces.batches(train, config.grpo.traces, config.seed)

    # ---- state, new or from the newest checkpoint
    inputs = common.training_inputs(config, train, held_out)
    inputs["grpo.scorer: scorers to start from"] = provenance.of_arrays(supervised.params)
    run = open_run(workdir, config, MAY_DIFFER, inputs)
    state = sft.init_state(supervised.params, optimiser)
    reference = supervised.params
    place = None
    if (saved := run.resume(_with_reference(state, reference))) is not None:
        place = saved.info["data"]
        reference = saved.state.pop("reference")
        state = sft.TrainState(**saved.state)
        common.say(f"going on from step {saved.step} in {workdir}")

    # ---- training
    state, reference = parallel.replicate((state, reference), mesh)
    everywhere = parallel.view(model_params, mesh)

    step_fn = parallel.pmap(make_step(model, supervised.config), mesh, constants=3, batched=1)
    full = FullCache(config, model, everywhere, train, mesh)
    start, steps = int(state.step), config.grpo.steps
    order = traces.iterate(batches, place)
    bar = common.progress(
        range(start, steps), initial=start, total=steps, desc="grpo", mininterval=0.5
    )
    with preemption.noticed() as asked_to_end:
        for step in bar:
            ids = next(order)
            key = key_of(config.seed, Purpose.ROLLOUT, step)
            batch = _batch(config, settings, train, full, ids, key)
            found = []
            for part in common.parts(batch, parts):
                state, metrics = step_fn(state, everywhere, reference, part)
                found.append(metrics)
            metrics = _with_ratios(common.step_metrics(found))
            common.check_finite("grpo", metrics, step + 1, workdir, ids.tolist())
            done = step + 1
            if done % config.grpo.log_every == 0 or done == steps:
                run.log(done, _flat(metrics))
                bar.set_postfix(
                    reward=f"{metrics['reward']:.4f}",
                    low=f"{metrics['added_low']:.4f}",
                    entropy=f"{metrics['entropy'][-1]:.2f}",
                    refresh=False,
                )
            end = parallel.anywhere(asked_to_end())
            if done % config.grpo.checkpoint_every == 0 or done == steps or end:
                run.save(done, _with_reference(state, reference), data=order.get_state())
            if end:
                raise common.preempted(run, bar, done)
    bar.close()

    # ---- measuring
    learned = {
        "supervised": supervised.replace(params=jax.device_get(reference)),
        "grpo": supervised.replace(
            params=jax.device_get(state.params), trained=common.trained_for(config, workdir)
        ),
    }
    copy = parallel.view(model_params, parallel.make_mesh(config.model_axis, "copy"))
    results = common.measure_losses(config, model, copy, {**learned, **rules}, held_out)
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


def _with_reference(state: sft.TrainState, reference: dict) -> dict:
    """What is saved: should the supervised run be gone, this one knows what it started from."""
    return {
        "step": state.step,
        "params": state.params,
        "opt_state": state.opt_state,
        "reference": reference,
    }


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

    def __init__(self, config: ConfigDict, model: ModelConfig, params, found: Traces, mesh):
        self.found = found
        # Always as many rows, a multiple of the devices, so that one program serves.
        rows, each = config.grpo.traces_at_once or config.grpo.traces, parallel.device_count(mesh)
        self.rows = -(-rows // each) * each
        self._known: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._params = params
        model = dataclasses.replace(model, cache_dtype="")

        def device_pass(params, token, length):
            hidden, _, _ = replay.replay(
                model, params, token, length, policies.get("full"), config.budget, config.interval
            )
            losses = replay.token_losses(model, params, hidden, token)
            return parallel.gather(losses), ()

        self._pass = parallel.pmap(device_pass, mesh, constants=1, batched=2)

    def __call__(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Losses and entropies [n, t - 1] of these traces, which share a bucket."""
        new = [i for i in ids.tolist() if i not in self._known]
        for start in range(0, len(new), self.rows):
            some = new[start : start + self.rows]
            asked = (some * self.rows)[: self.rows]
            losses, _ = self._pass(self._params, *self.found.rows(np.array(asked)))
            nll, entropy = np.asarray(losses.nll_bt), np.asarray(losses.entropy_bt)
            self._known |= {i: (nll[j], entropy[j]) for j, i in enumerate(some)}
        both = [self._known[i] for i in ids.tolist()]
        return np.stack([nll for nll, _ in both]), np.stack([entropy for _, entropy in both])


def _batch(config, settings, found: Traces, full: FullCache, ids, key) -> grpo.Batch:
    """The rows of a step: every trace as often as it has rollouts."""
    (token, length), (nll, entropy) = found.rows(ids), full(ids)
    index = np.arange(token.shape[1] - 1)[None]
    first = np.maximum(config.budget + config.interval, found.prompt_n[ids])[:, None]
    counted = (index >= first - 1) & (index < length[:, None] - 1)
    repeat = lambda x: np.repeat(x, settings.rollouts, axis=0)  # noqa: E731
    random = replay.row_keys(key, len(ids) * settings.rollouts)
    return grpo.Batch(
        repeat(token),
        repeat(length),
        repeat(nll),
        repeat(entropy),
        repeat(counted),
        np.asarray(jax.random.key_data(random)),
    )


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
