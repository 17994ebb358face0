"""Two evaluations of the same problems and traces: differences, paired by problem and by trace."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fkv import files
from fkv.errors import UserError
from fkv.evaluation import accuracy, answers, loss_ratio, tables
from fkv.evaluation.accuracy import Accuracy
from fkv.evaluation.loss_ratio import Losses

Cell = tuple[str, int]  # policy and budget; budget 0 is the full cache
TRACES = "trace_losses.csv"


@dataclasses.dataclass(frozen=True)
class Other:
    """Another evaluation.

    Attributes:
      path: its directory.
      rows: its answers, by what names them.
      losses: of its traces, by policy and budget; none where it measured none.
      traces: what names these.
    """

    path: Path
    rows: Mapping[tuple, dict]
    losses: Mapping[Cell, Losses]
    traces: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Compared:
    """One policy at one budget in both; None where not both have answers, or losses.

    Attributes:
      there, here: pass@1 of the other and of this one.
      difference: what this one has over the other.
      lost, gained: samples that the other answers and this one doesn't, and the reverse.
      losses_there, losses_here: likewise.
    """

    policy: str
    budget: int
    there: Accuracy | None = None
    here: Accuracy | None = None
    difference: accuracy.Difference | None = None
    lost: int | None = None
    gained: int | None = None
    losses_there: Losses | None = None
    losses_here: Losses | None = None


def load(name: str, workdir: str | Path) -> Other:
    """The evaluation in a directory.

    Args:
      workdir: of the evaluation that is to be compared with it.

    Raises:
      UserError: there is none, it is damaged, or it is the same.
    """
    path = files.expand(name)
    if path.resolve() == files.expand(workdir).resolve():
        raise UserError(f"evaluate.compare = {name!r} is this evaluation itself: give another's")
    if not (path / "samples.jsonl").is_file():
        raise UserError(
            f"evaluate.compare = {name!r} has no samples.jsonl: give the workdir of an evaluation"
        )
    rows, _ = answers.read(path / "samples.jsonl")
    losses, traces = {}, ()
    if (path / TRACES).is_file():
        found, traces = loss_ratio.read_traces(path / TRACES)
        losses = {(one.policy, one.budget): one for one in found}
    return Other(path, {answers.key(row): row for row in rows}, losses, traces)


def shared(
    other: Other, cells: Sequence[Cell], references: Mapping[str, str], samples: int
) -> list[Cell]:
    """The policies and budgets that the other evaluation has, too.

    Args:
      cells: those of this one.
      references: the right answer to each problem.
      samples: of each.

    Raises:
      UserError: there is none, or the other has one without some of the answers, or to problems
        with other references.
    """
    there = {key[:2] for key in other.rows}
    found = [cell for cell in cells if cell in there]
    if not found:
        names = ", ".join(label(cell) for cell in sorted(there)) or "nothing"
        raise UserError(
            f"evaluate.compare: {other.path} has answers of {names}: none of what is asked for here"
        )
    for cell in found:
        for problem, reference in references.items():
            for sample in range(samples):
                row = other.rows.get((*cell, problem, sample))
                if row is None:
                    raise UserError(
                        f"evaluate.compare: {other.path} has no answer of {label(cell)} to "
                        f"problem {problem!r}, sample {sample}: ask for the same problems and "
                        "samples in both"
                    )
                if row["reference"] != reference:
                    raise UserError(
                        f"evaluate.compare: {other.path} has other problems: the answer to "
                        f"{problem!r} is {row['reference']!r} there and {reference!r} here"
                    )
    return found


def compare(
    other: Other, cells: Sequence[Cell], rows: Sequence[dict], losses: Sequence[Losses]
) -> list[Compared]:
    """Both evaluations side by side.

    Args:
      cells: of which answers are compared, from `shared`.
      rows: this one's, for all of `cells`.
      losses: this one's, on the other's traces; empty to leave them out.
    """
    own = [row for row in rows if (row["policy"], row["budget"]) in cells]
    here = _by_cell(accuracy.summarise(own))
    there = _by_cell(accuracy.summarise([other.rows[answers.key(row)] for row in own]))
    found = {
        cell: Compared(*cell, there[cell], here[cell], *_paired(other, cell, own)) for cell in here
    }
    for one in losses:
        cell = one.policy, one.budget
        theirs = other.losses.get(cell)
        if one.policy == "full" or theirs is None:
            continue
        # Another interval counts other tokens, another `grpo.high_fraction` splits them otherwise.
        if np.array_equal(theirs.tokens, one.tokens):
            before = found.get(cell, Compared(*cell))
            found[cell] = dataclasses.replace(before, losses_there=theirs, losses_here=one)
    return sorted(found.values(), key=lambda one: one.budget)


def _by_cell(results: Sequence[Accuracy]) -> dict[Cell, Accuracy]:
    return {(one.policy, one.budget): one for one in results}


def _paired(other: Other, cell: Cell, rows: Sequence[dict]):
    """Difference, lost and gained of one cell."""
    mine = [row for row in rows if (row["policy"], row["budget"]) == cell]
    pair = []
    for some in (mine, [other.rows[answers.key(row)] for row in mine]):
        pair.append({(row["problem"], row["sample"]): answers.right(row) for row in some})
    lost, gained, difference = accuracy.paired(*pair)
    return difference, lost, gained


def label(cell: Cell) -> str:
    """A policy and its budget in words."""
    return f"{cell[0]} at {cell[1]}" if cell[1] else cell[0]


HEAD = (
    "policy",
    "budget",
    "pass@1 there",
    "here",
    "points",
    "lost",
    "gained",
    "loss ratio there",
    "here",
    "difference",
)


def cells(one: Compared) -> list[str]:
    """One row of the table, as text."""
    line = [one.policy, str(one.budget) if one.budget else ""]
    if one.here is None:
        line += [""] * 5
    else:
        for result in (one.there, one.here):
            low, high = result.interval()
            line.append(f"{100 * result.pass_at_1:.1f} ({100 * low:.1f}-{100 * high:.1f})")
        line += [str(one.difference), str(one.lost), str(one.gained)]
    if one.losses_here is None:
        return line + [""] * 3
    for losses in (one.losses_there, one.losses_here):
        line.append("{:.3f} ± {:.3f}".format(*losses.ratio()))
    difference = loss_ratio.difference(one.losses_here, one.losses_there)
    return [*line, "{:+.3f} ± {:.3f}".format(*difference)]


def csv(results: Sequence[Compared]) -> str:
    """Comma-separated values: shares, not points, and of losses the three kinds."""
    head = (
        "policy,budget,answers,there,there_low,there_high,here,here_low,here_high,difference,"
        "difference_low,difference_high,lost,gained"
    ).split(",")
    for kind in ("ratio", "ratio_low", "ratio_high"):
        for name in ("there", "here", "difference"):
            head += [f"{kind}_{name}", f"{kind}_{name}_se"]
    rows = []
    for one in results:
        row = [one.policy, one.budget]
        if one.here is None:
            row += [None] * 12
        else:
            row.append(one.here.right_pn.size)
            for result in (one.there, one.here):
                row += [result.pass_at_1, *result.interval()]
            row += [*dataclasses.astuple(one.difference), one.lost, one.gained]
        if one.losses_here is None:
            row += [None] * 18
        else:
            for kind in range(3):
                row += [*one.losses_there.ratio(kind), *one.losses_here.ratio(kind)]
                row += loss_ratio.difference(one.losses_here, one.losses_there, kind)
        rows.append(row)
    return tables.comma_separated(head, rows)
