"""Hugging Face's `transformers`, imported when it is needed, since that takes seconds."""

import os
from types import ModuleType

_QUIET = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


def transformers() -> ModuleType:
    """The module, without its advice to install PyTorch, for which fkv has no use."""
    before = os.environ.get(_QUIET)
    os.environ[_QUIET] = "1"
    try:
        import transformers
    finally:
        del os.environ[_QUIET]
        if before is not None:
            os.environ[_QUIET] = before
    return transformers
