"""What several jobs share: models, traces and policies of a config, refused before work starts."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from fkv import api, files, models, tasks
from fkv.cache.cadence import Cadence
from fkv.commands import command
from fkv.data import traces
from fkv.engine import replay
from fkv.engine.batch import Batch
from fkv.errors import UserError, suggest
from fkv.evaluation import loss_ratio, loss_table, plots
from fkv.jobs import READS
from fkv.keys import Purpose, key_of
from fkv.learning import tokens
from fkv.models import LM, ModelConfig, texts
from fkv.policies.base import Policy
from fkv.runs import costs, parallel, provenance
from fkv.runs.console import progress, say
from fkv.runs.rundir import Run
from fkv.tasks import ledger

JOBS = tuple(READS)


def other_jobs(job: str) -> tuple[str, ...]:
    """Parts of the config that do not affect this job: they may change when it resumes.

    Directories of older runs name an `attention_kernel`.
    """
    return ("model_axis", "attention_kernel", *(name for name in JOBS if name != job))


def spec(config: ConfigDict) -> ledger.Spec:
    """The sizes of the embedded task's problems."""
    return ledger.Spec(**{name: tuple(bounds) for name, bounds in config.task.items()})


def announce(
    job: str,
    config: ConfigDict,
    workdir: str | Path,
    model: ModelConfig | None = None,
    what: str | Sequence[str] = (),
) -> None:
    """Prints the first line of a job: the model that it runs, if any, `what`, devices, directory.

    Args:
      what: policies, cadence, traces or questions: what there is of them, in this order.
    """
    parts = [*([what] if isinstance(what, str) else what), parallel.describe()]
    if model is not None:
        parts.insert(0, f"{config.model} ({size_of(model)}, {config.dtype})")
    say(f"{job}: {', '.join(parts)}, in {workdir}")


def said_cadence(config: ConfigDict, budgets: Sequence[int] = ()) -> str:
    """Of a config, at its budget or at these."""
    said = ", ".join(map(str, budgets)) or str(config.budget)
    kept = config.get("protect_prompt", 0)
    return f"B = {said}, L = {config.interval}" + (f", prompt {kept}" if kept else "")


def said_traces(config: ConfigDict) -> str:
    """Where the traces of a config come from."""
    return f"traces of {config.data.path or 'the embedded task'}"


def size_of(model: ModelConfig) -> str:
    """The number of parameters, in words."""
    count = costs.parameters(model)
    return f"{count / 1e6:.2f} M parameters" if count < 1e9 else f"{count / 1e9:.2f} B parameters"


def load_model(config: ConfigDict, span: str = "copy") -> LM:
    """The frozen language model.

    Args:
      span: the devices that hold it, see `parallel.make_mesh`: one copy, or those of this process.
    """
    mesh = parallel.make_mesh(config.model_axis, span)
    lm = models.load(model_path(config), config.dtype, revision(config), mesh)
    return lm.replace(config=as_configured(config, lm.config))


def load_language_model(config: ConfigDict, separate: bool = True) -> api.Model:
    """One copy with its tokenizer.

    Args:
      separate: the form of its layers: True to decode first, False to replay.
    """
    mesh = parallel.make_mesh(config.model_axis, "copy")
    model = api.load(config.model, config.dtype, revision(config), mesh, separate=separate)
    lm = model.lm.replace(config=as_configured(config, model.config))
    return dataclasses.replace(model, lm=lm)


def to_replay(model: api.Model) -> api.Model:
    """The language model with stacked layers, after it has decoded; the one given is used up."""
    return dataclasses.replace(model, lm=models.stack(model.lm))


def as_configured(config: ConfigDict, model: ModelConfig) -> ModelConfig:
    """The model with the cache's dtype, which no checkpoint has."""
    return dataclasses.replace(model, cache_dtype=config.cache_dtype)


def model_config(config: ConfigDict) -> ModelConfig:
    """From `config.json`, a GGUF file or a known shape; no weights are read.

    Of models on the hub only `config.json` is downloaded, but GGUF files whole.
    """
    if config.model in costs.SHAPES and not files.expand(config.model).exists():
        return as_configured(config, costs.SHAPES[config.model])
    model = models.read(models.find(model_path(config), revision(config), weights=False))
    return as_configured(config, model)


def model_path(config: ConfigDict) -> str | Path:
    """The model's directory, GGUF file or hub id."""
    return tasks.REASONER if config.model == api.EMBEDDED else config.model


def language_inputs(model: api.Model) -> dict[str, str]:
    """Digests of a language model's weights and tokenizer, for `open_run`."""
    if model.directory is None:  # it is not from files
        return {}
    return {
        "model: its weights": provenance.of_weights(model.directory),
        "model: its tokenizer": provenance.of_tokenizer(model.directory),
    }


def revision(config: ConfigDict) -> str | None:
    """Of a hub id; what is here has none."""
    return None if files.expand(config.model).exists() else config.revision or None


def check_vocabulary(config: ConfigDict, vocabulary: int) -> None:
    """Refuses the embedded task for a model of another vocabulary."""
    if vocabulary != len(ledger.VOCABULARY):
        raise UserError(
            f"the vocabulary of model {config.model} has {vocabulary} tokens, that of the embedded "
            f"task {len(ledger.VOCABULARY)}: set data.path and data.eval_path to traces of this "
            "model, and evaluate.benchmark to questions for it"
        )


@contextlib.contextmanager
def of_field(name: str) -> Iterator[None]:
    """Puts a field of the config in front of the errors raised within."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


@contextlib.contextmanager
def scorers_of(field: str, source: str, job: str = "") -> Iterator[None]:
    """Names the field whose scorers are loaded within, and the command that makes missing ones.

    Args:
      field: with its value, `grpo.scorer = 'runs/sft_tiny'`.
      source: their run directory.
      job: that makes them; by default guessed from the directory's name.
    """
    try:
        yield
    except UserError as error:
        if files.expand(source).exists():  # damaged, or for another model
            raise UserError(f"{field}: {error}") from error
        job = job or ("grpo" if "grpo" in Path(source).name else "sft")
        raise UserError(
            f"{field}: {error}. Make some with `{command(job)} --config=... "
            f"--workdir={source}`, or set {field.partition(' ')[0]} to others"
        ) from error


def load_traces(
    config: ConfigDict, split: str, count: int, budget: int, vocabulary: int, at_least: int = 1
) -> traces.Traces:
    """Traces of a split (`train` or `eval`), from the config's file or the embedded task.

    Args:
      count: the most to take.
      budget: traces of at most this many tokens plus the interval are skipped.
      vocabulary: ids must be below this.
      at_least: the least that must share a padded length, as those of a batch do.
    """
    field = "path" if split == "train" else "eval_path"
    if path := config.data[field]:
        if not files.expand(path).exists():
            of_text = "traces" in config and config.traces.text  # with a folder for each split
            workdir = re.sub(r"/(train|dev|heldout)(/.*)?$", "", path) if of_text else path
            raise UserError(
                f"data.{field} = {path!r}: no such file or directory. `{command('traces')} "
                f"--config=... --workdir={workdir}` writes traces to a directory"
            )
        where, corrupt = path, None if config.data.strict else []
        with of_field(f"data.{field}"):
            sequences, prompts = traces.read(
                path, config.data.column, config.data.prompt_column, corrupt, vocabulary
            )
        sequences, prompts = sequences[:count], prompts[:count] if prompts else None
        for _, why in corrupt or ():
            say(f"{path}: left out, {why}")
    else:
        where = f"embedded task, {split}"
        check_vocabulary(config, vocabulary)
        sequences, prompts = traces.embedded(config.seed, split, count, spec(config))
    slots = budget + config.interval
    found = traces.collect(
        sequences, slots, config.interval, where, prompts, config.data.buckets, at_least
    )
    if config.protect_prompt and not found.prompt_n.any():
        raise UserError(
            f"protect_prompt = {config.protect_prompt}, but no trace of {where} has a prompt: set "
            "data.prompt_column, or protect_prompt to 0"
        )
    if found.skipped:
        say(
            f"{where}: skipped {found.skipped} of {len(sequences)} traces, not longer than "
            f"budget + interval = {slots} tokens"
        )
    return found


def warn_of_length(model: ModelConfig, tokens: int, what: str) -> None:
    """Warns of sequences longer than the model was trained for."""
    if warning := model.beyond(int(tokens), what):
        say(f"warning: {warning}")


def warn_of_unknown(
    model: api.Model, encoded: Iterable[tuple[str, str, Sequence[int]]], kind: str = "texts"
) -> None:
    """Warns, in one line, of words that the tokenizer does not know.

    Args:
      encoded: the name of each text, the text, and its token ids.
      kind: of texts.
    """
    found = [(name, texts.unknown(model.tokenizer, text, ids)) for name, text, ids in encoded]
    warned = [(name, warning) for name, warning in found if warning]
    if warned:
        others = f" (likewise in {len(warned)} of {len(found)} {kind})" if len(found) > 1 else ""
        say("warning: {}: {}".format(*warned[0]) + others)


def cadence(config: ConfigDict, budget: int | None = None) -> Cadence:
    """The cadence of a config, at its own budget or another (or `FULL`)."""
    budget = config.budget if budget is None else budget
    return Cadence.of(budget, config.interval, config.protect_prompt)


def cadences(config: ConfigDict, where: str) -> list[Cadence]:
    """The cadences of the budgets in a field, which errors name."""
    group, field = where.split(".")
    with of_field(where):
        return [cadence(config, budget) for budget in config[group][field]]


def check_policies(
    config: ConfigDict, model: ModelConfig, named: Mapping[str, Policy], at: Sequence[Cadence]
) -> None:
    """Refuses policies that do not fit the model at one of these cadences.

    Warns of scorers that were trained with another language model.

    Args:
      named: policies by the name that they are reported under.
    """
    for name, policy in named.items():
        try:
            for cadence in at:
                replay.check(policy, model, cadence)
        except UserError as error:
            raise UserError(f"{name!r} with model {config.model}: {error}") from None
        if policy.trained and (other := policy.trained.other_model(config.model, revision(config))):
            say(f"{name}: {other}")


def measure_losses(
    config: ConfigDict,
    lm: LM,
    named: Mapping[str, Policy],
    held_out: traces.Traces,
    budgets: Sequence[int] | None = None,
) -> list[loss_ratio.Losses]:
    """Loss ratios of policies on held-out traces, by default at `eval.budgets`.

    Tokens are split by entropy as in rewards: by `grpo.high_fraction`.
    """
    say(f"measuring on {len(held_out)} held-out traces")
    split = tokens.Split.of(config.grpo) if "grpo" in config else tokens.Split()
    measured = loss_ratio.Traces(
        Batch.of(held_out.token_nt, held_out.length_n, held_out.prompt_n),
        replay.row_keys(key_of(config.seed, Purpose.REPLAY), len(held_out)),
        held_out.padded_n,
        split.high_fraction,
        config.eval.batch,
    )
    results = []
    for budget in progress(budgets or config.eval.budgets, desc="budgets"):
        results += loss_ratio.measure(lm, named, measured, cadence(config, budget))
    for one in results:
        if not (np.isfinite(one.evicted).all() and np.isfinite(one.full).all()):
            raise UserError(
                f"losses of {one.policy!r} at budget {one.budget} are NaN or infinite with the "
                f"language model in {config.dtype}: set dtype to one with a wider range"
            )
    return results


def write_curves(run: Run, *names: str) -> None:
    """Draws these metrics of a run against the step."""
    if parallel.first():
        lines = files.read_text(run.path / "metrics.jsonl").splitlines()
        plots.training([json.loads(line) for line in lines], names, run.path / "training.png")


def check_baseline(config: ConfigDict, named: Iterable[str]) -> None:
    """Refuses an `eval.baseline` that is not one of these policies."""
    baseline, known = config.eval.baseline, list(named)
    if baseline and baseline not in known:
        others = suggest(baseline, known)
        raise UserError(f"eval.baseline = {baseline!r} is not one of the policies measured{others}")


def write_losses(
    run: Run, results: Sequence[loss_ratio.Losses], baseline: str = "", show: bool = True
) -> None:
    """Writes loss ratios as text, Markdown, CSV and picture; prints the table if asked to.

    Args:
      baseline: `eval.baseline`.
    """
    if not parallel.first():
        return
    table = loss_table.write(run.path / "loss_ratio", results, baseline)
    title = f"loss under eviction, {len(results[0].full)} held-out traces, ± one standard error"
    if kept := results[0].protect_prompt:
        title += f"; {kept} tokens of the prompt protected"
    plots.loss_ratios(results, run.path / "loss_ratio.png", title, baseline)
    shown = f"\n{table}\n\n" if show else ""
    say(f"{shown}written to {run.path}: loss_ratio.(txt md csv png pdf)")
