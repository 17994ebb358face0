"""The frozen language models."""

from fkv.models.config import ModelConfig, brief, read, read_json
from fkv.models.decoder import LM, Params, embed, finish, init, project, rotate, unembed, unstack
from fkv.models.loading import find, load, load_judges, save

__all__ = [
    "LM",
    "ModelConfig",
    "Params",
    "brief",
    "embed",
    "find",
    "finish",
    "init",
    "load",
    "load_judges",
    "project",
    "read",
    "read_json",
    "rotate",
    "save",
    "unembed",
    "unstack",
]
