"""The frozen language models."""

from fkv.models.config import ModelConfig
from fkv.models.decoder import LM, Params, embed, finish, init, project, rotate, unembed, unrotated
from fkv.models.forms import is_separate, layer, separate, stack, stacked
from fkv.models.loading import find, load, load_judges, read, save

__all__ = [
    "LM",
    "ModelConfig",
    "Params",
    "embed",
    "find",
    "finish",
    "init",
    "is_separate",
    "layer",
    "load",
    "load_judges",
    "project",
    "read",
    "rotate",
    "save",
    "separate",
    "stack",
    "stacked",
    "unembed",
    "unrotated",
]
