"""Pictures of results."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fkv import files
from fkv.evaluation.accuracy import Accuracy
from fkv.evaluation.loss_ratio import Losses

PANELS = (("all tokens", 0), ("low-entropy tokens, added nats", 1), ("high-entropy tokens", 2))

# A policy has the same colour in every picture.
COLOURS = {
    "full": "gray",
    "golden": "black",
    "rkv": "tab:orange",
    "snapkv": "tab:blue",
    "h2o": "tab:green",
    "streaming_llm": "tab:brown",
    "keydiff": "tab:cyan",
    "tova": "tab:olive",
    "lagkv": "gold",
    "knorm": "darkseagreen",
    "expected_attention": "slateblue",
    "pyramid": "navy",
    "ada": "skyblue",
    "random": "silver",
}
# What is learned goes by any name.
LEARNED = {"foresight": "crimson", "supervised": "crimson", "grpo": "darkviolet"}
OTHERS = ("crimson", "darkviolet", "deeppink", "maroon", "indigo")


def _subplots(rows: int, columns: int, size: tuple[float, float], **settings):
    """A figure and its axes [rows, columns], without pyplot: a notebook keeps its own backend."""
    from matplotlib.figure import Figure  # takes a second, and only jobs that draw need it

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **settings)


def _save(figure, path: str | Path) -> None:
    """Writes the picture whole or not at all, in the format that its name ends in."""
    with files.whole(path) as temporary:
        figure.savefig(temporary, dpi=120, format=Path(path).suffix[1:] or "png")


def _styles(names: Sequence[str]) -> dict[str, dict]:
    """A colour and line for each policy: golden apart, what is learned strong."""
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
        variant = variants[colour] = variants.get(colour, -1) + 1  # of a rule with other settings
        styles[name] = {
            "color": colour,
            "linestyle": ("-", "--", "-.", ":")[variant % 4],
            "linewidth": 1.3 if kind in COLOURS else 2.6,
        }
    return styles


def loss_ratios(results: Sequence[Losses], path: str | Path, title: str) -> None:
    """Loss ratio against budget, a line per policy with two standard errors; writes a PNG."""
    names = [n for n in dict.fromkeys(r.policy for r in results) if n != "full"]
    styles = _styles(names)
    figure, axes = _subplots(1, 3, (14, 4.2))
    axes = axes[0]
    for axis, (label, kind) in zip(axes, PANELS, strict=True):
        for name in names:
            rows = sorted((r for r in results if r.policy == name), key=lambda r: r.budget)
            points = [r.added(kind) if kind == 1 else r.ratio(kind) for r in rows]
            axis.errorbar(
                [r.budget for r in rows],
                [value for value, _ in points],
                yerr=[2 * error for _, error in points],
                label=name,
                marker="o",
                markersize=4,
                capsize=3,
                **styles[name],
            )
        axis.set_title(label)
        axis.set_xlabel("budget (KV pairs per head)")
        axis.set_xticks(sorted({r.budget for r in results}))
        axis.axhline(0 if kind == 1 else 1, color="gray", linewidth=1, linestyle=":")
        axis.set_ylabel("nats per token" if kind == 1 else "loss / full-cache loss")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right", fontsize="small")
    figure.suptitle(title)
    _save(figure, path)


def accuracy(results: Sequence[Accuracy], path: str | Path) -> None:
    """pass@1 against budget with 95 % intervals, the full cache as a band; writes a PNG."""
    figure, axes = _subplots(1, 1, (8.5, 4.8))
    axis = axes[0, 0]
    for r in results:
        if not r.budget:
            low, high = r.interval()
            axis.axhspan(100 * low, 100 * high, color="gray", alpha=0.3)
            axis.axhline(100 * r.pass_at_1, color="gray", label=r.policy)
    names = list(dict.fromkeys(r.policy for r in results if r.budget))
    for name, style in _styles(names).items():
        rows = sorted((r for r in results if r.policy == name), key=lambda r: r.budget)
        middle = [100 * r.pass_at_1 for r in rows]
        bounds = 100 * np.array([r.interval() for r in rows]).T
        errors = np.abs(bounds - np.array([middle]))
        axis.errorbar(
            [r.budget for r in rows],
            middle,
            yerr=errors,
            label=name,
            marker="o",
            markersize=4,
            capsize=3,
            elinewidth=1.3,
            **style,
        )
    axis.set_title("answers right, with 95 % intervals over problems")
    axis.set_xlabel("budget (KV pairs per head)")
    axis.set_ylabel("pass@1, %")
    axis.set_ylim(-2, 102)
    axis.set_xticks(sorted({r.budget for r in results if r.budget}))
    figure.legend(loc="outside right", fontsize="small")
    _save(figure, path)


def loss_by_position(results: Sequence[Losses], path: str | Path, bins: int = 16) -> None:
    """Nats added by eviction against position, a panel per budget; writes a PNG."""
    budgets = sorted({r.budget for r in results})
    figure, axes = _subplots(1, len(budgets), (4.5 * len(budgets) + 4, 4.2))
    for axis, budget in zip(axes[0], budgets, strict=True):
        rows = [r for r in results if r.budget == budget and r.policy != "full"]
        styles = _styles([r.policy for r in rows])
        for r in rows:
            counted = ~np.isnan(r.excess_nt)
            position = np.broadcast_to(np.arange(1, r.excess_nt.shape[1] + 1), counted.shape)
            edges = np.linspace(position[counted].min(), position[counted].max() + 1, bins + 1)
            bin_of = np.digitize(position[counted], edges) - 1
            count = np.bincount(bin_of, minlength=bins)
            total = np.bincount(bin_of, weights=r.excess_nt[counted], minlength=bins)
            mean = np.where(count, total / np.maximum(count, 1), np.nan)
            axis.plot((edges[:-1] + edges[1:]) / 2, mean, label=r.policy, **styles[r.policy])
        axis.axhline(0, color="gray", linewidth=1, linestyle=":")
        axis.set_title(f"loss added by eviction, B = {budget}")
        axis.set_xlabel("position (tokens)")
    axes[0][0].set_ylabel("nats per token")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right", fontsize="small")
    _save(figure, path)


def regret(results: Sequence[Losses], path: str | Path) -> None:
    """Regret against golden per layer and KV head, a panel per policy and budget; writes a PNG."""
    shown = [r for r in results if r.regret_nyk is not None and r.policy != "golden"]
    if not shown:  # budgets shared unevenly can't be compared with golden
        return
    names, budgets = list(dict.fromkeys(r.policy for r in shown)), sorted({r.budget for r in shown})
    size = (max(1.7 * len(names) + 1, 5.5), 1.9 * len(budgets) + 0.6)
    figure, axes = _subplots(len(budgets), len(names), size)
    top = max(r.regret_nyk.mean(0).max() for r in shown)
    for r in shown:
        axis = axes[budgets.index(r.budget)][names.index(r.policy)]
        image = axis.imshow(r.regret_nyk.mean(0), vmin=0, vmax=top, cmap="magma_r", aspect="auto")
        axis.set_title(f"{r.policy}, {r.budget}", fontsize="small")
        axis.set_xticks(range(r.regret_nyk.shape[2]))
        axis.set_yticks(range(r.regret_nyk.shape[1]))
    figure.supxlabel("KV head", fontsize="small")
    figure.supylabel("layer", fontsize="small")
    figure.colorbar(image, ax=axes, label="attention lost")
    figure.suptitle("attention lost per eviction, beyond what golden loses", fontsize="medium")
    _save(figure, path)


def retention(held: Mapping[str, np.ndarray], path: str | Path, title: str) -> None:
    """What is held over time: position to the right, time downwards; a panel per policy and layer.

    Args:
      held: from `diagnosis.retention`.
    """
    layers, _, chunks, t = next(iter(held.values())).shape
    interval = -(-t // chunks)
    size = (4 * layers, 1.5 * len(held) + 0.8)
    figure, axes = _subplots(len(held), layers, size, sharex=True, sharey=True)
    for row, (name, one) in zip(axes, held.items(), strict=True):
        for layer, axis in enumerate(row):
            axis.imshow(
                one[layer].mean(0), vmin=0, vmax=1, cmap="Greens", aspect="auto",
                interpolation="nearest", extent=(0, t, chunks * interval, 0),
            )  # fmt: skip
            axis.set_title(f"{name}, layer {layer}", fontsize="small")
    figure.supxlabel("position of the token", fontsize="small")
    figure.supylabel("position of the queries", fontsize="small")
    figure.suptitle(title, fontsize="medium")
    _save(figure, path)


def lookups(
    held: Mapping[str, np.ndarray],
    lookup_n2: np.ndarray,
    path: str | Path,
    title: str,
    prompt: int = 0,
) -> None:
    """What one head holds over time, and which of its look-ups find their token; writes a PNG.

    Args:
      held: for each policy, bool [chunks, t], as `diagnosis.retention` has it for each head.
      lookup_n2: queries and keys of the head, from `diagnosis.lookups`.
      prompt: tokens of the prompt, whose end is marked by a dotted line.
    """
    columns = min(4, len(held))
    rows = -(-len(held) // columns)
    size = (3.6 * columns, 3.2 * rows + 0.6)
    figure, axes = _subplots(rows, columns, size, sharex=True, sharey=True)
    query, key = lookup_n2.T
    for axis, (name, one) in zip(axes.flat, held.items(), strict=False):
        chunks, t = one.shape
        interval = -(-t // chunks)
        axis.imshow(
            one, vmin=0, vmax=3, cmap="Greys", aspect="auto", interpolation="nearest",
            extent=(0, t, chunks * interval, 0),
        )  # fmt: skip
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
    _save(figure, path)


def attention_patterns(patterns: Mapping[str, np.ndarray], interval: int, path: str | Path) -> None:
    """Attention that single tokens receive over time, a panel per pattern; writes a PNG."""
    figure, axes = _subplots(1, len(patterns), (13, 4))
    for axis, (name, rows) in zip(axes[0], patterns.items(), strict=True):
        for i, row in enumerate(rows):
            style = {"color": "lightsteelblue"} if i else {"color": "navy", "zorder": 3}
            axis.plot(interval * np.arange(len(row)), row, marker=".", **style)
        axis.set_title(f"{name}{'' if len(rows) else ': no such token'}")
        axis.set_xlabel("position of the queries (tokens)")
    axes[0, 0].set_ylabel("attention, mean of a block")
    figure.suptitle("attention that single tokens get over time, the clearest of a kind dark")
    _save(figure, path)


def sweep(summary: Sequence[Mapping], path: str | Path) -> None:
    """Figures of a sweep against budget, a panel per figure and a line per group and policy.

    Args:
      summary: from `fkv.evaluation.sweeps.summarise`; policies that say the same in every
        group (rules, the full cache) are shown once.
    """
    from matplotlib import colormaps

    figures = [f for f in dict.fromkeys(row["figure"] for row in summary) if f != "overlap"]
    figure, axes = _subplots(1, len(figures), (5 * len(figures) + 3, 5))
    handles = {}  # one colour a line, the same in every panel
    for axis, name in zip(axes[0], figures, strict=True):
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
            handles[label] = axis.errorbar(
                [row["budget"] for row in rows],
                values,
                yerr=np.nan_to_num([2 * row["se"] for row in rows]),
                color=colormaps["tab20"](index % 20),
                marker="os^vD"[index // 20 % 5],
                markersize=4,
                capsize=3,
            )
        axis.set_title(name)
        axis.set_xlabel("budget (KV pairs per head)")
    figure.legend(handles.values(), handles.keys(), loc="outside right", fontsize="x-small")
    figure.suptitle("mean over the points of a group, ± 2 standard errors")
    _save(figure, path)


def cache_memory(
    bytes_per_token: int, slots: int, tokens: int, path: str | Path, title: str
) -> None:
    """Bytes of a full cache and of one with so many slots, log-log against tokens; writes a PNG."""
    figure, axes = _subplots(1, 1, (7, 4))
    axis = axes[0, 0]
    held = np.geomspace(16, tokens, 257)
    scale = bytes_per_token / 2**20
    axis.plot(held, scale * held, color=COLOURS["full"], linewidth=2, label="full cache")
    axis.plot(
        held, np.full(len(held), scale * slots), color=LEARNED["foresight"], linewidth=2,
        label=f"bounded, B + L = {slots}",
    )  # fmt: skip
    axis.set_title(title)
    axis.set_xlabel("tokens read and written")
    axis.set_ylabel("keys and values (MiB)")
    axis.margins(x=0)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.yaxis.set_major_formatter("{x:,.4g}")
    axis.legend(loc="upper left")
    _save(figure, path)


def costs(found: Mapping[str, Sequence[Mapping]], directory: Path) -> list[str]:
    """Pictures of a benchmark, of the sections that it has; gives their file names.

    Args:
      found: records by section, from `fkv.jobs.benchmark.run`.
    """
    drawn = []
    decoded = [r for r in found.get("decode", ()) if r["fits"]]
    if len({r["length"] for r in decoded}) > 1:
        _decode_cost(decoded, directory / "decode.png")
        drawn.append("decode.png")
    if found.get("growth"):
        _growth_cost(found["growth"], directory / "growth.png")
        drawn.append("growth.png")
    labels = [r for r in found.get("labels", ()) if r["fits"]]
    if len(labels) > 1:
        _label_cost(labels, directory / "labels.png")
        drawn.append("labels.png")
    return drawn


def _decode_cost(records: Sequence[Mapping], path: Path) -> None:
    """Time per token against the length of the context, a panel per batch."""
    batches = sorted({r["batch"] for r in records})
    figure, axes = _subplots(1, len(batches), (4.5 * len(batches) + 2, 4.2))
    several = len({r["kernel"] for r in records}) > 1
    lines = list(dict.fromkeys((r["policy"], r["budget"], r["kernel"]) for r in records))
    for axis, batch in zip(axes[0], batches, strict=True):
        for i, line in enumerate(lines):
            name, budget, kernel = line
            rows = [r for r in records if (r["policy"], r["budget"], r["kernel"]) == line]
            rows = sorted((r for r in rows if r["batch"] == batch), key=lambda r: r["length"])
            middle = np.array([1e3 * batch / r["tokens_per_s"] for r in rows])
            low = np.array([1e3 * batch / r["tokens_per_s_high"] for r in rows])
            high = np.array([1e3 * batch / r["tokens_per_s_low"] for r in rows])
            axis.errorbar(
                [r["length"] for r in rows],
                middle,
                yerr=[middle - low, high - middle],
                label=(f"{name}, B = {budget}" if budget else name)
                + (f", {kernel}" if several else ""),
                color="black" if not budget and not several else f"C{i % 10}",
                linestyle="-" if budget else "--",
                marker="o",
                markersize=4,
                capsize=3,
            )
        axis.set_title(f"batch {batch}")
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("tokens of context")
    axes[0][0].set_ylabel("ms per step")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right", fontsize="small")
    _save(figure, path)


def _growth_cost(records: Sequence[Mapping], path: Path) -> None:
    """Time per token, evictions included, against what has been generated."""
    figure, axes = _subplots(1, 1, (6.5, 4.2))
    axis = axes[0][0]
    for i, record in enumerate(records):
        generated = [int(n) for n in record["ms_per_token"]]
        label = f"{record['policy']}, B = {record['budget']}"
        axis.plot(
            generated, list(record["ms_per_token"].values()), label=label, color=f"C{i % 10}",
            marker="o", markersize=4,
        )  # fmt: skip
    axis.set_title(f"batch {records[0]['batch']}")
    axis.set_xscale("log", base=2)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("tokens generated")
    axis.set_ylabel("ms per token")
    axis.legend(fontsize="small")
    _save(figure, path)


def _label_cost(records: Sequence[Mapping], path: Path) -> None:
    """Seconds and memory of golden labels against the length of the trace, with slopes 1 and 2."""
    rows = sorted(records, key=lambda r: r["length"])
    length = np.array([r["length"] for r in rows], float)
    figure, axes = _subplots(1, 2, (9, 4.2))
    panels = (
        ("seconds per trace", [r["seconds"] for r in rows], (1, 2)),
        ("MiB of the program", [r["program_bytes"] / 2**20 for r in rows], (1,)),
    )
    for axis, (name, values, slopes) in zip(axes[0], panels, strict=True):
        axis.plot(length, values, marker="o", color="C0", label="measured")
        for slope in slopes:
            guide = values[-1] * (length / length[-1]) ** slope
            label = "linear" if slope == 1 else "quadratic"
            axis.plot(length, guide, color="gray", linestyle=":" if slope == 1 else "--",
                      linewidth=1, label=label)  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xlabel("tokens of the trace")
        axis.set_ylabel(name)
        axis.legend(fontsize="small")
    _save(figure, path)
