"""Programs by shapes alone are those that run."""

import dataclasses
import functools
import inspect

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from fkv import models, policies
from fkv.cache.cadence import Cadence
from fkv.engine import reading, replay, requests, steps
from fkv.engine.requests import Plan
from fkv.engine.sampling import Sampling
from fkv.jobs import programs
from fkv.policies import scorer
from fkv.runs import parallel
from tests import decoding, oracles

PLAN = Plan(Cadence(16, 8), Sampling(0.6, 5, 0.9), (1,))


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


class Spy:
    """One of the programs of `steps`: what it was called with, and lowered for."""

    def __init__(self, real):
        self.real, self.ran, self.lowered = real, [], []

    def __call__(self, *inputs, **more):
        self.ran.append(self._said(inputs, more))
        return self.real(*inputs, **more)

    def lower(self, *inputs, **more):
        self.lowered.append(self._said(inputs, more))

    def _said(self, inputs, more):
        bound = inspect.signature(self.real).bind(*inputs, **more)
        bound.apply_defaults()
        leaves, kind = jax.tree.flatten(bound.arguments)
        return kind, [(x.shape, x.dtype) if hasattr(x, "shape") else x for x in leaves]


@pytest.mark.parametrize(
    ("name", "cache_dtype"), [("full", "int8"), ("h2o", ""), ("ada(foresight)", "")]
)
def test_shapes_are_those_of_a_run(name, cache_dtype, monkeypatch):
    """All arguments of all programs that a batcher runs, for prompts in pieces and together."""
    lm = oracles.make_lm()
    lm = lm.replace(config=dataclasses.replace(lm.config, cache_dtype=cache_dtype))
    policy, rules = policies.get(name.replace("foresight", "h2o")), scorer.ScorerConfig()
    if "foresight" in name:
        params = scorer.init(jax.random.key(0), lm.config, rules)
        policy = policies.Ada(policies.Foresight(params, rules))
    monkeypatch.setattr(requests, "PIECE", 16)
    where = dict.fromkeys(("read_layer", "place_layer", "first_token"), reading)
    where |= dict.fromkeys(("steps", "evict_layer"), steps)
    for prompt, pieces, together in ((20, (8, 16), 1), (5, (8,), 2)):
        spies = {name: Spy(getattr(module, name)) for name, module in where.items()}
        prompts, keys = [np.arange(prompt) % 7] * 2, replay.row_keys(jax.random.key(0), 2)
        with monkeypatch.context() as patch:
            for program, spy in spies.items():
                patch.setattr(where[program], program, spy)
            decoding.generate(lm, policy, PLAN, prompts, keys, [20, 20])
            ran = {program: list(spy.ran) for program, spy in spies.items()}
            one = programs.decode(lm, policy, PLAN, (2, prompt), 20)
            assert (one.pieces, one.together) == (pieces, together)
            assert shapes(one.lm) == shapes(models.separate(lm, consume=False))
            lower = [one.read_layer, one.place_layer, one.first_token, one.steps, one.evict_layer]
            if len(pieces) > 1:
                lower.append(functools.partial(one.read_layer, first=False))
            for call in lower:
                call()
        for program, spy in spies.items():
            assert spy.lowered and all(x in ran[program] for x in spy.lowered), program
            # And nothing else was run.
            assert all(x in spy.lowered for x in ran[program]), program


def test_every_program_lowers_over_a_mesh():
    config, mesh = oracles.make_model()[0], parallel.make_mesh(1)
    lm = programs.model_shapes(config, "bfloat16", mesh)
    assert {x.dtype.name for x in jax.tree.leaves(lm)} == {"bfloat16"}
    assert lm.params["layers"][1]["q_hdm"].sharding.spec == PartitionSpec("model", None, None)
    one = programs.decode(lm, policies.get("h2o"), PLAN, (2, 24), 20, mesh)
    spec = one.state.caches[1].key_bksd.sharding.spec
    assert spec == PartitionSpec(None, "model", None, None)
    spec = one.state.asked[0].query_lbhd.sharding.spec
    assert spec == PartitionSpec(None, None, "model", None)
    assert one.held().chunk.query_blhd.sharding.spec == PartitionSpec(None, None, "model", None)
    assert one.hidden(24).sharding.spec == PartitionSpec(None, None, None)
    for program in ("read_layer", "place_layer", "first_token", "steps", "evict_layer"):
        lowered = getattr(one, program)()
        assert isinstance(lowered, jax.stages.Lowered), program
