"""Eviction policies: `get(name, **fields)` and `names()`."""

from fkv.policies.base import Policy, View, get, names, register
from fkv.policies.forced import Forced
from fkv.policies.foresight import Foresight
from fkv.policies.full import Full
from fkv.policies.h2o import H2O
from fkv.policies.random import Random
from fkv.policies.rkv import RKV
from fkv.policies.snapkv import SnapKV
from fkv.policies.streaming_llm import StreamingLLM

__all__ = [
    "H2O",
    "RKV",
    "Forced",
    "Foresight",
    "Full",
    "Policy",
    "Random",
    "SnapKV",
    "StreamingLLM",
    "View",
    "get",
    "names",
    "register",
]
