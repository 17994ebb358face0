"""What several jobs do alike: read their parts of the config, with errors before work starts."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from fkv import api, files, models, tasks
from fkv.cache.cadence import Cadence
from fkv.data import traces
from fkv.engine import replay
from fkv.engine.batch import Batch
from fkv.errors import UserError
from fkv.evaluation import loss_ratio, plots
from fkv.files import write_text
from fkv.jobs import READS
from fkv.keys import Purpose, key_of
from fkv.learning import tokens
from fkv.models import LM, ModelConfig, texts
from fkv.policies.base import Policy
from fkv.policies.foresight import Trained
from fkv.runs import costs, parallel, provenance
from fkv.runs.console import progress, say
from fkv.runs.rundir import Run
from fkv.tasks import ledger

JOBS = tuple(READS)


def other_jobs(job: str) -> tuple[str, ...]:
    """Parts of the config that have no say in this job: they may change when it goes on."""
    return ("model_axis", "attention_kernel", *(name for name in JOBS if name != job))


def spec(config: ConfigDict) -> ledger.Spec:
    """The sizes of the embedded task's problems."""
    return ledger.Spec(**{name: tuple(bounds) for name, bounds in config.task.items()})


def announce(
    job: str,
    config: ConfigDict,
    workdir: str | Path,
    model: ModelConfig | None = None,
    what: str | None = None,
) -> None:
    """Says what a job starts to do, in one line.

    Args:
      model: the language model, if the job runs one.
      what: the policies or the stage; by default the cadence.
    """
    parts = [parallel.describe()]
    if model is not None:
        parts.append(f"{config.model} ({size_of(model)}, {config.dtype})")
    parts.append(what or f"B = {config.budget}, L = {config.interval}")
    say(f"{job}: {', '.join(parts)}, in {workdir}")


def size_of(model: ModelConfig) -> str:
    """How many parameters a language model has, in words."""
    count = costs.parameters(model)
    return f"{count / 1e6:.2f} M parameters" if count < 1e9 else f"{count / 1e9:.2f} B parameters"


def load_model(config: ConfigDict, span: str = "copy") -> LM:
    """The frozen language model, the embedded one by its name.

    Args:
      span: the devices it lies on, see `parallel.make_mesh`: one copy, or those of this process.
    """
    check_kernel(config, config.attention_kernel)
    mesh = parallel.make_mesh(config.model_axis, span)
    lm = models.load(model_path(config), config.dtype, revision(config), mesh)
    return lm.replace(config=as_configured(config, lm.config))


def as_configured(config: ConfigDict, model: ModelConfig) -> ModelConfig:
    """The model with what no checkpoint knows of: what its caches hold, and what reads them."""
    kernel = kernel_here(config.attention_kernel)
    return dataclasses.replace(model, cache_dtype=config.cache_dtype, kernel=kernel)


def kernel_here(name: str) -> str:
    """The kernel of a `ModelConfig`: `pallas` is that of this platform."""
    return parallel.platform() if name == "pallas" else name


def check_kernel(config: ConfigDict, name: str, where: str = "attention_kernel") -> None:
    """Refuses an attention kernel that can't be used here; `where` names the field."""
    if name not in ("plain", "pallas"):
        raise UserError(f"{where}: {name!r} must be 'plain' or 'pallas'")
    if name == "pallas":
        if config.model_axis > 1:
            raise UserError(
                f"{where}: 'pallas' can't be split over model_axis = {config.model_axis} devices: "
                "set it to 'plain', or model_axis to 1"
            )
        if config.cache_dtype:
            raise UserError(
                f"{where}: 'pallas' reads caches in the model's dtype only: set it to 'plain', or "
                "cache_dtype to ''"
            )
        from fkv.cache import kernels

        try:
            kernels.for_platform(parallel.platform())
        except UserError as error:
            raise UserError(f"{where}: {error}") from None


def model_config(config: ConfigDict) -> ModelConfig:
    """What `config.json` says, or a known shape; no weights are read or downloaded."""
    if config.model in costs.SHAPES and not files.expand(config.model).is_dir():
        return as_configured(config, costs.SHAPES[config.model])
    model = models.read(models.find(model_path(config), revision(config), weights=False))
    return as_configured(config, model)


def model_path(config: ConfigDict) -> str | Path:
    """The model's directory or hub id."""
    return tasks.REASONER if config.model == api.EMBEDDED else config.model


def language_inputs(model: api.Model) -> dict[str, str]:
    """Digests of a language model's weights and tokenizer, for `open_run`."""
    if model.directory is None:  # it is not from files
        return {}
    tokenizer = {"model: its tokenizer": provenance.of_tokenizer(model.directory)}
    return {"model: its weights": provenance.of_weights(model.directory), **tokenizer}


def training_inputs(
    config: ConfigDict, train: traces.Traces, held_out: traces.Traces
) -> dict[str, str]:
    """Digests of the model and the traces that scorers learn from, for `open_run`."""
    directory = models.find(model_path(config), revision(config))
    return {
        "model: its weights": provenance.of_weights(directory),
        "data.path: traces": provenance.of_traces(train),
        "data.eval_path: held-out traces": provenance.of_traces(held_out),
    }


def load_language_model(config: ConfigDict) -> api.Model:
    """One copy with its tokenizer."""
    check_kernel(config, config.attention_kernel)
    mesh = parallel.make_mesh(config.model_axis, "copy")
    model = api.load(config.model, config.dtype, revision(config), mesh)
    lm = model.lm.replace(config=as_configured(config, model.config))
    return dataclasses.replace(model, lm=lm)


def revision(config: ConfigDict) -> str | None:
    """Of a hub id; a directory that took its place has none."""
    return None if files.expand(config.model).is_dir() else config.revision or None


def check_vocabulary(config: ConfigDict, vocabulary: int) -> None:
    """Refuses the embedded task for a model that does not speak it."""
    if vocabulary != len(ledger.VOCABULARY):
        raise UserError(
            f"model {config.model} has {vocabulary} words, the embedded task "
            f"{len(ledger.VOCABULARY)}: set data.path and data.eval_path to traces of its own, and "
            "evaluate.benchmark to questions"
        )


@contextlib.contextmanager
def of_field(name: str) -> Iterator[None]:
    """Names the field of the config that a refusal within is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


@contextlib.contextmanager
def scorers_of(field: str, source: str, job: str = "") -> Iterator[None]:
    """Names the field whose scorers are loaded within, and the command that makes them.

    Args:
      field: what the config says, `grpo.scorer = 'runs/sft_tiny'`.
      source: where they are to be.
      job: that makes them; by default what the name of the place says.
    """
    try:
        yield
    except UserError as error:
        if files.expand(source).exists():  # they are damaged, or others
            raise UserError(f"{field}: {error}") from error
        job = job or ("grpo" if "grpo" in Path(source).name else "sft")
        raise UserError(
            f"{field}: {error}. Make some with `python -m launch.{job} --config=... "
            f"--workdir={source}`, or set {field.partition(' ')[0]} to others"
        ) from error


def load_traces(
    config: ConfigDict, split: str, count: int, budget: int, vocabulary: int, at_least: int = 1
) -> traces.Traces:
    """Traces of a split (`train` or `eval`), from the config's file or the embedded task.

    Args:
      count: how many to take at most.
      budget: traces not longer than this plus the interval are skipped, and counted.
      vocabulary: ids must be below this.
      at_least: how many must share a length, as a batch does.
    """
    field = "path" if split == "train" else "eval_path"
    if path := config.data[field]:
        if not files.expand(path).exists():
            raise UserError(
                f"data.{field} = {path!r}: no such file or directory. `python -m launch.traces "
                f"--config=... --workdir={path}` writes traces to a directory"
            )
        where, corrupt = path, None if config.data.strict else []
        with of_field(f"data.{field}"):
            sequences, prompts = traces.read(
                path, config.data.column, config.data.prompt_column, corrupt, vocabulary
            )
        sequences, prompts = sequences[:count], prompts[:count] if prompts else None
        for _, wrong in corrupt or ():
            say(f"{path}: left out, {wrong}")
    else:
        where = f"embedded task, {split}"
        check_vocabulary(config, vocabulary)
        sequences, prompts = traces.embedded(config.seed, split, count, spec(config))
    found = traces.collect(
        sequences,
        budget + config.interval,
        config.interval,
        where,
        prompts,
        config.data.buckets,
        at_least,
    )
    if found.skipped:
        say(
            f"{where}: skipped {found.skipped} of {len(sequences)} traces, not longer than "
            f"budget + interval = {budget + config.interval} tokens"
        )
    return found


def load_both_traces(
    config: ConfigDict, model: ModelConfig, batch: int
) -> tuple[traces.Traces, traces.Traces]:
    """Traces to train on, in batches of that many, and held-out ones to measure on."""
    train = load_traces(config, "train", config.data.traces, config.budget, model.vocab_size, batch)
    held_out = load_traces(
        config, "eval", config.eval.traces, max(config.eval.budgets), model.vocab_size
    )
    longest = max(train.length_n.max(), held_out.length_n.max())
    warn_of_length(model, longest, "the longest trace")
    return train, held_out


def warn_of_length(model: ModelConfig, tokens: int, what: str) -> None:
    """Says so if the longest sequence of a job is beyond what the model was made for."""
    if warning := model.beyond(int(tokens), what):
        say(f"warning: {warning}")


def warn_of_unknown(
    model: api.Model, encoded: Iterable[tuple[str, str, Sequence[int]]], kind: str = "texts"
) -> None:
    """Says so, in a line, if there are words that the tokenizer does not know.

    Args:
      encoded: of each text its name, itself and its token ids.
      kind: of texts they are.
    """
    found = [(name, texts.unknown(model.tokenizer, text, ids)) for name, text, ids in encoded]
    warned = [(name, warning) for name, warning in found if warning]
    if warned:
        others = f" (so it is with {len(warned)} of {len(found)} {kind})" if len(found) > 1 else ""
        say("warning: {}: {}".format(*warned[0]) + others)


def cadences(budgets: Sequence[int], interval: int, where: str) -> list[Cadence]:
    """The cadences of these budgets; `where` names the field in errors."""
    with of_field(where):
        return [Cadence(budget, interval) for budget in budgets]


def check_policies(
    config: ConfigDict, model: ModelConfig, named: Mapping[str, Policy], at: Sequence[Cadence]
) -> None:
    """Refuses policies that do not fit the model at all of these cadences, before any is run.

    Says of which scorers the language model is another one.

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


def trained_for(config: ConfigDict, workdir: str | Path) -> Trained:
    """What is known of the scorers that a run of this config trains in `workdir`."""
    where = (config.model, config.revision, config.budget, config.interval)
    return Trained(str(workdir), *where)


def measure_losses(
    config: ConfigDict,
    lm: LM,
    named: Mapping[str, Policy],
    held_out: traces.Traces,
    budgets: Sequence[int] | None = None,
) -> list[loss_ratio.Losses]:
    """Loss ratios of policies on held-out traces, at `eval.budgets` unless said.

    Tokens are low- and high-entropy as in rewards: by `grpo.high_fraction`.
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
        cadence = Cadence(budget, config.interval)
        results += loss_ratio.measure(lm, named, measured, cadence)
    for one in results:
        if not (np.isfinite(one.evicted).all() and np.isfinite(one.full).all()):
            raise UserError(
                f"losses of {one.policy!r} at budget {one.budget} are NaN or infinite with the "
                f"language model in {config.dtype}: set dtype to one with a wider range"
            )
    return results


def write_losses(run: Run, results: Sequence[loss_ratio.Losses], measured: int) -> None:
    """Loss ratios as text, Markdown, CSV and picture; prints the table."""
    if not parallel.first():
        return
    table = loss_ratio.table(results)
    write_text(run.path / "loss_ratio.txt", table + "\n")
    write_text(run.path / "loss_ratio.md", loss_ratio.markdown(results) + "\n")
    write_text(run.path / "loss_ratio.csv", loss_ratio.csv(results))
    title = f"loss under eviction, {measured} held-out traces, ± 2 standard errors"
    plots.loss_ratios(results, run.path / "loss_ratio.png", title)
    say(f"\n{table}\n\nwritten to {run.path}: loss_ratio.(txt md csv png)")
