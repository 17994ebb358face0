"""How jobs are started from here."""

import importlib.util
from pathlib import Path


def module(job: str) -> str:
    """The module of a job for `python -m`: `launch.sft` in a clone, elsewhere `fkv.launch.sft`."""
    ours = str(Path(__file__).parents[1] / "launch")
    found = importlib.util.find_spec("launch")
    in_clone = found and ours in map(str, found.submodule_search_locations or ())
    return f"launch.{job}" if in_clone else f"fkv.launch.{job}"


def command(job: str) -> str:
    """What a user types: `python -m launch.sft` in a clone, elsewhere `fkv sft`."""
    name = module(job)
    return f"fkv {job}" if name.startswith("fkv.") else f"python -m {name}"
