"""Eviction policies: `get(name, **fields)` and `names()`."""

from fkv.policies.ada import Ada
from fkv.policies.base import Policy, View, check, get, names, register
from fkv.policies.expected_attention import ExpectedAttention
from fkv.policies.forced import Forced
from fkv.policies.foresight import Foresight
from fkv.policies.full import Full
from fkv.policies.h2o import H2O
from fkv.policies.keydiff import KeyDiff
from fkv.policies.knorm import Knorm
from fkv.policies.lagkv import LagKV
from fkv.policies.pyramid import Pyramid
from fkv.policies.random import Random
from fkv.policies.rkv import RKV
from fkv.policies.snapkv import SnapKV
from fkv.policies.streaming_llm import StreamingLLM
from fkv.policies.tova import TOVA
from fkv.policies.wrapper import Wrapper

__all__ = [
    "H2O",
    "RKV",
    "TOVA",
    "Ada",
    "ExpectedAttention",
    "Forced",
    "Foresight",
    "Full",
    "KeyDiff",
    "Knorm",
    "LagKV",
    "Policy",
    "Pyramid",
    "Random",
    "SnapKV",
    "StreamingLLM",
    "View",
    "Wrapper",
    "check",
    "get",
    "names",
    "register",
]
