"""Results of a sweep: all metrics, and a summary over the points of each group."""

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fkv import files
from fkv.errors import UserError
from fkv.evaluation import plots, tables
from fkv.runs.sweep import DONE, Point, is_done

FIGURES = {  # file of a run directory: its columns
    "loss_ratio.csv": ("ratio", "ratio_low", "added_low", "overlap", "gap_closed"),
    "accuracy.csv": ("pass_at_1",),
}
_OPTIONAL = ("gap_closed",)  # missing in files of earlier versions, empty without a baseline
_CELL = ("group", "policy", "budget", "figure")


def collect(points: Sequence[Point], root: str | os.PathLike) -> list[dict[str, Any]]:
    """All metrics of the finished points: a row per point, policy, budget and metric."""
    rows = []
    for point in points:
        path = files.expand(root) / point.name
        if is_done(path, point):
            about = {"point": point.name, "group": point.group or point.name}
            for file, figures in FIGURES.items():
                if (path / file).exists():
                    rows += [{**about, **row} for row in _figures(path / file, figures)]
    return rows


def _figures(path: Path, figures: Sequence[str]) -> Iterator[dict[str, Any]]:
    def refuse(reason):
        return UserError(
            f"{path} is damaged ({reason}): delete it and {DONE} next to it, and rerun the sweep"
        )

    try:
        text = files.read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise refuse(error) from error
    if not text.endswith("\n"):
        raise refuse("cut off" if text else "empty")
    lines, number = csv.DictReader(io.StringIO(text, newline="")), None
    try:
        known = lines.fieldnames or ()
        figures = [name for name in figures if name in known or name not in _OPTIONAL]
        if missing := [name for name in ("policy", "budget", *figures) if name not in known]:
            raise refuse(f"no column {missing[0]!r}")
        for number, line in enumerate(lines, 1):
            if None in line or None in line.values():
                raise refuse(f"row {number} does not have one field per column")
            kept = int(line.get("protect_prompt", 0))  # not in files of earlier versions
            policy = line["policy"] + (f", prompt {kept}" if kept else "")
            about = {"policy": policy, "budget": int(line["budget"])}
            for figure in figures:
                if figure in _OPTIONAL and not line[figure]:
                    continue
                yield {**about, "figure": figure, "value": float(line[figure])}
    except (ValueError, csv.Error) as error:
        raise refuse(f"row {number}: {error}") from error
    if number is None:
        raise refuse("no rows")


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean over the points of a group, and its standard error; NaN for one point."""
    cells: dict[tuple, list[float]] = {}
    for row in rows:
        cells.setdefault(tuple(row[name] for name in _CELL), []).append(row["value"])
    found = []
    for cell, values in cells.items():
        n = len(values)
        error = float(np.std(values, ddof=1) / n**0.5) if n > 1 else float("nan")
        row = dict(zip(_CELL, cell, strict=True))
        found.append({**row, "points": n, "mean": float(np.mean(values)), "se": error})
    return found


def table(summary: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a row per group, policy and budget, a column per metric."""
    figures = list(dict.fromkeys(row["figure"] for row in summary))
    lines: dict[tuple, dict[str, str]] = {}
    for row in summary:
        key = (row["group"], row["policy"], str(row["budget"]), str(row["points"]))
        error = "" if np.isnan(row["se"]) else f" ± {row['se']:.3f}"
        text = "" if np.isnan(row["mean"]) else f"{row['mean']:.3f}{error}"
        lines.setdefault(key, {})[row["figure"]] = text
    body = [[*key, *(cells.get(name, "") for name in figures)] for key, cells in lines.items()]
    return ["group", "policy", "budget", "points", *figures], body


def write_summary(points: Sequence[Point], root: str | os.PathLike) -> str:
    """Writes `results.csv` (all metrics) and `summary.*`, tables and a picture; returns the table
    as text, and where it is.
    """
    root = files.expand(root)
    rows = collect(points, root)
    if not rows:
        return f"no point in {root} has results yet"
    summary = summarise(rows)
    every, means = (
        tables.comma_separated(list(part[0]), [list(row.values()) for row in part])
        for part in (rows, summary)
    )
    files.write_text(Path(root, "results.csv"), every)
    text = tables.write(Path(root, "summary"), *table(summary), means)
    plots.sweep(summary, Path(root, "summary.png"))
    return f"{text}\n\nwritten to {root}: results.csv, summary.(csv txt md png pdf)"
