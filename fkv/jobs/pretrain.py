"""Training of the embedded reasoner, from a config to a Hugging Face directory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from fkv import files, models, policies
from fkv.engine import decoding
from fkv.errors import UserError
from fkv.evaluation.accuracy import exact_interval
from fkv.jobs import common, fields
from fkv.keys import Purpose, key_of, keys_of
from fkv.learning import pretrain
from fkv.models import ModelConfig
from fkv.runs import parallel, preemption
from fkv.runs.rundir import open_run
from fkv.tasks import ledger

MAY_DIFFER = common.other_jobs("pretrain")


def model_config(config: ConfigDict) -> ModelConfig:
    """The reasoner's shape: Qwen3-style, tied embeddings."""
    return ModelConfig(
        family="qwen3",
        vocab_size=len(ledger.VOCABULARY),
        qk_norm=True,
        tied_embeddings=True,
        **config.pretrain.model,
    )


def stages(config: ConfigDict) -> list[tuple[int, int, ledger.Spec]]:
    """The curriculum: (steps, batch, sizes) of each stage; sizes not named are the task's."""
    task = config.task.to_dict()
    found = []
    for name in sorted(config.pretrain.stages):
        stage = config.pretrain.stages[name].to_dict()
        steps, batch = stage.pop("steps"), stage.pop("batch")
        found.append((steps, batch, ledger.Spec(**{**task, **stage})))
    return found


def run(config: ConfigDict, workdir: str) -> float:
    """Trains the reasoner in `workdir`, writes it to `workdir/model`, and has it answer.

    It is small: one device trains it, and several processes do the same.

    Returns:
      The share of held-out problems that it answers right with the full cache.
    """
    fields.check(config, "pretrain")
    plan = stages(config)
    ends = np.cumsum([steps for steps, _, _ in plan])
    total = int(ends[-1])
    model = model_config(config)
    longest = max(spec.max_tokens() for _, _, spec in plan)
    if longest > model.max_positions:
        raise UserError(
            f"pretrain.model.max_positions = {model.max_positions}, but problems can have "
            f"{longest} tokens"
        )

    settings = config.pretrain
    if sum(settings.cycles) != total or min(settings.cycles) <= settings.warmup:
        raise UserError(
            f"pretrain.cycles = {settings.cycles} must add up to the {total} steps of the stages, "
            f"each longer than warmup = {settings.warmup}"
        )
    optimizer = pretrain.optimizer(
        settings.learning_rate,
        settings.warmup,
        settings.cycles,
        settings.clip,
        settings.weight_decay,
    )

    what = f"{common.size_of(model)} from scratch, {total:,} steps"
    common.announce("pretrain", config, workdir, what=what)
    run = open_run(workdir, config, MAY_DIFFER)
    params = models.init(key_of(config.seed, Purpose.MODEL), model, settings.qk_gain)
    state = {"params": params, "opt_state": optimizer.init(params)}
    start = 0
    if (saved := run.resume(state)) is not None:
        start, state = saved.step, jax.tree.map(jnp.asarray, saved.state)
        common.say(f"going on from step {start} in {workdir}")

    bar = common.progress(
        range(start, total), initial=start, total=total, desc="pretrain", mininterval=1
    )
    with preemption.noticed() as asked_to_end:
        for step in bar:
            stage = int(np.searchsorted(ends, step, side="right"))
            _, batch, spec = plan[stage]
            problems = ledger.problems(config.seed, f"pretrain {step}", 0, batch, spec)
            token, length = ledger.pad([p.tokens for p in problems], spec.max_tokens())
            prompt = np.array([len(p.prompt) for p in problems])
            state["params"], state["opt_state"], loss, accuracy = pretrain.train_step(
                state["params"], state["opt_state"], model, optimizer, token, prompt, length
            )
            done = step + 1
            if done % settings.log_every == 0 or done == total:
                metrics = {"loss": float(loss), "accuracy": float(accuracy), "stage": stage}
                common.check_finite("pretrain", metrics, done, workdir)
                run.log(done, metrics)
                bar.set_postfix(loss=f"{loss:.4f}", accuracy=f"{accuracy:.3f}", refresh=False)
            end = parallel.anywhere(asked_to_end())
            if done % settings.checkpoint_every == 0 or done == total or end:
                norm = float(optax.tree.norm(state["params"]))
                metrics = {"loss": float(loss), "weights": norm}
                common.check_finite("pretrain", metrics, done, workdir)
                run.save(done, state)
            if end:
                raise common.preempted(run, bar, done)
    bar.close()

    params = jax.device_get(state["params"])
    if parallel.first():
        with files.whole_directory(run.path / "model") as directory:
            models.save(directory, model, params)
            ledger.tokenizer().save_pretrained(directory)
    right, (low, high) = answers(config, model, params)
    run.log(total, {"answers": right, "answers_low": low, "answers_high": high})
    run.close()
    common.say(
        f"full cache, {settings.eval_problems} held-out problems, temperature "
        f"{settings.temperature}: {100 * right:.1f} % answered right (95 % interval "
        f"{100 * low:.1f}-{100 * high:.1f})\n"
        f"written to {workdir}/model"
    )
    return right


def answers(
    config: ConfigDict, model: ModelConfig, params: models.Params
) -> tuple[float, tuple[float, float]]:
    """Share of held-out problems answered right with the full cache, and its 95 % interval."""
    settings, spec = config.pretrain, common.spec(config)
    keys = keys_of(key_of(config.seed, Purpose.PRETRAIN), settings.eval_problems)
    right = []
    for start in range(0, settings.eval_problems, settings.eval_batch):
        count = min(settings.eval_batch, settings.eval_problems - start)
        problems = ledger.problems(config.seed, "eval", start, count, spec)
        prompts = [ledger.encode(p.prompt) for p in problems]
        out = decoding.generate(
            model,
            params,
            policies.get("full"),
            prompts,
            keys[start : start + count],
            spec.max_new_tokens(),
            config.budget,
            config.interval,
            decoding.Sampling(settings.temperature),
            (ledger.EOS,),
        )
        right += [ledger.correct(row, p) for row, p in zip(out, problems, strict=True)]
    return float(np.mean(right)), exact_interval(sum(right), len(right))
