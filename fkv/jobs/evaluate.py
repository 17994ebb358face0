"""Evaluation by answers and by loss: every policy at every budget, from a config to tables."""

import dataclasses
import functools
import itertools
import platform
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from fkv import api, policies
from fkv.api import Model
from fkv.cache.cadence import FULL, said_budget
from fkv.data import benchmarks
from fkv.data.traces import Traces
from fkv.engine import requests
from fkv.engine.batch import Batch
from fkv.engine.sampling import Sampling
from fkv.errors import UserError
from fkv.evaluation import (
    accuracy,
    answers,
    comparison,
    diagnosis,
    loss_ratio,
    loss_table,
    plots,
    tables,
)
from fkv.evaluation import math_answers as judge
from fkv.files import write_text
from fkv.jobs import answering, common, groups
from fkv.policies.base import Policy, trained_at
from fkv.runs import parallel, preemption, provenance, rundir, sharing
from fkv.runs.rundir import Run, open_run
from fkv.tasks import ledger

# What a run may be asked for more of; everything else must stay as it was.
_MORE = "scorers any_interval policies budgets problems samples batch traces compare"
MAY_DIFFER = (
    *common.other_jobs("evaluate"), *(f"evaluate.{x}" for x in _MORE.split()), "eval.baseline",
)  # fmt: skip

Cell = tuple[str, int, Policy]  # a policy by its name, at a budget (or `FULL`)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A prompt, and how answers to it are judged.

    Attributes:
      id: its name in `samples.jsonl`.
      prompt: token ids.
      reference: the right answer, as text.
      check: from (token ids, text) to the verdict and the answer found.
    """

    id: str
    prompt: np.ndarray
    reference: str
    check: Callable[[np.ndarray, str], tuple[str, str | None]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """An evaluation, checked and loaded.

    Attributes:
      named: the policies, by the name they are reported under; the full cache is not among them.
      inputs: digests for `open_run`.
      held_out: traces to measure losses on, if any.
      other: another evaluation to compare with, if any.
      shared: policies and budgets that both have.
    """

    named: dict[str, Policy]
    inputs: dict[str, str | list[str]]
    model: Model
    held_out: Traces | None
    problems: list[Problem]
    shape: answering.Shape
    sampling: Sampling
    other: comparison.Other | None
    shared: list[comparison.Cell]


def check(config: ConfigDict, workdir: str, later: Sequence[str] = ()) -> None:
    """Refuses what `run` would refuse; nothing is written.

    Args:
      later: names in `evaluate.scorers` of scorers that are not trained yet.
    """
    scorers = [entry for entry in config.evaluate.scorers if entry.partition("=")[0] not in later]
    part = ConfigDict(config).copy_and_resolve_references()
    part.evaluate.scorers = tuple(scorers)
    if part.eval.baseline in later:
        part.eval.baseline = ""
    plan = _plan(part, workdir, judge.Checker(part.evaluate.deadline), weights=False)
    rundir.check_run(workdir, config, MAY_DIFFER, plan.inputs)


def run(config: ConfigDict, workdir: str, anew: Sequence[str] = ()) -> list[accuracy.Accuracy]:
    """Answers with every policy at every budget, and measures losses on held-out traces.

    Resumes, and adds to earlier answers when asked for more policies, budgets, problems or samples.
    Several processes share the queue; all of them get all answers. Writes
    `samples.jsonl`, `accuracy.{txt,md,csv}`, `regressions.csv`, from the traces `loss_ratio.*`,
    `trace_losses.csv`, `diagnosis.csv` and pictures, and `compared.{txt,md,csv}` with another
    evaluation. Without a benchmark only losses are measured.

    Args:
      anew: names of scorers that may have been trained further: then their earlier answers are
        replaced. Any other change of what answered is refused.
    """
    groups.check(config, "evaluate")
    settings = config.evaluate
    checker = judge.Checker(settings.deadline)
    budgets, count = settings.budgets, len(settings.policies) + len(settings.scorers)
    asked = "the embedded task" if settings.benchmark == api.EMBEDDED else settings.benchmark
    what = f"{count} policies", common.said_cadence(config, budgets), f"questions of {asked}"
    common.announce("evaluate", config, workdir, common.model_config(config), what)
    plan = _plan(config, workdir, checker, anew)
    named, model, problems = plan.named, plan.model, plan.problems
    if problems:
        longest = plan.shape.width + plan.shape.new_tokens
        common.warn_of_length(model.config, longest, "prompt + new_tokens")
    if plan.held_out is not None:
        common.warn_of_length(model.config, plan.held_out.length_n.max(), "the longest trace")

    anew = [name for name in anew if name in named]
    path = rundir.check_path(workdir)
    forget = functools.partial(answers.forget, path, anew, plan.inputs)
    if changed := parallel.on_first(forget, f"open {path}"):
        common.say(f"{path}: {', '.join(changed)} has been trained further and answers anew")
    run = open_run(workdir, config, MAY_DIFFER, plan.inputs)
    samples = answers.Samples(run.path / "samples.jsonl", config.interval)
    references = {problem.id: problem.reference for problem in problems}
    samples.check_references(references)
    run.resume({})  # metrics are written again from all samples

    cells = cells_of(config, named) if problems else []
    asked = list(itertools.product(range(len(problems)), range(settings.samples)))
    # Several processes meet after so many answers each, a single one after every `L` steps.
    at_once = settings.batch if jax.process_count() > 1 else 1
    with checker, preemption.noticed() as asked_to_end:
        for name, budget, policy in cells:
            known = functools.partial(_key, name, budget, problems)
            todo = [x for x in asked if known(*x) not in samples.rows]
            left, label, start = len(todo), f"{name} {budget or ''}".strip(), time.perf_counter()
            mine = todo[jax.process_index() :: jax.process_count()]
            ended, tokens = _answered(config, plan, (name, budget, policy), mine), 0
            with common.progress(total=len(asked), initial=len(asked) - left, desc=label) as bar:
                while left:
                    rows = parallel.share(_next(ended, at_once))
                    samples.add({"policy": name, "budget": budget, **row} for row in rows)
                    left, tokens = left - len(rows), tokens + sum(row["tokens"] for row in rows)
                    bar.update(len(rows))
                    speed = tokens / (time.perf_counter() - start)
                    in_use = min(left, settings.batch * jax.process_count())
                    bar.set_postfix_str(f"{speed:.0f} tokens/s, {in_use} rows in use")
                    if parallel.anywhere(asked_to_end()):
                        run.close()
                        raise preemption.Preempted(f"{len(samples.rows)} answers are in {workdir}")
    # Policies as they came, problems in their order.
    came = {key[:2]: None for key in samples.rows}
    cell_rank, problem_rank = ({x: i for i, x in enumerate(some)} for some in (came, references))
    samples.settle(
        lambda key: (cell_rank[key[:2]], problem_rank.get(key[2], len(references)), key[3])
    )
    rows = [
        samples.rows[_key(name, budget, problems, *x)] for name, budget, _ in cells for x in asked
    ]
    found = [
        dataclasses.replace(
            r,
            trained=trained_at(named.get(r.policy), config.interval),
            protect_prompt=config.protect_prompt if r.budget else 0,
        )
        for r in accuracy.summarise(rows)
    ]
    if problems:
        _write_answers(run, found, rows)
    for result in found:
        name = f"{result.policy}_{result.budget}" if result.budget else result.policy
        run.log(result.budget, {f"pass_at_1/{name}": result.pass_at_1})
    losses = []
    if plan.held_out is not None:
        model = common.to_replay(model)  # that of `plan` is used up
        losses = _measure_traces(config, model, named, run, plan.held_out)
    if plan.other is not None:
        if losses and plan.held_out.digests() != plan.other.traces:
            losses = []
        compared = comparison.compare(plan.other, plan.shared, rows, losses)
        _write_comparison(run, plan.other, compared)
    run.close()
    return found


def _plan(
    config: ConfigDict,
    workdir: str,
    checker: judge.Checker,
    anew: Sequence[str] = (),
    weights: bool = True,
) -> Plan:
    """Checks and loads what is needed, the cheapest first.

    Args:
      weights: of the language model; only to check, no second copy is loaded beside another's.
    """
    at = common.cadences(config, "evaluate.budgets")
    named, inputs = policies_of(config)
    if config.evaluate.traces:
        common.check_baseline(config, named)
    free = {rundir.answers_of(name) for name in anew}
    known = {name: x for name, x in inputs.items() if name not in free}
    rundir.check_run(workdir, config, MAY_DIFFER, known)
    compare = config.evaluate.compare
    other = comparison.load(compare, workdir) if compare else None
    common.check_policies(config, common.model_config(config), named, at)
    if weights:
        model = common.load_language_model(config, separate=bool(config.evaluate.benchmark))
    else:
        model = api.without_weights(config.model, common.revision(config))
    held_out = _traces(config, model)
    problems = _problems(config, model, checker)
    embedded = config.evaluate.benchmark == api.EMBEDDED
    new_tokens = answering.new_tokens(config, "evaluate", embedded)
    width = max((len(problem.prompt) for problem in problems), default=0)
    shape = answering.Shape(config.evaluate.batch, width, new_tokens)
    inputs |= common.language_inputs(model)
    if problems:
        asked = ((problem.prompt, problem.id, problem.reference) for problem in problems)
        inputs["evaluate.benchmark: questions"] = provenance.of_questions(asked)
    shared = []
    if other is not None:
        cells = [cell[:2] for cell in cells_of(config, named)]
        shared = _shared(config, other, cells, problems, held_out)
        if problems:
            comparison.check_questions(other, config.evaluate, [p.id for p in problems], inputs)
    sampling = Sampling.of(config.evaluate)
    return Plan(named, inputs, model, held_out, problems, shape, sampling, other, shared)


def cells_of(config: ConfigDict, named: dict[str, Policy]) -> list[Cell]:
    """Policies at their budgets, in the order of answering."""
    settings = config.evaluate
    cells = [("full", FULL, policies.get("full"))] if "full" in settings.policies else []
    for budget in settings.budgets:
        cells += [(name, budget, policy) for name, policy in named.items()]
    return cells


def policies_of(config: ConfigDict) -> tuple[dict[str, Policy], dict[str, str]]:
    """The policies to run, by the name they are reported under, and the digests of all."""
    scorers, inputs = {}, {}
    for entry in config.evaluate.scorers:
        name, equals, workdir = entry.partition("=")
        if not equals:
            raise UserError(f"evaluate.scorers: {entry!r} must be of the form name=workdir")
        if name in policies.names() and name not in sharing.METHODS:
            raise UserError(f"evaluate.scorers: {name!r} names a rule-based policy: rename it")
        with common.scorers_of(f"evaluate.scorers = {entry!r}", workdir):
            policy = api.load_scorer(workdir, any_interval=config.evaluate.any_interval)
        if isinstance(policy, policies.Foresight):
            action, temperature = config.evaluate.action, config.evaluate.action_temperature
            policy = policy.replace(action=action, temperature=temperature)
        scorers[name] = policy
        inputs[rundir.answers_of(name)] = provenance.of_arrays(policy.params)
        inputs[f"settings of the scorers {name!r}"] = sharing.said_settings(policy)
    baselines = {name: policies.get(name) for name in config.evaluate.policies}
    for name, policy in baselines.items():
        inputs[rundir.answers_of(name)] = provenance.of_settings(policy)
        # Another Python compiles the same code to other instructions.
        code = f"code of {name!r} (Python {'.'.join(platform.python_version_tuple()[:2])})"
        inputs[code] = provenance.of_policy(policy)
    if not baselines and not scorers:
        raise UserError("evaluate.policies and evaluate.scorers are empty: nothing to evaluate")
    baselines.pop("full", None)
    if not config.evaluate.budgets and (baselines or scorers):
        raise UserError("evaluate.budgets is empty: give at least one")
    return {**scorers, **baselines}, inputs


def _problems(config: ConfigDict, model: Model, checker: judge.Checker) -> list[Problem]:
    settings = config.evaluate
    if not settings.benchmark:
        return []
    if settings.benchmark == api.EMBEDDED:
        if not settings.problems:
            raise UserError("evaluate.problems must be at least 1: the embedded task has no end")
        common.check_vocabulary(config, model.config.vocab_size)
        found = ledger.problems(config.seed, "eval", 0, settings.problems, common.spec(config))
        return [
            Problem(str(i), ledger.encode(p.prompt), " ".join(p.answer[1:-1]), _exact(p))
            for i, p in enumerate(found)
        ]
    source = benchmarks.known(
        settings.benchmark, settings.split, settings.subset, settings.question, settings.answer
    )
    with common.of_field("evaluate.benchmark"):
        benchmark = benchmarks.load(source, settings.instruction)
    for row, why in benchmark.unusable:
        common.say(f"{settings.benchmark}: row {row} left out, {why}")
    if benchmark.unusable:
        common.say(f"{settings.benchmark}: {len(benchmark.unusable)} rows left out")
    asked = benchmark.questions[: settings.problems or None]
    found = [_question(config, model, checker, question) for question in asked]
    encoded = [
        (f"{settings.benchmark}: the question {problem.id}", question.text, problem.prompt)
        for question, problem in zip(asked, found, strict=True)
    ]
    common.warn_of_unknown(model, encoded, "questions")
    return found


def _question(
    config: ConfigDict, model: Model, checker: judge.Checker, question: benchmarks.Question
) -> Problem:
    # A whole solution has its answer in the last box.
    reference = judge.last_boxed(question.answer) or question.answer
    what = f"{config.evaluate.benchmark}: the question {question.id}"
    prompt = api.encode(model, question.text, config.evaluate.chat, what)
    # To some tokenizers the tags of a thought are special tokens.
    opened = judge.opens_thought(api.decode(model, prompt, special=True), question.text)
    verdict = judge.check_choice if question.choice else checker.check

    def check(tokens, text):
        return verdict(api.decode(model, tokens, special=True), reference, opened)

    return Problem(question.id, prompt, reference, check)


def _exact(problem: ledger.Problem):
    def check(tokens, text):
        right = ledger.correct(tokens, problem)
        answer = text.partition("</think>")[2].strip()
        return (judge.RIGHT if right else judge.WRONG), answer or None

    return check


def _key(
    name: str, budget: int, problems: Sequence[Problem], problem: int, sample: int
) -> tuple[str, int, str, int]:
    """The key of a row of `samples.jsonl`."""
    return name, budget, problems[problem].id, sample


def _next(ended: Iterator[list[dict]], count: int) -> list[dict]:
    """At least so many of the next answers, while there are any."""
    rows = []
    while len(rows) < count and (some := next(ended, None)) is not None:
        rows += some
    return rows


def _answered(
    config: ConfigDict, plan: Plan, cell: Cell, asked: Sequence[tuple[int, int]]
) -> Iterator[list[dict]]:
    """Answers as they end; rows of `samples.jsonl`, without policy and budget.

    Args:
      asked: indices of problems and samples.
    """
    _, budget, policy = cell
    how = requests.Plan(common.cadence(config, budget), plan.sampling, plan.model.stop)
    given = [(plan.problems[i].prompt, api.sample_key(config.seed, i, j)) for i, j in asked]
    row = functools.partial(_row, config, plan, policy, how.cadence)
    for ended in answering.queue(plan.model, policy, how, plan.shape, given):
        yield [row(*asked[n], tokens) for n, tokens in ended]


def _row(config, plan, policy, cadence, i: int, j: int, tokens: np.ndarray) -> dict:
    """A row for sample `j` of problem `i`."""
    problem = plan.problems[i]
    one = api.finished(plan.model, policy, len(problem.prompt), tokens, cadence)
    verdict, answer = problem.check(tokens, one.text)
    return {
        "interval": config.interval,
        "problem": problem.id,
        "sample": j,
        "verdict": verdict,
        "answer": answer,
        "reference": problem.reference,
        "tokens": len(tokens),
        "truncated": one.truncated,
        "evictions": one.evictions,
        "text": one.text,
    }


def _write_answers(run: Run, found: Sequence[accuracy.Accuracy], rows: Sequence[dict]) -> None:
    if not parallel.first():
        return
    body = [accuracy.cells(result) for result in found]
    table = tables.write(run.path / "accuracy", accuracy.HEAD, body, accuracy.csv(found))

    right, head = set(), ("policy", "budget", "problem", "sample", "verdict", "answer", "reference")
    for row in rows:
        if row["policy"] == "full" and answers.right(row):
            right.add((row["problem"], row["sample"]))
    worse = [
        [row[name] for name in head]
        for row in rows
        if (row["problem"], row["sample"]) in right and not answers.right(row)
    ]
    write_text(run.path / "regressions.csv", tables.comma_separated(head, worse))
    plots.accuracy(found, run.path / "accuracy.png")
    common.say(f"\n{table}\n")
    if idle := sorted({r.budget for r in found if r.budget and not r.evictions}):
        common.say(f"no evictions at budget {', '.join(map(str, idle))}: answers are short")
    for line in accuracy.warnings(found, run.config["evaluate"]["deadline"]):
        common.say(f"warning: {line}")
    written = "samples.jsonl, accuracy.(txt md csv png pdf), regressions.csv"
    common.say(f"written to {run.path}: {written}")


def _shared(
    config: ConfigDict, other: comparison.Other, cells: Sequence[comparison.Cell],
    problems: Sequence[Problem], held_out: Traces | None,
) -> list[comparison.Cell]:  # fmt: skip
    """The policies and budgets whose answers can be compared; says which can't."""
    references = {problem.id: problem.reference for problem in problems}
    found = comparison.shared(other, cells, references, config.evaluate.samples)
    if left_out := [comparison.label(cell) for cell in cells if cell not in found]:
        common.say(f"not compared, as {other.path} has none of it: {', '.join(left_out)}")
    if held_out is not None and held_out.digests() != other.traces:
        why = "other traces" if other.traces else f"no {comparison.TRACES}"
        if not problems:
            raise UserError(f"evaluate.compare: {other.path} has {why}, and there are no answers")
        common.say(f"loss ratios are not compared: {other.path} has {why}")
    return found


def _write_comparison(run: Run, other: comparison.Other, found: Sequence) -> None:
    if not parallel.first():
        return
    body, csv = [comparison.cells(one) for one in found], comparison.csv(found)
    about = (
        f"here: {run.path}; there: {other.path}; pass@1 in % and points with 95 % intervals, "
        "paired by problem; loss ratios ± one standard error, paired by trace"
    )
    if run.config["protect_prompt"] or other.protect_prompt:
        about += (
            f"; protect_prompt = {run.config['protect_prompt']} here, {other.protect_prompt} there"
        )
    table = tables.write(run.path / "compared", comparison.HEAD, body, csv, about)
    common.say(f"\n{table}\n\n{about}\nwritten to {run.path}: compared.(txt md csv)")


def _traces(config: ConfigDict, model: Model) -> Traces | None:
    """Held-out traces to measure losses on, if any are asked for."""
    settings = config.evaluate
    if not settings.benchmark and not (settings.traces and settings.budgets):
        raise UserError(
            "evaluate.benchmark is empty, so only losses are measured: set evaluate.traces to at "
            "least 1, and evaluate.budgets"
        )
    if not settings.traces or not settings.budgets:
        return None
    if settings.benchmark not in ("", api.EMBEDDED) and not config.data.eval_path:
        common.say("no loss ratios: set data.eval_path to held-out traces for them")
        return None
    return common.load_traces(
        config, "eval", settings.traces, max(settings.budgets), model.config.vocab_size
    )


def _measure_traces(config, model, named, run, held_out) -> list[loss_ratio.Losses]:
    """Loss ratios, diagnosis and pictures on held-out traces."""
    settings = config.evaluate
    results = common.measure_losses(config, model.lm, named, held_out, settings.budgets)
    common.write_losses(run, results, config.eval.baseline)
    if not parallel.first():
        return results
    path = run.path
    write_text(path / comparison.TRACES, loss_table.traces_csv(results, held_out.digests()))
    write_text(path / "diagnosis.csv", diagnosis.csv(results))
    plots.loss_by_position(results, path / "loss_by_position.png")
    plots.regret(results, path / "regret.png")

    trace = Batch.of(*held_out.rows(np.array([np.argmax(held_out.length_n)])))
    cadence = common.cadence(config, settings.budgets[len(settings.budgets) // 2])
    maps = diagnosis.retention(model.lm, named, trace, cadence)
    budget = said_budget(cadence.budget, cadence.protect_prompt)
    title = f"held at B = {budget}, mean over heads"
    plots.retention(maps, path / "retention.png", title)
    table_ykj = diagnosis.block_scores(model.lm, trace, config.interval)
    plots.attention_patterns(
        diagnosis.patterns(table_ykj), config.interval, path / "attention_patterns.png"
    )
    common.say(
        f"written to {path}: {comparison.TRACES}, diagnosis.csv, loss_by_position.png, regret.png, "
        "retention.png, attention_patterns.png"
    )
    return results
