"""Console output; of several processes only process 0 prints."""

from typing import Any

from tqdm import tqdm

from fkv.runs import parallel


def say(message: str) -> None:
    """Prints a line."""
    if parallel.first():
        print(message, flush=True)


def progress(*args: Any, **kwargs: Any) -> tqdm:
    """A progress bar."""
    return tqdm(*args, **kwargs, mininterval=0.5, disable=not parallel.first())
