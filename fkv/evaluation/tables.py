"""Tables as aligned text, Markdown and CSV."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from fkv.files import write_text


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


def write(path: Path, head: Sequence[str], rows: Sequence[Sequence[str]], csv: str, note="") -> str:
    """Writes `path`.txt, .md and .csv; returns the text.

    Args:
      csv: content of the last, see `comma_separated`.
      note: put below the table in the other two.
    """
    shown, below = text(head, rows), f"\n\n{note}\n" if note else "\n"
    found = {"txt": shown + below, "md": markdown(head, rows) + below, "csv": csv}
    for suffix, content in found.items():
        write_text(Path(f"{path}.{suffix}"), content)
    return shown
