"""Tables as aligned text, Markdown and CSV."""

import csv
import io
from collections.abc import Sequence


def text(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first left-aligned."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells):
        first, *rest = (cell.rjust(w) for cell, w in zip(cells, widths, strict=True))
        return "  ".join([cells[0].ljust(len(first)), *rest])

    return "\n".join([line(head), "-" * (sum(widths) + 2 * len(widths) - 2), *map(line, rows)])


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def comma_separated(head: Sequence[str], rows: Sequence[Sequence]) -> str:
    """CSV with a header."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([head, *rows])
    return out.getvalue()
