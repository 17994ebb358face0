"""Hugging Face's hub ids, and `transformers`, imported on first use, as that takes seconds."""

import os
from types import ModuleType
from unittest import mock

ID = r"\w[\w.-]*/\w[\w.-]*"  # owner/name, as a pattern


def transformers() -> ModuleType:
    """The module, without its advice to install PyTorch."""
    with mock.patch.dict(os.environ, TRANSFORMERS_NO_ADVISORY_WARNINGS="1"):
        import transformers
    return transformers
