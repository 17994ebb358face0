"""Makes what GitHub shows: the pictures of the front page, and what the notebooks print and draw.

python colab/make.py pictures runs/sft_tiny    # the run of `python -m launch.sft --config=tiny`
python colab/make.py notebooks [name ...]
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path

import nbclient
import nbformat
import numpy as np

import fkv
from fkv import policies
from fkv.cache.cadence import Cadence
from fkv.engine.batch import Batch
from fkv.evaluation import diagnosis, drawing, plots
from fkv.jobs import common
from fkv.tasks import ledger

HERE = Path(__file__).resolve().parent
LEARNED, GOLDEN, OTHER = drawing.LEARNED["foresight"], "black", drawing.COLOURS["snapkv"]


def lookups(run: Path) -> None:
    """What one head looks up on a held-out problem, and whether it is still there."""
    config, cadence = fkv.recipe("tiny"), Cadence(budget=64, interval=16)
    lm = fkv.load("embedded", dtype="float32").lm
    problem = ledger.problem(seed=0, split="demo", index=0, spec=common.spec(config))
    token = np.asarray(problem.tokens)
    trace = Batch.of(token[None], np.array([len(token)]))
    named = {"foresight": fkv.load_scorer(run)}
    named |= {name: policies.get(name) for name in ("rkv", "snapkv")}
    held = diagnosis.retention(lm, named, trace, cadence)
    layer, head = 2, 0  # finds the next fact
    found = diagnosis.lookups(diagnosis.block_scores(lm, trace, interval=1)[layer, head], 16)
    one = {name: maps[layer, head] for name, maps in held.items()}
    figure = plots.lookups(one, found, prompt=len(problem.prompt))
    figure.savefig(HERE / "pictures" / "lookups.png", dpi=120)


def cadence() -> None:
    """Budget, interval and golden eviction, drawn."""
    budget, interval, tokens = 8, 4, 34
    with drawing.figure(None, (9.2, 3.4), (1, 2)) as axes:
        axis = axes[0, 0]
        n, held = np.arange(tokens + 1), 0
        xs, ys = [0], [0]
        for t in range(1, tokens + 1):
            if held == budget + interval:
                xs, ys, held = [*xs, t - 1], [*ys, budget], budget
            held += 1
            xs, ys = [*xs, t], [*ys, held]
        axis.plot(n, n, color=drawing.COLOURS["full"], linewidth=1)
        axis.plot(xs, ys, color=LEARNED, linewidth=2.2)
        axis.text(19, 20.5, "full cache", color=drawing.COLOURS["full"], ha="right")
        axis.text(33, 13, "bounded", color=LEARNED, ha="right", weight="bold")
        axis.annotate("", (16, 6.2), (20, 6.2), arrowprops={"arrowstyle": "<->"})
        axis.text(18, 4.3, "interval L", ha="center")
        axis.text(33, 0.8, "at an eviction L of the B + L entries are dropped", ha="right", size=8)
        axis.set(
            xlim=(0, tokens), ylim=(0, 24), xticks=[], yticks=[budget, budget + interval],
            yticklabels=["budget B", "B + L"], xlabel="tokens read and written",
            title="entries that a head holds",
        )  # fmt: skip
        axis = axes[0, 1]
        future = np.array([0.9, 0.1, 0.05, 0.7, 0.15, 0.4, 0.02, 0.35])
        past = np.array([0.3, 0.2, 0.1, 0.05, 0.6, 0.5, 0.45, 0.2])
        x = np.arange(budget)
        axis.bar(x - 0.2, past, 0.38, color=OTHER, label="attention so far (rule-based policies)")
        axis.bar(x + 0.2, future, 0.38, color=GOLDEN, label="attention to come (golden)")
        axis.bar(budget + np.arange(interval), 1.0, 0.8, color="#dddddd", zorder=0)
        axis.text(budget + 1.5, 0.5, "the newest L\nare protected", ha="center", va="center")
        for i in np.argsort(future)[:interval]:
            axis.text(i + 0.2, future[i] + 0.02, "×", ha="center", color=GOLDEN, size="large")
        for i in np.argsort(past)[:interval]:
            axis.text(i - 0.2, past[i] + 0.02, "×", ha="center", color=OTHER, size="large")
        axis.set(
            xticks=[], yticks=[], ylim=(0, 1.25), xlabel="entries of the cache, oldest first",
            title="an eviction: × is dropped",
        )  # fmt: skip
        axis.legend(loc="upper left", fontsize="x-small", frameon=False, ncols=2)
    drawing.figure_of(axes).savefig(HERE / "pictures" / "cadence.png", dpi=120)


def pictures(run: Path) -> None:
    """All pictures; that of the table is the run's own."""
    (HERE / "pictures").mkdir(exist_ok=True)
    cadence()
    lookups(run)
    shutil.copy(run / "loss_ratio.png", HERE / "pictures")


def notebooks(*names: str) -> None:
    """Runs notebooks from top to bottom and saves them with what they show, less progress bars."""
    for path in [HERE / f"{name}.ipynb" for name in names] or sorted(HERE.glob("*.ipynb")):
        book, start = nbformat.read(path, as_version=4), time.perf_counter()
        with tempfile.TemporaryDirectory() as where:
            resources = {"metadata": {"path": where}}
            nbclient.NotebookClient(book, timeout=None, resources=resources).execute()
        for cell in book.cells:
            cell.metadata = {}
            if cell.cell_type == "code":
                cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        book.metadata = {name: book.metadata[name] for name in ("kernelspec", "language_info")}
        book.metadata["language_info"] = {"name": "python"}
        nbformat.write(book, path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    {"pictures": lambda x: pictures(Path(x)), "notebooks": notebooks}[sys.argv[1]](*sys.argv[2:])
