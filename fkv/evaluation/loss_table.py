"""Tables of losses: as text, as CSV, and trace by trace."""

import csv as csv_module
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fkv import files
from fkv.cache.cadence import said_budget
from fkv.errors import UserError
from fkv.evaluation import tables
from fkv.evaluation.loss_ratio import Losses
from fkv.evaluation.paired import Estimate, Paired, against_baseline

HEAD = (
    "policy", "budget", "loss ratio", "to baseline", "gap closed", "added nats, low", "overlap",
    "trained at",
)  # fmt: skip
NOTE = (
    "± one standard error over traces. To baseline: minus the loss ratio of {}, paired by trace; "
    "gap closed: of its gap to golden."
)
BEST = "the best rule-based policy at that budget"
ALONE = Paired()


def write(path: Path, results: Sequence[Losses], baseline: str = "") -> str:
    """Writes the table as `path`.txt, .md and .csv; returns it as text, and what it says below.

    Args:
      baseline: see `against_baseline`.
    """
    pairs = against_baseline(results, baseline)
    rows = [cells(*both) for both in zip(results, pairs, strict=True)]
    note = NOTE.format(baseline or BEST)
    return f"{tables.write(path, HEAD, rows, csv(results, pairs), note)}\n\n{note}"


def cells(result: Losses, paired: Paired = ALONE) -> list[str]:
    """One row of the table, as text: figures ± one standard error; empty where there is none."""
    to, closed = _said("{:+.3f}", paired.difference), _said("{:.1f}", paired.gap_closed, 100, " %")
    if result.policy == paired.baseline:
        to, closed = "baseline", ""
    return [
        result.policy,
        said_budget(result.budget, result.protect_prompt),
        _said("{:.3f}", result.ratio()),
        to,
        closed,
        _said("{:.4f}", result.added(1)),
        _said("{:.3f}", None if result.overlap is None else result.mean_overlap()),
        result.trained,
    ]


def _said(form: str, estimate: Estimate | None, scale: float = 1, unit: str = "") -> str:
    if estimate is None:
        return ""
    value, error = (scale * x for x in estimate)
    plus = "" if np.isnan(error) else f" ± {form.replace('+', '').format(error)}"
    return f"{form.format(value)}{plus}{unit}"


def csv(results: Sequence[Losses], pairs: Sequence[Paired] = ()) -> str:
    """The table as CSV, with a header; gaps are shares."""
    head = (
        "policy,budget,interval,traces,ratio,ratio_se,ratio_low,ratio_low_se,ratio_high,"
        "ratio_high_se,added_low,added_low_se,overlap,overlap_se,"
        "trained_at,baseline,difference,difference_se,gap_closed,gap_closed_se,protect_prompt"
    ).split(",")
    rows = []
    for r, paired in zip(results, pairs or [ALONE] * len(results), strict=True):
        numbers = [*r.ratio(0), *r.ratio(1), *r.ratio(2), *r.added(1), *r.mean_overlap()]
        rows.append([r.policy, r.budget, r.interval, len(r.full), *(f"{x:.6g}" for x in numbers)])
        rows[-1] += [r.trained, paired.baseline]
        for estimate in (paired.difference, paired.gap_closed):
            values = estimate or (float("nan"),) * 2
            rows[-1] += ["" if np.isnan(x) else f"{x:.6g}" for x in values]
        rows[-1].append(r.protect_prompt)
    return tables.comma_separated(head, rows)


TRACE_HEAD = (
    "policy,budget,interval,trace,tokens,evicted,full,tokens_low,evicted_low,full_low,tokens_high,"
    "evicted_high,full_high,protect_prompt"
).split(",")


def traces_csv(results: Sequence[Losses], names: Sequence[str]) -> str:
    """Losses and tokens of every trace, identified by `names`, as CSV."""
    rows = []
    for r in results:
        sums_nk3 = np.stack([r.tokens, r.evicted, r.full], axis=-1)  # [n, kinds, 3]
        for name, sums in zip(names, sums_nk3.reshape(len(names), 9).tolist(), strict=True):
            rows.append([r.policy, r.budget, r.interval, name, *sums, r.protect_prompt])
    return tables.comma_separated(TRACE_HEAD, rows)


def read_traces(path: Path, protect_prompt: int = 0) -> tuple[list[Losses], list[str]]:
    """Reads what `traces_csv` wrote.

    Args:
      protect_prompt: of files of earlier versions, which have no column of it.

    Returns:
      The losses, and the names of their traces.

    Raises:
      UserError: the file is not of this form.
    """
    text = files.read_text(path)
    lines = list(csv_module.reader(io.StringIO(text)))
    try:
        if not text.endswith("\n"):
            raise ValueError("cut off")
        if lines[:1] == [TRACE_HEAD[:-1]]:
            lines = [TRACE_HEAD, *([*line, protect_prompt] for line in lines[1:])]
        if lines[:1] != [TRACE_HEAD]:
            raise ValueError("another header")
        found = {}
        for policy, budget, interval, name, *sums, kept in lines[1:]:
            cell = found.setdefault((policy, int(budget), int(interval), int(kept)), {})
            if name in cell:
                raise ValueError(f"trace {name} twice")
            cell[name] = np.array(sums, float).reshape(3, 3)
            if not np.isfinite(cell[name]).all():
                raise ValueError(f"{policy!r} has NaN or infinity for trace {name}")
        names = [list(cell) for cell in found.values()]
        if not names or any(one != names[0] for one in names):
            raise ValueError("its policies have different traces, or none")
    except ValueError as error:
        raise UserError(f"{path} is not what an evaluation writes ({error}): delete it") from None
    results = []
    for (*key, kept), cell in found.items():
        tokens, evicted, full = np.moveaxis(np.stack(list(cell.values())), -1, 0)
        results.append(Losses(*key, evicted, full, tokens, protect_prompt=kept))
    return results, names[0]
