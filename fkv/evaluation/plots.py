"""Figures of results, each written atomically in the format of its file name."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from fkv import files
from fkv.evaluation.accuracy import Accuracy
from fkv.evaluation.loss_ratio import Losses

PANELS = (("all tokens", 0), ("low-entropy tokens, added nats", 1), ("high-entropy tokens", 2))

# A policy has the same colour in every figure.
COLOURS = {
    "full": "gray", "golden": "black", "rkv": "tab:orange", "snapkv": "tab:blue",
    "h2o": "tab:green", "streaming_llm": "tab:brown", "keydiff": "tab:cyan", "tova": "tab:olive",
    "lagkv": "gold", "knorm": "darkseagreen", "expected_attention": "slateblue",
    "pyramid": "navy", "ada": "skyblue", "random": "silver",
}  # fmt: skip
# Scorers may have any name.
LEARNED = {"foresight": "crimson", "supervised": "crimson", "grpo": "darkviolet"}
OTHERS = ("crimson", "darkviolet", "deeppink", "maroon", "indigo")
_BUDGET = "budget (KV pairs per head)"


@contextlib.contextmanager
def _figure(path: str | Path, size, rows: int = 1, columns: int = 1, **settings) -> Iterator[tuple]:
    """A figure and its axes [rows, columns], saved in the end."""
    # Without pyplot, a notebook keeps its backend; the import takes a second.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    yield figure, figure.subplots(rows, columns, squeeze=False, **settings)
    with files.whole(path) as temporary:
        figure.savefig(temporary, dpi=120, format=Path(path).suffix[1:] or "png")


def _legend(figure, axis) -> None:
    """The legend of one panel, beside all of them."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right", fontsize="small")


def _errorbar(axis, x, y, error, marker: str = "o", **style):
    return axis.errorbar(x, y, yerr=error, marker=marker, markersize=4, capsize=3, **style)


def _horizontal(axis, y: float) -> None:
    axis.axhline(y, color="gray", linewidth=1, linestyle=":")


def _log2(axis, both: bool) -> None:
    """Logarithmic axes, or a logarithmic one and one from 0."""
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2) if both else axis.set_ylim(bottom=0)


def _map(axis, values, top: float, colours: str, extent=None):
    return axis.imshow(
        values, vmin=0, vmax=top, cmap=colours, aspect="auto", interpolation="nearest",
        extent=extent,
    )  # fmt: skip


def _held(axis, held_ct, top: float, colours: str) -> int:
    """Maps what is held, position to the right and queries downwards; returns the interval."""
    chunks, t = held_ct.shape
    interval = -(-t // chunks)
    _map(axis, held_ct, top, colours, (0, t, chunks * interval, 0))
    return interval


def _of(results: Sequence, name: str) -> list:
    """Results of one policy, by budget."""
    return sorted((r for r in results if r.policy == name), key=lambda r: r.budget)


def _styles(names: Sequence[str]) -> dict[str, dict]:
    """A colour and line for each policy: golden dashed, scorers bold."""
    styles, variants = {}, {}
    free = [c for c in OTHERS if c not in {LEARNED.get(name) for name in names}]
    for name in names:
        kind = name.partition(":")[0]
        if kind == "golden":
            styles[name] = {"color": "black", "linestyle": "--", "linewidth": 1.6}
            continue
        colour = COLOURS.get(kind) or LEARNED.get(kind)
        if colour is None:
            colour = free.pop(0) if free else "crimson"
        variant = variants[colour] = variants.get(colour, -1) + 1  # the same with other settings
        styles[name] = {
            "color": colour,
            "linestyle": ("-", "--", "-.", ":")[variant % 4],
            "linewidth": 1.3 if kind in COLOURS else 2.6,
        }
    return styles


def loss_ratios(results: Sequence[Losses], path: str | Path, title: str) -> None:
    """Loss ratio against budget, a line per policy with two standard errors."""
    names = dict.fromkeys(r.policy for r in results if r.policy != "full")
    with _figure(path, (14, 4.2), 1, 3) as (figure, axes):
        for axis, (label, kind) in zip(axes[0], PANELS, strict=True):
            for name, style in _styles(names).items():
                rows = _of(results, name)
                points = [r.added(kind) if kind == 1 else r.ratio(kind) for r in rows]
                values, errors = zip(*points, strict=True)
                bars = [2 * error for error in errors]
                _errorbar(axis, [r.budget for r in rows], values, bars, label=name, **style)
            _horizontal(axis, 0 if kind == 1 else 1)
            axis.set(title=label, xlabel=_BUDGET, xticks=sorted({r.budget for r in results}))
            axis.set_ylabel("nats per token" if kind == 1 else "loss / full-cache loss")
        _legend(figure, axes[0, 0])
        figure.suptitle(title)


def accuracy(results: Sequence[Accuracy], path: str | Path) -> None:
    """pass@1 against budget with 95 % intervals, the full cache as a band."""
    evicted = [r for r in results if r.budget]
    with _figure(path, (8.5, 4.8)) as (figure, axes):
        axis = axes[0, 0]
        for r in results:
            if not r.budget:
                axis.axhspan(*(100 * x for x in r.interval()), color="gray", alpha=0.3)
                axis.axhline(100 * r.pass_at_1, color="gray", label=r.policy)
        for name, style in _styles(dict.fromkeys(r.policy for r in evicted)).items():
            rows = _of(evicted, name)
            middle = [100 * r.pass_at_1 for r in rows]
            errors = np.abs(100 * np.array([r.interval() for r in rows]).T - middle)
            budgets = [r.budget for r in rows]
            _errorbar(axis, budgets, middle, errors, label=name, elinewidth=1.3, **style)
        axis.set(xlabel=_BUDGET, xticks=sorted({r.budget for r in evicted}))
        axis.set(
            ylabel="pass@1, %", ylim=(-2, 102), title="pass@1 with 95 % intervals over problems"
        )
        _legend(figure, axis)


def loss_by_position(results: Sequence[Losses], path: str | Path, bins: int = 16) -> None:
    """Nats added by eviction against position, a panel per budget."""
    budgets = sorted({r.budget for r in results})
    with _figure(path, (4.5 * len(budgets) + 4, 4.2), 1, len(budgets)) as (figure, axes):
        for axis, budget in zip(axes[0], budgets, strict=True):
            rows = [r for r in results if r.budget == budget and r.policy != "full"]
            styles = _styles([r.policy for r in rows])
            for r in rows:
                counted = ~np.isnan(r.excess_nt)
                position = np.broadcast_to(np.arange(1, counted.shape[1] + 1), counted.shape)
                position, excess = position[counted], r.excess_nt[counted]
                edges = np.linspace(position.min(), position.max() + 1, bins + 1)
                bin_of = np.digitize(position, edges) - 1
                count = np.bincount(bin_of, minlength=bins)
                total = np.bincount(bin_of, weights=excess, minlength=bins)
                mean = np.where(count, total / np.maximum(count, 1), np.nan)
                axis.plot((edges[:-1] + edges[1:]) / 2, mean, label=r.policy, **styles[r.policy])
            _horizontal(axis, 0)
            axis.set(title=f"loss added by eviction, B = {budget}", xlabel="position (tokens)")
        axes[0, 0].set_ylabel("nats per token")
        _legend(figure, axes[0, 0])


def regret(results: Sequence[Losses], path: str | Path) -> None:
    """Regret against golden per layer and KV head, a panel per policy and budget."""
    shown = [r for r in results if r.regret_nyk is not None and r.policy != "golden"]
    if not shown:  # golden has no uneven budgets
        return
    names, budgets = list(dict.fromkeys(r.policy for r in shown)), sorted({r.budget for r in shown})
    size = (max(1.7 * len(names) + 1, 5.5), 1.9 * len(budgets) + 0.6)
    top = max(r.regret_nyk.mean(0).max() for r in shown)
    with _figure(path, size, len(budgets), len(names)) as (figure, axes):
        for r in shown:
            axis = axes[budgets.index(r.budget)][names.index(r.policy)]
            image = _map(axis, r.regret_nyk.mean(0), top, "magma_r")
            axis.set_title(f"{r.policy}, {r.budget}", fontsize="small")
            _, layers, heads = r.regret_nyk.shape
            axis.set(xticks=range(heads), yticks=range(layers))
        figure.supxlabel("KV head", fontsize="small")
        figure.supylabel("layer", fontsize="small")
        figure.colorbar(image, ax=axes, label="attention lost")
        figure.suptitle("attention lost per eviction, beyond what golden loses", fontsize="medium")


def retention(held: Mapping[str, np.ndarray], path: str | Path, title: str) -> None:
    """The entries held over time, a panel per policy and layer.

    Args:
      held: from `diagnosis.retention`.
    """
    layers = len(next(iter(held.values())))
    size = (4 * layers, 1.5 * len(held) + 0.8)
    with _figure(path, size, len(held), layers, sharex=True, sharey=True) as (figure, axes):
        for row, (name, one) in zip(axes, held.items(), strict=True):
            for layer, axis in enumerate(row):
                _held(axis, one[layer].mean(0), 1, "Greens")
                axis.set_title(f"{name}, layer {layer}", fontsize="small")
        figure.supxlabel("position of the token", fontsize="small")
        figure.supylabel("position of the queries", fontsize="small")
        figure.suptitle(title, fontsize="medium")


def lookups(
    held: Mapping[str, np.ndarray],
    lookup_n2: np.ndarray,
    path: str | Path,
    title: str,
    prompt: int = 0,
) -> None:
    """The entries that one head holds over time, and which of its look-ups find their token.

    Args:
      held: for each policy, bool [chunks, t], as `diagnosis.retention` has it for each head.
      lookup_n2: queries and keys of the head, from `diagnosis.lookups`.
      prompt: tokens of the prompt, whose end is marked by a dotted line.
    """
    columns = min(4, len(held))
    rows = -(-len(held) // columns)
    size = (3.6 * columns, 3.2 * rows + 0.6)
    query, key = lookup_n2.T
    with _figure(path, size, rows, columns, sharex=True, sharey=True) as (figure, axes):
        for axis, (name, one) in zip(axes.flat, held.items(), strict=False):
            interval = _held(axis, one, 3, "Greys")
            found = one[query // interval, key]
            axis.plot(key[found], query[found], "o", markersize=4, color="tab:blue", label="found")
            axis.plot(key[~found], query[~found], "x", markersize=6, color="red", label="gone")
            if prompt:
                axis.axhline(prompt, color="black", linewidth=0.8, linestyle=":")
            axis.set_title(f"{name}: {found.sum()} of {len(found)} found", fontsize="medium")
        for axis in axes.flat[len(held) :]:
            axis.set_visible(False)
        axes[0, 0].legend(loc="upper right", fontsize="small", title="look-ups")
        figure.supxlabel("position of the key (tokens); gray where it is held")
        figure.supylabel("position of the query (tokens)")
        figure.suptitle(title)


def attention_patterns(patterns: Mapping[str, np.ndarray], interval: int, path: str | Path) -> None:
    """Attention that single tokens receive over time, a panel per pattern."""
    with _figure(path, (13, 4), 1, len(patterns)) as (figure, axes):
        for axis, (name, rows) in zip(axes[0], patterns.items(), strict=True):
            for i, row in enumerate(rows):
                style = {"color": "lightsteelblue"} if i else {"color": "navy", "zorder": 3}
                axis.plot(interval * np.arange(len(row)), row, marker=".", **style)
            axis.set_title(f"{name}{'' if len(rows) else ': no such token'}")
            axis.set_xlabel("position of the queries (tokens)")
        axes[0, 0].set_ylabel("attention, mean over a chunk")
        figure.suptitle("attention that single tokens receive, the clearest of a pattern dark")


def sweep(summary: Sequence[Mapping], path: str | Path) -> None:
    """Figures of a sweep against budget, a panel per figure and a line per group and policy.

    Args:
      summary: from `fkv.evaluation.sweeps.summarise`; policies with the same values in every
        group (baselines) are shown once.
    """
    from matplotlib import colormaps

    palette = colormaps["tab20"]
    names = [f for f in dict.fromkeys(row["figure"] for row in summary) if f != "overlap"]
    with _figure(path, (5 * len(names) + 3, 5), 1, len(names)) as (figure, axes):
        handles = {}  # one colour a line, the same in every panel
        for axis, name in zip(axes[0], names, strict=True):
            lines, seen = {}, set()
            for row in summary:
                if row["figure"] == name and row["budget"] and row["policy"] != "full":
                    lines.setdefault((row["policy"], row["group"]), []).append(row)
            for (policy, group), rows in lines.items():
                rows = sorted(rows, key=lambda row: row["budget"])
                values = tuple(row["mean"] for row in rows)
                if (policy, values) in seen:
                    continue
                seen.add((policy, values))
                label = f"{policy}, {group}"
                index = list(handles).index(label) if label in handles else len(handles)
                error = np.nan_to_num([2 * row["se"] for row in rows])
                style = {"color": palette(index % 20), "marker": "os^vD"[index // 20 % 5]}
                budgets = [row["budget"] for row in rows]
                handles[label] = _errorbar(axis, budgets, values, error, **style)
            axis.set(title=name, xlabel=_BUDGET)
        figure.legend(handles.values(), handles, loc="outside right", fontsize="x-small")
        figure.suptitle("mean over the points of a group, ± 2 standard errors")


def cache_memory(
    bytes_per_token: int, slots: int, tokens: int, path: str | Path, title: str
) -> None:
    """Bytes of a full cache and of a bounded one against tokens, log-log."""
    held, scale = np.geomspace(16, tokens, 257), bytes_per_token / 2**20
    bounded = np.full(len(held), scale * slots)
    with _figure(path, (7, 4)) as (_, axes):
        axis = axes[0, 0]
        axis.plot(held, scale * held, color=COLOURS["full"], linewidth=2, label="full cache")
        style = {"color": LEARNED["foresight"], "linewidth": 2}
        axis.plot(held, bounded, label=f"bounded, B + L = {slots}", **style)
        axis.margins(x=0)
        _log2(axis, True)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.yaxis.set_major_formatter("{x:,.4g}")
        axis.set(title=title, xlabel="tokens read and written", ylabel="keys and values (MiB)")
        axis.legend(loc="upper left")


def costs(found: Mapping[str, Sequence[Mapping]], directory: Path) -> list[str]:
    """Figures of a benchmark, of the sections that it has; returns their file names.

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


def _decode_cost(records: Sequence[Mapping], path: Path) -> None:
    """Time per token against the length of the context, a panel per batch."""
    batches = sorted({r["batch"] for r in records})
    several = len({r["kernel"] for r in records}) > 1
    with _figure(path, (4.5 * len(batches) + 2, 4.2), 1, len(batches)) as (figure, axes):
        lines = {}
        for r in records:
            lines.setdefault((r["policy"], r["budget"], r["kernel"]), []).append(r)
        for axis, batch in zip(axes[0], batches, strict=True):
            for i, ((name, budget, kernel), rows) in enumerate(lines.items()):
                rows = sorted((r for r in rows if r["batch"] == batch), key=lambda r: r["length"])
                label = (f"{name}, B = {budget}" if budget else name) + f", {kernel}" * several
                style = {"linestyle": "-" if budget else "--", "color": f"C{i % 10}"}
                if not budget and not several:
                    style["color"] = "black"
                middle, low, high = (
                    np.array([1e3 * batch / r[f"tokens_per_s{end}"] for r in rows])
                    for end in ("", "_high", "_low")
                )
                error = [middle - low, high - middle]
                _errorbar(axis, [r["length"] for r in rows], middle, error, label=label, **style)
            _log2(axis, False)
            axis.set(title=f"batch {batch}", xlabel="tokens of context")
        axes[0, 0].set_ylabel("ms per step")
        _legend(figure, axes[0, 0])


def _growth_cost(records: Sequence[Mapping], path: Path) -> None:
    """Time per token, evictions included, against the tokens generated."""
    with _figure(path, (6.5, 4.2)) as (_, axes):
        axis = axes[0, 0]
        for i, record in enumerate(records):
            ms = record["ms_per_token"]
            label = f"{record['policy']}, B = {record['budget']}"
            style = {"color": f"C{i % 10}", "marker": "o", "markersize": 4}
            axis.plot([int(n) for n in ms], list(ms.values()), label=label, **style)
        _log2(axis, False)
        title = f"batch {records[0]['batch']}"
        axis.set(title=title, xlabel="tokens generated", ylabel="ms per token")
        axis.legend(fontsize="small")


def _label_cost(records: Sequence[Mapping], path: Path) -> None:
    """Seconds and memory of golden labels against the length of the trace, with slopes 1 and 2."""
    rows = sorted(records, key=lambda r: r["length"])
    length = np.array([r["length"] for r in rows], float)
    guides = {1: ("linear", ":"), 2: ("quadratic", "--")}
    panels = (
        ("seconds per trace", [r["seconds"] for r in rows], (1, 2)),
        ("MiB of the program", [r["program_bytes"] / 2**20 for r in rows], (1,)),
    )
    with _figure(path, (9, 4.2), 1, 2) as (_, axes):
        for axis, (name, values, slopes) in zip(axes[0], panels, strict=True):
            axis.plot(length, values, marker="o", color="C0", label="measured")
            for slope in slopes:
                guide, (label, line) = values[-1] * (length / length[-1]) ** slope, guides[slope]
                axis.plot(length, guide, color="gray", linestyle=line, linewidth=1, label=label)
            _log2(axis, True)
            axis.set(xlabel="tokens of the trace", ylabel=name)
            axis.legend(fontsize="small")
