"""fkv: KV-cache eviction for long reasoning, on JAX.

import fkv

model = fkv.load("Qwen/Qwen3-1.7B", dtype="bfloat16")  # a hub id, a directory or a GGUF file
out = fkv.generate(model, "What is 12 * 34?", policy="snapkv", budget=1024, chat=True)
print(out[0][0].text)

The budget is how many KV pairs each head keeps; every `interval` tokens the least important go.
`fkv.policies.names()` lists the policies, `help(fkv.generate)` the settings. Jobs that train and
measure are commands, `fkv --help` in a shell, or functions of a recipe and a directory:

from fkv.jobs import sft

sft.run(fkv.recipe("tiny"), "runs/sft_tiny")
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fkv import policies as policies
    from fkv.api import Generation as Generation
    from fkv.api import Model as Model
    from fkv.api import Sampling as Sampling
    from fkv.api import calibrate as calibrate
    from fkv.api import generate as generate
    from fkv.api import load as load
    from fkv.api import load_scorer as load_scorer
    from fkv.api import recipe as recipe
    from fkv.api import save_scorer as save_scorer
    from fkv.api import stream as stream
    from fkv.context import Context as Context
    from fkv.judge import loss as loss
    from fkv.judge import receipt as receipt

__version__ = "0.1.0"

# Imported on first use, so that jobs without a tokenizer, and `pip`, start quickly.
_HOMES = {
    "api": (
        "Generation", "Model", "Sampling", "calibrate", "generate", "load", "load_scorer", "recipe",
        "save_scorer", "stream",
    ),
    "context": ("Context",),
    "judge": ("loss", "receipt"),
}  # fmt: skip
_HOME = {name: home for home, names in _HOMES.items() for name in names}
_ROOMS = ("policies",)
__all__ = ["__version__", *_HOME, *_ROOMS]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"fkv.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'fkv' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fkv.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
