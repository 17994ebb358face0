"""fkv: KV-cache eviction for long reasoning, on JAX."""

import importlib
import importlib.metadata
import os
from typing import Any

__version__ = "0.1.0"

# Loaded when first used: jobs that need no tokenizer, and `pip`, stay quick.
_API = ("Generation", "Model", "Sampling", "generate", "load", "load_scorer", "stream")
__all__ = ["__version__", *_API]


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'fkv' has no attribute {name!r}")
    return getattr(importlib.import_module("fkv.api"), name)


def _without_ynnpack() -> None:
    """Keeps XLA's CPU compiler from handing products and sums to YNNPACK.

    What it computes there differs now and then from run to run when the machine is busy, and it can
    write where it must not (jax-ml/jax issues 39257, 39741 and 40412): same seed, same result would
    not hold. XLA reads the flag when JAX first looks for devices, ends the process if it does not
    know it, and other devices than CPUs have no use for it.
    """
    flag, found = "--xla_cpu_experimental_ynn_fusion_type", os.environ.get("XLA_FLAGS", "")
    release = importlib.metadata.version("jaxlib").split(".")
    if flag not in found and (int(release[0]), int(release[1])) <= (0, 12):
        os.environ["XLA_FLAGS"] = f"{found} {flag}=".strip()


_without_ynnpack()
