"""Console output; of several processes only process 0 prints."""

import warnings
from typing import Any

with warnings.catch_warnings():  # in a notebook without widgets, bars are text
    warnings.simplefilter("ignore")
    from tqdm.auto import tqdm

from fkv.runs import parallel


def say(message: str) -> None:
    """Prints a line."""
    if parallel.first():
        print(message, flush=True)


def progress(*args: Any, **kwargs: Any) -> tqdm:
    """A progress bar with the time that is left; in a notebook, a widget."""
    return tqdm(*args, **kwargs, mininterval=0.5, disable=not parallel.first())
