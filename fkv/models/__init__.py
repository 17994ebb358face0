"""The frozen language models."""

from fkv.models.config import ModelConfig
from fkv.models.decoder import Params, embed, finish, init, project, unembed, unstack
from fkv.models.loading import load, load_judges, save

__all__ = [
    "ModelConfig",
    "Params",
    "embed",
    "finish",
    "init",
    "load",
    "load_judges",
    "project",
    "save",
    "unembed",
    "unstack",
]
