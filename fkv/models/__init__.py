"""The frozen language models."""

from fkv.models.config import ModelConfig
from fkv.models.decoder import LM, Params, embed, finish, init, project, rotate, unembed, unstack
from fkv.models.loading import find, load, load_judges, read, save

__all__ = [
    "LM",
    "ModelConfig",
    "Params",
    "embed",
    "find",
    "finish",
    "init",
    "load",
    "load_judges",
    "project",
    "read",
    "rotate",
    "save",
    "unembed",
    "unstack",
]
