"""Figures of results.

Every function returns its figure, which a notebook shows, and writes it atomically where a path is
given: a PNG has a PDF beside it. Learned policies are thick, and rule-based ones thin; lines bear
their names at their ends, so that nobody has to tell twenty colours apart. Error bars are those of
the tables: one standard error, or 95 % of an answer's interval.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fkv.evaluation import drawing
from fkv.evaluation.accuracy import Accuracy
from fkv.evaluation.drawing import COLOURS, LEARNED, Name
from fkv.evaluation.loss_ratio import Losses
from fkv.evaluation.paired import against_baseline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = (("all tokens", 0), ("low-entropy tokens, added nats", 1), ("high-entropy tokens", 2))

_BUDGET = "budget (KV pairs per head)"
_SWEPT = {  # titles of a sweep's metrics
    "ratio": "loss / full-cache loss", "ratio_low": "the same, low-entropy tokens",
    "added_low": "added nats, low-entropy tokens", "gap_closed": "gap to golden closed",
    "pass_at_1": "pass@1",
}  # fmt: skip


def _held(axis, held_ct, top: float, colours: str) -> int:
    """Draws what is held, positions to the right, queries downwards; returns the interval."""
    chunks, t = held_ct.shape
    interval = -(-t // chunks)
    axis.imshow(held_ct, vmin=0, vmax=top, cmap=colours, extent=(0, t, chunks * interval, 0))
    return interval


def loss_ratios(
    results: Sequence[Losses], path: Name = None, title: str = "", baseline: str = ""
) -> "Figure":
    """Loss ratio against budget, a line per policy, ± one standard error.

    The last panel has differences to the baseline, paired by trace, if there is one.

    Args:
      baseline: see `against_baseline`.
    """
    styles = drawing.styles_of(dict.fromkeys(r.policy for r in results if r.policy != "full"))
    pairs = against_baseline(results, baseline)
    against = {p.baseline: None for p in pairs if p.baseline}
    panels = drawing.pages(len(PANELS) + bool(against))
    with drawing.figure(path, *panels, title, _BUDGET) as axes:
        for axis, (label, kind) in zip(axes.flat, PANELS, strict=False):
            for name, style in styles.items():
                rows = [r for r in results if r.policy == name]
                found = [(r.budget, r.added(kind) if kind == 1 else r.ratio(kind)) for r in rows]
                drawing.curve(axis, [(x, y, error) for x, (y, error) in found], name, **style)
            drawing.horizontal(axis, 0 if kind == 1 else 1)
            what = "nats per token" if kind == 1 else "loss / full-cache loss"
            axis.set(title=label, ylabel=what)
        if against:
            axis = axes[-1, -1]
            for name, style in styles.items():
                found = [
                    (r.budget, *p.difference)
                    for r, p in zip(results, pairs, strict=True)
                    if r.policy == name and p.difference
                ]
                if found:
                    drawing.curve(axis, found, name, **style)
            drawing.horizontal(axis, 0)
            what = next(iter(against)) if len(against) == 1 else "the best baseline"
            axis.set(title=f"all tokens, minus {what}", ylabel="difference of ratios, paired")
        for axis in axes.flat[: len(PANELS) + bool(against)]:
            axis.set_xticks(sorted({r.budget for r in results}))
            _cut_random(axis)
            drawing.name_lines(axis)
    return drawing.figure_of(axes)


def _cut_random(axis) -> None:
    """Ends the axis below plain `random` where that would leave the others no room."""
    handles, names = axis.get_legend_handles_labels()
    ys = {name: h.lines[0].get_ydata() for h, name in zip(handles, names, strict=True)}
    others = [y for name, y in ys.items() if name != "random"]
    if "random" not in ys or not others:
        return
    low, high = np.nanmin(np.concatenate(others)), np.nanmax(np.concatenate(others))
    if np.nanmax(ys["random"]) > high + (high - low):
        top, end = high + 0.25 * (high - low), ys["random"][-1]
        axis.set_ylim(top=top)
        if end > top:
            handles[names.index("random")].set_label(f"random: {end:.3g}, above")


def accuracy(results: Sequence[Accuracy], path: Name = None) -> "Figure":
    """pass@1 against budget with 95 % intervals, the full cache as a band."""
    evicted = [r for r in results if r.budget]
    title = "pass@1 with 95 % intervals over problems"
    if kept := max(r.protect_prompt for r in results):
        title += f"; {kept} tokens of the prompt protected"
    with drawing.figure(path, (8.5, 4.8), (1, 1), title, _BUDGET, "pass@1, %") as axes:
        axis = axes[0, 0]
        for r in results:
            if not r.budget:
                axis.axhspan(*(100 * x for x in r.interval()), color="gray", alpha=0.3)
                at = 100 * r.pass_at_1
                axis.axhline(at, color=COLOURS["full"], linewidth=1, label=r.policy)
        for name, style in drawing.styles_of(dict.fromkeys(r.policy for r in evicted)).items():
            found = [(r.budget, r.pass_at_1, *r.interval()) for r in evicted if r.policy == name]
            points = [(x, 100 * y, 100 * (y - low), 100 * (top - y)) for x, y, low, top in found]
            drawing.curve(axis, points, name, **style)
        axis.set(xticks=sorted({r.budget for r in evicted}), ylim=(-2, 102))
        drawing.name_lines(axis)
    return drawing.figure_of(axes)


def loss_by_position(results: Sequence[Losses], path: Name = None, bins: int = 16) -> "Figure":
    """Nats added by eviction against position, a panel per budget."""
    budgets, labels = sorted({r.budget for r in results}), ("position (tokens)", "nats per token")
    panels = drawing.pages(len(budgets), 5.5 if len(budgets) > 1 else 8.5, 4.2)
    with drawing.figure(path, *panels, "loss added by eviction", *labels) as axes:
        for axis, budget in zip(axes.flat, budgets, strict=False):
            rows = [r for r in results if r.budget == budget and r.policy != "full"]
            styles = drawing.styles_of([r.policy for r in rows])
            for r in rows:
                counted = ~np.isnan(r.excess_nt)
                position, excess = np.nonzero(counted)[1] + 1, r.excess_nt[counted]
                reach = position.min(), position.max() + 1
                count, edges = np.histogram(position, bins, reach)
                total, _ = np.histogram(position, bins, reach, weights=excess)
                mean = np.where(count, total / np.maximum(count, 1), np.nan)
                style = styles[r.policy] | {"marker": ""}
                axis.plot((edges[:-1] + edges[1:]) / 2, mean, label=r.policy, **style)
            drawing.horizontal(axis, 0)
            axis.set_title(f"B = {budget}")
            drawing.name_lines(axis)
    return drawing.figure_of(axes)


def regret(results: Sequence[Losses], path: Name = None) -> "Figure | None":
    """Regret against golden per layer and KV head, a panel per policy and budget; None if it is of
    no policy here.
    """
    shown = [r for r in results if r.regret_nyk is not None and r.policy != "golden"]
    if not shown:  # golden eviction has even budgets only
        return None
    names, budgets = list(dict.fromkeys(r.policy for r in shown)), sorted({r.budget for r in shown})
    size = (max(1.7 * len(names) + 1, 5.5), 1.9 * len(budgets) + 0.8)
    title = "attention lost per eviction, beyond golden"
    top = max(r.regret_nyk.mean(0).max() for r in shown)
    with drawing.figure(path, size, (len(budgets), len(names)), title, "KV head", "layer") as axes:
        for r in shown:
            row, column = budgets.index(r.budget), names.index(r.policy)
            axis = axes[row][column]
            image = axis.imshow(r.regret_nyk.mean(0), vmin=0, vmax=top, cmap="magma_r")
            _, layers, heads = r.regret_nyk.shape
            axis.set(xticks=range(heads), yticks=range(0, layers, 1 + layers // 10))
            if row == 0:
                axis.set_title(drawing.broken(r.policy), fontsize="small")
            if column == 0:
                axis.set_ylabel(f"B = {r.budget}")
        image.figure.colorbar(image, ax=axes, label="attention lost")
    return drawing.figure_of(axes)


def retention(held: Mapping[str, np.ndarray], path: Name = None, title: str = "") -> "Figure":
    """The entries held over time, a panel per policy and layer; of many layers four.

    Args:
      held: from `diagnosis.retention`.
    """
    layers = len(next(iter(held.values())))
    shown = np.linspace(0, layers - 1, min(layers, 4)).round().astype(int).tolist()
    size = (3.2 * len(shown), 1.5 * len(held) + 0.8)
    labels = "position of the token", "position of the queries (tokens)"
    with drawing.figure(path, size, (len(held), len(shown)), title, *labels) as axes:
        for row, (name, one) in zip(axes, held.items(), strict=True):
            for layer, axis in zip(shown, row, strict=True):
                _held(axis, one[layer].mean(0), 1, "Greens")
                axis.set_title(f"{name}, layer {layer}")
                axis.label_outer()
    return drawing.figure_of(axes)


def lookups(
    held: Mapping[str, np.ndarray],
    lookup_n2: np.ndarray,
    path: Name = None,
    title: str = "",
    prompt: int = 0,
) -> "Figure":
    """The entries that one head holds over time, and which of its look-ups find their token.

    Args:
      held: for each policy, bool [chunks, t], of one head from `diagnosis.retention`.
      lookup_n2: queries and keys of the head, from `diagnosis.lookups`.
      prompt: tokens of the prompt, whose end is marked by a dotted line.
    """
    columns = min(4, len(held))
    rows = -(-len(held) // columns)
    size = (2.9 * columns + 0.4, 2.9 * rows + 0.4)
    labels = "position of the key (tokens); gray where it is held", "position of the query (tokens)"
    query, key = lookup_n2.T
    with drawing.figure(path, size, (rows, columns), title, *labels) as axes:
        for axis, (name, one) in zip(axes.flat, held.items(), strict=False):
            interval = _held(axis, one, 3, "Greys")
            found = one[query // interval, key]
            axis.plot(key[found], query[found], "o", color="#0072b2", label="look-up found")
            axis.plot(key[~found], query[~found], "x", color="#d55e00", label="look-up lost")
            if prompt:
                axis.axhline(prompt, color="black", linewidth=0.8, linestyle=":")
            count, long = f"{found.sum()} of {len(found)} found", len(name) > 15
            axis.set_title(
                f"{name}:{chr(10) if long else ' '}{count}", size="small" if long else None
            )
            axis.label_outer()
        axes[0, columns - 1].legend(loc="upper right")  # no query attends to what is to come
    return drawing.figure_of(axes)


def attention_patterns(
    patterns: Mapping[str, np.ndarray], interval: int, path: Name = None
) -> "Figure":
    """Attention to single tokens over time, a panel per pattern."""
    title = "attention to single tokens, the clearest of a pattern dark"
    labels = "position of the queries (tokens)", "attention, mean over a chunk"
    with drawing.figure(path, (13, 4), (1, len(patterns)), title, *labels) as axes:
        for axis, (name, rows) in zip(axes[0], patterns.items(), strict=True):
            for i, row in enumerate(rows):
                style = {"color": "lightsteelblue"} if i else {"color": "navy", "zorder": 3}
                axis.plot(interval * np.arange(len(row)), row, marker=".", **style)
            axis.set_title(f"{name}{'' if len(rows) else ': no such token'}")
    return drawing.figure_of(axes)


def training(records: Sequence[Mapping], names: Sequence[str], path: Name = None) -> "Figure":
    """Training curves: a panel per metric against the step, thin, and its running mean, thick.

    Args:
      records: lines of `metrics.jsonl`; those without a metric are left out of its panel.
      names: of the metrics.
    """
    size = 3.6 * len(names), 3.2
    with drawing.figure(path, size, (1, len(names)), "", "step") as axes:
        for axis, name in zip(axes[0], names, strict=True):
            found = [(r["step"], r[name]) for r in records if r.get(name) is not None]
            step, value = np.array(found, float).reshape(-1, 2).T
            colour, window = LEARNED["foresight"], max(1, len(step) // 20)
            axis.plot(step, value, color=colour, linewidth=0.7, alpha=0.4)
            sums = np.cumsum(np.concatenate([[0.0], value]))
            start = np.maximum(np.arange(len(value)) - window + 1, 0)
            mean = (sums[1:] - sums[start]) / (np.arange(len(value)) + 1 - start)
            axis.plot(step, mean, color=colour, linewidth=2)
            axis.set_title(name)
    return drawing.figure_of(axes)


def sweep(summary: Sequence[Mapping], path: Name = None) -> "Figure":
    """Metrics of a sweep against budget, a panel per metric, a line per group and policy.

    Args:
      summary: from `fkv.evaluation.sweeps.summarise`; policies with the same values in every
        group (baselines) are shown once.
    """
    names = [f for f in dict.fromkeys(row["figure"] for row in summary) if f != "overlap"]
    title = "mean over the points of a group, ± one standard error"
    drawn = {}  # by metric and policy, the lines of its groups
    for row in sorted(summary, key=lambda row: row["budget"]):
        if row["budget"] and row["policy"] != "full":
            groups = drawn.setdefault((row["figure"], row["policy"]), {})
            point = row["budget"], row["mean"], np.nan_to_num(row["se"])
            groups.setdefault(row["group"], []).append(point)
    lines, hues = {name: {} for name in names}, {}
    for (figure, policy), groups in drawn.items():
        different = {tuple(mean for _, mean, _ in points): g for g, points in groups.items()}
        for group in different.values():
            label = policy if len(different) == 1 and len(groups) > 1 else f"{policy}, {group}"
            lines.get(figure, {})[label] = groups[group]
            hues[label] = f"{group}, {policy}" if policy in LEARNED else label
    styles = drawing.styles_of([*hues.values()])
    with drawing.figure(path, *drawing.pages(len(names), 6.2, 4.6), title, _BUDGET) as axes:
        for axis, name in zip(axes.flat, names, strict=False):
            for label, points in lines[name].items():
                drawing.curve(axis, points, label, **styles[hues[label]])
            axis.set_title(_SWEPT.get(name, name))
            axis.set_xticks(sorted({row["budget"] for row in summary} - {0}))
            drawing.name_lines(axis)
    return drawing.figure_of(axes)


def cache_memory(
    bytes_per_token: int, slots: int, tokens: int, path: Name = None, title: str = ""
) -> "Figure":
    """Bytes of a full cache and of a bounded one against tokens, log-log."""
    held, scale = np.geomspace(16, tokens, 257), bytes_per_token / 2**20
    bounded, labels = (
        np.full(257, scale * slots),
        ("tokens read and written", "keys and values (MiB)"),
    )
    with drawing.figure(path, (8, 4), (1, 1), title, *labels) as axes:
        axis = axes[0, 0]
        axis.plot(held, scale * held, color=COLOURS["full"], linewidth=1, label="full cache")
        style = {"color": LEARNED["foresight"], "linewidth": 2.2}
        axis.plot(held, bounded, label=f"bounded, B + L = {slots}", **style)
        axis.margins(x=0)
        drawing.log2(axis, True)
        drawing.name_lines(axis)
    return drawing.figure_of(axes)


def costs(found: Mapping[str, Sequence[Mapping]], directory: Path) -> list[str]:
    """Figures of a benchmark's sections; returns their file names.

    Args:
      found: records by section, from `fkv.jobs.benchmark.run`.
    """
    decoded, labels = (
        [r for r in found.get(name, ()) if r["fits"]] for name in ("decode", "labels")
    )
    drawn = {
        "decode.png": (_decode_cost, decoded if len({r["length"] for r in decoded}) > 1 else ()),
        "growth.png": (_growth_cost, found.get("growth")),
        "labels.png": (_label_cost, labels if len(labels) > 1 else ()),
    }
    drawn = {name: both for name, both in drawn.items() if both[1]}
    for name, (draw, records) in drawn.items():
        draw(records, directory / name)
    return list(drawn)


def _decode_cost(records: Sequence[Mapping], path: Name) -> None:
    """Time per token against context length, a panel per batch size; under eviction, where it was
    measured at one length, the same at all.
    """
    batches, lengths = (sorted({r[name] for r in records}) for name in ("batch", "length"))
    styles = drawing.styles_of(list(dict.fromkeys(map(_line, records))))
    panels, labels = drawing.pages(len(batches), 5.5, 4.2), ("tokens of context", "ms per step")
    with drawing.figure(path, *panels, "", *labels) as axes:
        for axis, batch in zip(axes.flat, batches, strict=False):
            points = {}
            for r in records:
                if r["batch"] == batch:
                    speeds = (r[f"tokens_per_s{end}"] for end in ("", "_high", "_low"))
                    ms, low, high = (1e3 * batch / speed for speed in speeds)
                    at = lengths if r["budget"] else [r["length"]]
                    found = [(length, ms, ms - low, high - ms) for length in at]
                    points.setdefault(_line(r), []).extend(found)
            for label, found in points.items():
                drawing.curve(axis, found, label, **styles[label])
            drawing.log2(axis, False)
            axis.set_title(f"batch {batch}")
            drawing.name_lines(axis)


def _line(record: Mapping) -> str:
    """The name of a benchmark's line."""
    name, budget = record["policy"], record["budget"]
    return f"{name}, B = {budget}" if budget else name


def _growth_cost(records: Sequence[Mapping], path: Path) -> None:
    """Time per token, evictions included, against tokens generated."""
    title = f"batch {records[0]['batch']}"
    labels, styles = ("tokens generated", "ms per token"), drawing.styles_of([*map(_line, records)])
    with drawing.figure(path, (7.5, 4.2), (1, 1), title, *labels) as axes:
        for record in records:
            ms, label = record["ms_per_token"], _line(record)
            axes[0, 0].plot([*map(int, ms)], [*ms.values()], label=label, **styles[label])
        drawing.log2(axes[0, 0], False)
        drawing.name_lines(axes[0, 0])


def _label_cost(records: Sequence[Mapping], path: Path) -> None:
    """Seconds and memory of golden labels against trace length, with slopes 1 and 2."""
    rows = sorted(records, key=lambda r: r["length"])
    length = np.array([r["length"] for r in rows], float)
    guides = {1: ("linear", ":"), 2: ("quadratic", "--")}
    panels = (
        ("seconds per trace", [r["seconds"] for r in rows], (1, 2)),
        ("MiB of the program", [r["program_bytes"] / 2**20 for r in rows], (1,)),
    )
    with drawing.figure(path, (10, 4.2), (1, 2), "golden labels", "tokens of the trace") as axes:
        for axis, (name, values, slopes) in zip(axes[0], panels, strict=True):
            axis.plot(length, values, marker="o", color=COLOURS["snapkv"], label="measured")
            for slope in slopes:
                guide, (label, line) = values[-1] * (length / length[-1]) ** slope, guides[slope]
                axis.plot(length, guide, color="gray", linestyle=line, linewidth=1, label=label)
            drawing.log2(axis, True)
            axis.set_ylabel(name)
