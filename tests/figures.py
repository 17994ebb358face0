"""Figures of tiny seeded runs that stand in the tests: what no other test notices moves them."""

import pprint

import numpy as np

ADVICE = """\
The figures of a seeded run have moved. If no change was meant to move them, look for a fault: a
swapped sign, a dropped clip, a key used twice, another order. If one was, put these into the test,
and say in the commit which change moved them:
"""


def check(found, want, rtol: float = 1e-3, atol: float = 1e-5) -> None:
    """Compares figures with those of the test: numbers by tolerance, all else exactly.

    Args:
      found, want: by name, a number, a list of them, or anything that can be compared. Tolerances
        are for what differs between versions of JAX and processors: rounding, never a draw.
    """
    found = {name: _plain(value) for name, value in found.items()}
    wrong = sorted(
        name
        for name in found.keys() | want.keys()
        if name not in found or name not in want or not _close(found[name], want[name], rtol, atol)
    )
    assert not wrong, f"{', '.join(wrong)}: {ADVICE}{pprint.pformat(found, width=96, compact=True)}"


def column(rows, name: str) -> list:
    """One metric of all rows that have it."""
    return [row[name] for row in rows if name in row]


def _plain(value):
    """Floats to seven digits, as they are written down."""
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.7g}")
    return value


def _close(found, want, rtol, atol) -> bool:
    if isinstance(want, list):
        return len(found) == len(want) and all(
            _close(a, b, rtol, atol) for a, b in zip(found, want, strict=True)
        )
    if isinstance(want, float):
        return bool(np.isclose(found, want, rtol=rtol, atol=atol))
    return found == want
