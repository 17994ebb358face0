"""Comparison of two evaluations on the same problems and traces, paired by problem and by trace."""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fkv import files
from fkv.errors import UserError
from fkv.evaluation import accuracy, answers, loss_table, paired, tables
from fkv.evaluation.accuracy import Accuracy, Cell
from fkv.evaluation.loss_ratio import Losses
from fkv.runs import rundir

TRACES = "trace_losses.csv"


@dataclasses.dataclass(frozen=True)
class Other:
    """Another evaluation."""

    path: Path
    rows: Mapping[tuple, dict]  # answers, by `answers.key`
    losses: Mapping[Cell, Losses]  # on its traces
    traces: Sequence[str]  # their `Traces.digests`
    protect_prompt: int = 0


@dataclasses.dataclass(frozen=True)
class Compared:
    """One policy at one budget, there and here; None unless both have answers, or losses."""

    policy: str
    budget: int
    there: Accuracy | None = None
    here: Accuracy | None = None
    lost: int | None = None  # these three: see `accuracy.paired`
    gained: int | None = None
    difference: accuracy.Difference | None = None
    losses_there: Losses | None = None
    losses_here: Losses | None = None


def load(name: str, workdir: str | Path) -> Other:
    """Loads another evaluation, to compare with the one in `workdir`.

    Raises:
      UserError: it is missing, damaged, or the same one.
    """
    path = files.expand(name)
    if path.resolve() == files.expand(workdir).resolve():
        raise UserError(
            f"evaluate.compare = {name!r} is the workdir of this evaluation: give another"
        )
    if not any((path / file).is_file() for file in ("samples.jsonl", TRACES)):
        raise UserError(
            f"evaluate.compare = {name!r} has no samples.jsonl: give the workdir of an evaluation"
        )
    rows, losses, traces = (), (), ()
    kept = _config(path).get("protect_prompt")
    kept = kept if isinstance(kept, int) else 0
    if (path / "samples.jsonl").is_file():
        rows, _ = answers.read(path / "samples.jsonl")
    if (path / TRACES).is_file():
        losses, traces = loss_table.read_traces(path / TRACES, kept)
    by_cell = {(one.policy, one.budget): one for one in losses}
    return Other(path, {answers.key(row): row for row in rows}, by_cell, traces, kept)


def _config(path: Path) -> dict[str, Any]:
    """The config of another evaluation; empty if it can't be read."""
    try:
        return dict(json.loads(files.read_bytes(path / "config.json")))
    except (UserError, ValueError, TypeError, RecursionError):
        return {}


def shared(
    other: Other, cells: Sequence[Cell], references: Mapping[str, str], samples: int
) -> list[Cell]:
    """The policies and budgets that both evaluations have.

    Args:
      cells: those of this one.
      references: the right answer to each problem.
      samples: answers per problem.

    Raises:
      UserError: none is shared, or the other lacks some of their answers or has other references.
    """
    there = {key[:2] for key in other.rows} if references else {*other.losses}
    found = [cell for cell in cells if cell in there]
    if not found:
        names = ", ".join(map(label, sorted(there))) or "nothing"
        raise UserError(
            f"evaluate.compare: {other.path} has {'answers' if references else 'losses'} of "
            f"{names}, but of no policy and budget of this run"
        )
    for cell, (problem, reference), sample in itertools.product(
        found, references.items(), range(samples)
    ):
        row = other.rows.get((*cell, problem, sample))
        if row is None:
            raise UserError(
                f"evaluate.compare: {other.path} has no answer of {label(cell)} to problem "
                f"{problem!r}, sample {sample}: ask for the same problems and samples in both"
            )
        if row["reference"] != reference:
            raise UserError(
                f"evaluate.compare: {other.path} has other problems: the answer to {problem!r} "
                f"is {row['reference']!r} there and {reference!r} here"
            )
    return found


def compare(
    other: Other, cells: Sequence[Cell], rows: Sequence[dict], losses: Sequence[Losses]
) -> list[Compared]:
    """Puts both evaluations side by side.

    Args:
      cells: whose answers are compared, from `shared`.
      rows: this one's, for all of `cells`.
      losses: this one's, on the other's traces; empty to leave them out.
    """
    found = {}
    for cell, mine in accuracy.by_cell(rows).items():
        if cell in cells:
            theirs = [other.rows[answers.key(row)] for row in mine]
            (there,), (here,) = accuracy.summarise(theirs), accuracy.summarise(mine)
            both = accuracy.paired(accuracy.verdicts(mine), accuracy.verdicts(theirs))
            found[cell] = Compared(*cell, there, here, *both)
    for one in losses:
        cell = one.policy, one.budget
        theirs = other.losses.get(cell)
        # The interval decides which tokens count, and `grpo.high_fraction` how they are split.
        if one.policy != "full" and theirs and np.array_equal(theirs.tokens, one.tokens):
            before = found.get(cell, Compared(*cell))
            found[cell] = dataclasses.replace(before, losses_there=theirs, losses_here=one)
    return sorted(found.values(), key=lambda one: one.budget)


def label(cell: Cell) -> str:
    """A policy and its budget, for messages."""
    return f"{cell[0]} at {cell[1]}" if cell[1] else cell[0]


HEAD = (
    "policy", "budget", "pass@1 there", "here", "points", "lost", "gained", "loss ratio there",
    "here", "difference",
)  # fmt: skip


def cells(one: Compared) -> list[str]:
    """One row of the table, as text."""
    answered, measured = [""] * 5, [""] * 3
    if one.here is not None:
        both = [(100 * x.pass_at_1, *x.interval()) for x in (one.there, one.here)]
        answered = [f"{x:.1f} ({100 * low:.1f}-{100 * high:.1f})" for x, low, high in both]
        answered += map(str, (one.difference, one.lost, one.gained))
    if one.losses_here is not None:
        difference = paired.difference(one.losses_here, one.losses_there)
        measured = [
            "{:.3f} ± {:.3f}".format(*x.ratio()) for x in (one.losses_there, one.losses_here)
        ]
        measured.append("{:+.3f} ± {:.3f}".format(*difference))
    return [one.policy, str(one.budget or ""), *answered, *measured]


def csv(results: Sequence[Compared]) -> str:
    """Comma-separated values, with shares instead of points, and all three kinds of losses."""
    head = (
        "policy,budget,answers,there,there_low,there_high,here,here_low,here_high,difference,"
        "difference_low,difference_high,lost,gained"
    ).split(",")
    for kind in ("ratio", "ratio_low", "ratio_high"):
        for name in ("there", "here", "difference"):
            head += [f"{kind}_{name}", f"{kind}_{name}_se"]
    rows = []
    for one in results:
        answered, measured = [None] * 12, [None] * 18
        if one.here is not None:
            both = [x for r in (one.there, one.here) for x in (r.pass_at_1, *r.interval())]
            points = dataclasses.astuple(one.difference)
            answered = [one.here.right_pn.size, *both, *points, one.lost, one.gained]
        if (ours := one.losses_here) is not None:
            theirs, measured = one.losses_there, []
            for kind in range(3):
                measured += [*theirs.ratio(kind), *ours.ratio(kind)]
                measured += paired.difference(ours, theirs, kind)
        rows.append([one.policy, one.budget, *answered, *measured])
    return tables.comma_separated(head, rows)


def check_questions(
    other: Other, settings: Mapping[str, Any], ids: Sequence[str], inputs: Mapping[str, Any]
) -> None:
    """Refuses to compare answers to other questions, even if the right answers are the same.

    Passes if prompts were made with another setting or tokenizer, or digests are missing.

    Args:
      settings: the `evaluate` group of this evaluation's config.
      ids: of its problems.
      inputs: its digests.
    """
    there = _config(other.path).get("evaluate")
    if not isinstance(there, dict):
        return
    theirs, tokenizer = rundir.read_inputs(other.path), "model: its tokenizer"
    alike = theirs.get(tokenizer) == inputs.get(tokenizer) and all(
        there.get(name) == settings[name] for name in ("instruction", "chat")
    )
    name = "evaluate.benchmark: questions"
    if not alike or not isinstance(theirs.get(name), list):
        return
    known = set(theirs[name])
    if new := [i for i, one in zip(ids, inputs[name], strict=True) if one not in known]:
        raise UserError(
            f"evaluate.compare: {other.path} has other questions: its problem {new[0]!r} is a "
            "different one"
        )
