"""Programs by shapes alone are those that run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from fkv import models, policies
from fkv.cache.cadence import Cadence
from fkv.engine import decoding, replay
from fkv.jobs import programs
from fkv.policies import scorer
from fkv.runs import parallel
from tests import oracles

PLAN = decoding.Plan(Cadence(16, 8), decoding.Sampling(0.6, 5, 0.9), (1,))


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize(
    ("name", "cache_dtype"), [("full", "int8"), ("h2o", ""), ("ada(foresight)", "")]
)
def test_shapes_are_those_of_a_run(name, cache_dtype):
    lm = oracles.make_lm()
    lm = lm.replace(config=dataclasses.replace(lm.config, cache_dtype=cache_dtype))
    policy, rules = policies.get(name.replace("foresight", "h2o")), scorer.ScorerConfig()
    if "foresight" in name:
        params = scorer.init(jax.random.key(0), lm.config, rules)
        policy = policies.Ada(policies.Foresight(params, rules))
    prompts, keys = [np.arange(20) % 7, np.arange(3)], replay.row_keys(jax.random.key(0), 2)
    state, width = decoding._start(lm, policy, PLAN, prompts, keys, [20, 20])
    found = programs.decode(lm, policy, PLAN, (2, width), 20)
    assert shapes(found.lm) == shapes(models.separate(lm, consume=False))
    assert shapes(found.state) == shapes(state)
    caches = found.state.caches[0]
    state, _, asked = decoding.steps(found_lm(lm), policy, PLAN, state, width)
    assert [shapes(x) for x in asked] == [shapes(found.asked)] * 2 * policy.evicts
    # Compiled for these shapes, they take what is there.
    if policy.evicts:
        program = found.evict_layer().compile()
        again = decoding.evict(lm.config, policy, PLAN, state, asked, program)
        assert shapes(again.caches[0]) == shapes(caches)
    hidden = jnp.zeros((2, width, lm.config.width))
    position, site = jnp.zeros((2, width), jnp.int32), replay.Site(
        lm.config, PLAN.cadence, np.int32(0), keys, state.prompt_b
    )  # fmt: skip
    out = jax.eval_shape(
        lambda: decoding.prefill_layer(models.layer(lm, 0), policy, site, hidden, position, 24)
    )
    assert shapes(out) == (shapes(hidden), shapes(caches))


def found_lm(lm):
    return models.separate(lm, consume=False)


def test_every_program_lowers_over_a_mesh():
    config, mesh = oracles.make_model()[0], parallel.make_mesh(1)
    lm = programs.model_shapes(config, "bfloat16", mesh)
    assert {x.dtype.name for x in jax.tree.leaves(lm)} == {"bfloat16"}
    assert lm.params["layers"][1]["q_hdm"].sharding.spec == PartitionSpec("model", None, None)
    one = programs.decode(lm, policies.get("h2o"), PLAN, (2, 24), 20, mesh)
    spec = one.state.caches[1].key_bksd.sharding.spec
    assert spec == PartitionSpec(None, "model", None, None)
    assert one.asked.query_lbhd.sharding.spec == PartitionSpec(None, None, "model", None)
    assert one.hidden_btm.sharding.spec == PartitionSpec(None, None, None)
    for program in ("prefill_layer", "first_token", "steps", "evict_layer", "chunk", "at_once"):
        lowered = getattr(one, program)()
        assert isinstance(lowered, jax.stages.Lowered), program
