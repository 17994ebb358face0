"""Pretraining of the embedded reasoner, from a config to a Hugging Face directory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from fkv import files, models, policies
from fkv.api import Model
from fkv.cache.cadence import FULL, Cadence
from fkv.engine.batch import Batch
from fkv.engine.requests import Plan
from fkv.engine.sampling import Sampling
from fkv.evaluation.accuracy import exact_interval
from fkv.jobs import answering, common, groups
from fkv.keys import Purpose, key_of, keys_of
from fkv.learning import fit, pretrain
from fkv.models import LM, ModelConfig
from fkv.runs import parallel
from fkv.runs.rundir import open_run
from fkv.tasks import ledger

MAY_DIFFER = common.other_jobs("pretrain")


def plan_of(config: ConfigDict) -> pretrain.Plan:
    """The training that a config asks for: a Qwen3-style reasoner with tied embeddings.

    Sizes that a stage of the curriculum does not name are the task's.
    """
    groups.check(config, "pretrain")
    model = ModelConfig(
        family="qwen3",
        vocab_size=len(ledger.VOCABULARY),
        qk_norm=True,
        tied_embeddings=True,
        **vars(groups.Reasoner.of(config.pretrain.model)),
    )
    stages = []
    for name in sorted(config.pretrain.stages):
        stage = config.pretrain.stages[name].to_dict()
        steps, batch = stage.pop("steps"), stage.pop("batch")
        stages.append(pretrain.Stage(steps, batch, ledger.Spec(**{**config.task, **stage})))
    return pretrain.Plan.of(config.pretrain, stages=tuple(stages), config=model)


def run(config: ConfigDict, workdir: str) -> float:
    """Trains the reasoner, writes it to `workdir/model`, and measures its accuracy.

    It is small: one device trains it, and several processes repeat the work.

    Returns:
      The share of held-out problems answered right with the full cache.
    """
    plan = plan_of(config)
    size, steps = common.size_of(plan.config), f"{plan.steps:,} steps"
    what = f"{size} from scratch", steps, "problems of the embedded task"
    common.announce("pretrain", config, workdir, what=what)
    run = open_run(workdir, config, MAY_DIFFER)
    params = models.init(key_of(config.seed, Purpose.MODEL), plan.config, plan.qk_gain)
    state, start = {"params": params, "opt_state": plan.optimiser.init(params)}, 0
    if (saved := run.resume(state)) is not None:
        start, state = saved.step, jax.tree.map(jnp.asarray, saved.state)
        common.say(f"resuming from step {start} in {workdir}")

    def update(states, step):
        index = plan.stage_at(step)
        stage = plan.stages[index]
        problems = ledger.problems(config.seed, f"pretrain {step}", 0, stage.batch, stage.spec)
        token, length = ledger.pad([p.tokens for p in problems], stage.spec.max_tokens())
        prompt = np.array([len(p.prompt) for p in problems])
        state, metrics = pretrain.train_step(plan, states[0], Batch.of(token, length, prompt))
        weights = optax.tree.norm(state["params"])
        return [state], [[{**metrics, "stage": index, "weights": weights}]], ()

    def report(metrics):
        loss, accuracy = float(metrics["loss"]), float(metrics["accuracy"])
        logged = {"loss": loss, "accuracy": accuracy, "stage": int(metrics["stage"])}
        return logged, {"loss": f"{loss:.4f}", "accuracy": f"{accuracy:.3f}"}

    (state,) = fit.fit([run], plan, [state], start, update, report)
    lm = LM(jax.device_get(state["params"]), plan.config)
    if parallel.first():
        with files.whole(run.path / "model", directory=True) as directory:
            models.save(directory, lm)
            ledger.tokenizer().save_pretrained(directory)
    right, (low, high) = answers(config, plan, lm)
    common.write_curves(run, "loss", "accuracy")
    run.log(plan.steps, {"answers": right, "answers_low": low, "answers_high": high})
    run.close()
    common.say(
        f"full cache, {plan.eval_problems} held-out problems, temperature "
        f"{plan.temperature}: {100 * right:.1f} % answered right (95 % interval "
        f"{100 * low:.1f}-{100 * high:.1f})\n"
        f"written to {workdir}/model"
    )
    return right


def answers(config: ConfigDict, plan: pretrain.Plan, lm: LM) -> tuple[float, tuple[float, float]]:
    """Share of held-out problems answered right with the full cache, and its 95 % interval."""
    spec, cadence = common.spec(config), Cadence.of(FULL, config.interval)
    how = Plan(cadence, Sampling(plan.temperature), (ledger.EOS,))
    problems = ledger.problems(config.seed, "eval", 0, plan.eval_problems, spec)
    prompts = [ledger.encode(problem.prompt) for problem in problems]
    shape = answering.Shape(plan.eval_batch, max(map(len, prompts)), spec.max_new_tokens())
    keys = keys_of(key_of(config.seed, Purpose.PRETRAIN), plan.eval_problems)
    asked = list(zip(prompts, keys, strict=True))
    model = Model(lm, None, how.stop, "the reasoner")
    answers = answering.queue(model, policies.get("full"), how, shape, asked)
    right = sum(ledger.correct(ids, problems[i]) for some in answers for i, ids in some)
    return right / len(problems), exact_interval(right, len(problems))
