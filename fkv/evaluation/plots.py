"""Pictures of results."""

from collections.abc import Sequence
from pathlib import Path

from fkv.evaluation.loss_ratio import Losses

PANELS = (("all tokens", 0), ("low-entropy tokens, added nats", 1), ("high-entropy tokens", 2))


def loss_ratios(results: Sequence[Losses], path: str | Path, title: str) -> None:
    """Loss ratio against budget, a line per policy with two standard errors; writes a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [n for n in dict.fromkeys(r.policy for r in results) if n != "full"]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for axis, (label, kind) in zip(axes, PANELS, strict=True):
        for i, name in enumerate(names):
            rows = sorted((r for r in results if r.policy == name), key=lambda r: r.budget)
            points = [r.added(kind) if kind == 1 else r.ratio(kind) for r in rows]
            axis.errorbar(
                [r.budget for r in rows],
                [value for value, _ in points],
                yerr=[2 * error for _, error in points],
                label=name,
                color=f"C{i}",
                marker="o",
                capsize=3,
                linewidth=2.5 if name == "foresight" else 1.5,
                linestyle="--" if name == "golden" else "-",
            )
        axis.set_title(label)
        axis.set_xlabel("budget (KV pairs per head)")
        axis.set_xticks(sorted({r.budget for r in results}))
        axis.axhline(0 if kind == 1 else 1, color="gray", linewidth=1, linestyle=":")
        axis.set_ylabel("nats per token" if kind == 1 else "loss / full-cache loss")
    axes[0].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
