"""fkv: KV-cache eviction for long reasoning, on JAX."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Imported on first use, so that jobs without a tokenizer, and `pip`, start quickly.
_API = (
    "Generation", "Model", "Sampling", "calibrate", "generate", "load", "load_scorer",
    "save_scorer", "stream",
)  # fmt: skip
__all__ = ["__version__", *_API]


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'fkv' has no attribute {name!r}")
    return getattr(importlib.import_module("fkv.api"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
