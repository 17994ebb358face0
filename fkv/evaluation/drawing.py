"""What figures are made of: colours, axes, names of lines, saving."""

import collections
import contextlib
import functools
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fkv import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Name = str | Path | None

# A policy has the same colour in every figure; the hues are of palettes that colour-blind readers
# can tell apart (Okabe and Ito; Tol), and names at the ends of lines do the rest.
COLOURS = {
    "full": "#777777", "golden": "#000000", "rkv": "#e69f00", "snapkv": "#0072b2",
    "h2o": "#009e73", "streaming_llm": "#999933", "keydiff": "#56b4e9", "tova": "#aa4499",
    "lagkv": "#b8a038", "knorm": "#44aa99", "expected_attention": "#332288",
    "pyramid": "#6699cc", "ada": "#88ccee", "prompt": "#4477aa", "random": "#aaaaaa",
    "threshold": "#117733", "uneven": "#44bb99", "kvzap": "#cc79a7", "trimkv": "#8c510a",
    "triattention": "#01665e", "vase": "#cc6677", "vase_dkv": "#997788",
}  # fmt: skip
# Scorers have names of the user's choice.
LEARNED = {"foresight": "#d55e00", "supervised": "#d55e00", "grpo": "#882255"}
OTHERS = ("#d55e00", "#882255", "#994f88", "#661100", "#5d3a9b")
_STYLE = {
    "axes.spines.right": False, "axes.spines.top": False, "axes.titlesize": "medium",
    "errorbar.capsize": 2, "figure.constrained_layout.use": True, "pdf.fonttype": 42,
    "figure.labelsize": "medium", "image.aspect": "auto", "image.interpolation": "nearest",
    "legend.fontsize": "small", "lines.markersize": 4, "savefig.dpi": 120,
}  # fmt: skip


@functools.cache
def _figure_type() -> type["Figure"]:
    # Not pyplot, so that a notebook keeps its backend; the import takes a second.
    from matplotlib.figure import Figure

    class Shown(Figure):
        """A figure that a notebook shows, whatever its backend."""

        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png", dpi=_STYLE["savefig.dpi"])
            return buffer.getvalue()

    return Shown


@contextlib.contextmanager
def figure(path: Name, size, grid=(1, 1), title="", x="", y="") -> Iterator[np.ndarray]:
    """Axes of a figure with these labels; on exit it gets a legend, and is saved if it has a path.

    Lines that `name_lines` has named are not in the legend, and axes with a legend do without it.
    """
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        made = _figure_type()(figsize=size)
        axes = made.subplots(*grid, squeeze=False)
        yield axes
        legend = {}
        for axis in axes.flat:
            axis.set_visible(axis.has_data() or bool(axis.get_title()))
            if axis.get_label() != _NAMED:
                for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                    legend.setdefault(label, handle)
        if legend and not any(axis.get_legend() for axis in axes.flat):
            made.legend(legend.values(), legend, loc="outside right")
        made.suptitle(title)
        made.supxlabel(x)
        made.supylabel(y)
        if path is not None:
            save(made, Path(path))


def save(figure: "Figure", path: Path) -> None:
    """Writes a figure atomically; a PNG has a PDF beside it."""
    kind = path.suffix[1:] or "png"
    both = {path: kind} | ({path.with_suffix(".pdf"): "pdf"} if path.suffix == ".png" else {})
    layout = figure.get_layout_engine()
    for name, one in both.items():
        with files.whole(name) as temporary:
            # Without the time, so that the same figure is the same file.
            dated = {"metadata": {"CreationDate": None}} if one == "pdf" else {}
            figure.savefig(temporary, format=one, **dated)
        figure.set_layout_engine("none")  # the second has that of the first, which takes longest
    figure.set_layout_engine(layout)


def pages(count: int, width: float = 4.8, height: float = 3.8) -> tuple[tuple, tuple[int, int]]:
    """The size and grid of a figure with so many panels of this size: two in a row fit a page."""
    columns = min(count, 2)
    rows = -(-count // columns)
    return (width * columns, height * rows), (rows, columns)


def figure_of(axes: np.ndarray) -> "Figure":
    """The figure that these axes are in."""
    return axes.flat[0].figure


_NAMED = "lines have names"  # of axes


def name_lines(axis) -> None:
    """Writes the name of each labelled line beside its right end, apart from one another."""
    handles, names = axis.get_legend_handles_labels()
    if not handles:
        return
    axis.set_label(_NAMED)
    axis.autoscale_view()  # else limits are those of before the last lines
    lines = [getattr(handle, "lines", [handle])[0] for handle in handles]  # of error bars, too
    to_axes = axis.transAxes.inverted()
    ends = [(line.get_transform() + to_axes).transform(line.get_xydata()[-1]) for line in lines]
    ends = np.nan_to_num(np.array(ends)).clip(0, 1)
    height = 72 * axis.get_position().height * axis.figure.get_figheight()  # points
    for line, name, end, y in zip(lines, names, ends, apart(ends[:, 1], 9 / height), strict=True):
        colour, bold = line.get_color(), line.get_linewidth() > 1.5
        axis.annotate(
            name, end, (1.06, y), xycoords="axes fraction", textcoords="axes fraction",
            color=colour, fontsize=7.5, va="center", weight="bold" if bold else "normal",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": colour, "linewidth": 0.5, "relpos": (0, 0.5),
                "shrinkA": 1,
            },
        )  # fmt: skip


def apart(wanted_n: np.ndarray, gap: float) -> np.ndarray:
    """Places near the wanted ones, in their order, at least `gap` apart; from 0 on if they fit."""
    from scipy.optimize import isotonic_regression

    order, ranks = np.argsort(wanted_n, kind="stable"), gap * np.arange(len(wanted_n))
    best = isotonic_regression(wanted_n[order] - ranks).x
    low, high = 0.0, max(1 - ranks[-1], 0.0)
    placed = np.empty(len(order))
    placed[order] = np.clip(best, low, high) + ranks
    return placed


def broken(name: str) -> str:
    """A policy's name in lines, where a narrow panel would not hold it."""
    return re.sub("(?<=[:,(])", "\n", name) if len(name) > 14 else name


def horizontal(axis, y: float) -> None:
    """A dotted line to compare with."""
    axis.axhline(y, color="gray", linewidth=1, linestyle=":")


def log2(axis, both: bool) -> None:
    """Logarithmic axes, or a logarithmic one and one from 0."""
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    if both:
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:,.4g}")
    else:
        axis.set_ylim(bottom=0)


def curve(axis, points: Iterable[tuple], label: str, **style) -> None:
    """A line through (x, y, error) or (x, y, error below, error above), in the order of x."""
    x, y, *error = map(list, zip(*sorted(points), strict=True))
    error = error if len(error) == 2 else error[0]
    axis.errorbar(x, y, yerr=error, label=label, **{"marker": "o"} | style)


def styles_of(names: Sequence[str]) -> dict[str, dict]:
    """Colour, marker and line style of each policy: golden dashed, scorers bold.

    What follows a comma, such as a budget, only changes the line style.
    """
    markers = dict(zip(COLOURS, itertools.cycle("osD^vPX"), strict=False))
    styles, lines = {}, collections.defaultdict(lambda: itertools.cycle(("-", "--", "-.", ":")))
    free = [c for c in OTHERS if c not in {LEARNED.get(name) for name in names}]
    for name in names:
        kind = re.split("[:(),]", name.removeprefix("prompt("))[0]
        colour = COLOURS.get(kind) or LEARNED.get(kind) or (free.pop(0) if free else OTHERS[0])
        line = "--" if kind == "golden" else next(lines[colour])
        width = 1.0 if kind in COLOURS else 2.2
        styles[name] = {
            "color": colour, "linestyle": line, "linewidth": width,
            "marker": markers.get(kind, "o"), "zorder": 2 if kind in COLOURS else 3,
        }  # fmt: skip
    return styles
