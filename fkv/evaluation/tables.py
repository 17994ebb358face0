"""Tables as aligned text, Markdown and comma-separated values."""

import csv
import io
from collections.abc import Sequence


def text(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left."""
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]

    def line(cells):
        first, *rest = (cell.rjust(w) for cell, w in zip(cells, widths, strict=True))
        return "  ".join([cells[0].ljust(len(first)), *rest])

    return "\n".join([line(head), "-" * (sum(widths) + 2 * len(widths) - 2), *map(line, rows)])


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""

    def line(cells):
        return f"| {' | '.join(cells)} |"

    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def comma_separated(head: Sequence[str], rows: Sequence[Sequence]) -> str:
    """CSV with a header."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([head, *rows])
    return out.getvalue()
