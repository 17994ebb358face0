"""The arithmetic of costs against what is counted: weights, the compiler's operations, bytes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fkv import models, policies
from fkv.cache.cadence import Cadence
from fkv.engine import replay
from fkv.engine.batch import Batch
from fkv.errors import UserError
from fkv.models import ModelConfig
from fkv.policies import scorer
from fkv.runs import costs
from tests import oracles

SHAPE = ModelConfig("qwen3", 50, 8, 3, 4, 2, 4, 16, qk_norm=True, tied_embeddings=True)


def test_parameters_are_those_of_the_model():
    config, params = oracles.make_model()
    assert costs.parameters(config) == sum(x.size for x in jax.tree.leaves(params))
    assert costs.parameter_bytes(config, "bfloat16") == 2 * costs.parameters(config)


def test_known_shapes_are_those_of_the_models():
    # Billions of parameters as their cards say, without Qwen3's embedding counted twice.
    sizes = {name: costs.parameters(shape) / 1e9 for name, shape in costs.SHAPES.items()}
    assert sizes == pytest.approx(
        {
            "Qwen/Qwen3-4B": 4.022,
            "Qwen/Qwen3-1.7B": 1.721,
            "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7.616,
            "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": 8.030,
            "random-100m": 0.0934,
        },
        rel=2e-3,
    )
    assert costs.shape_of("Qwen/Qwen3-4B", 2).layers == 2
    for name, layers, message in [
        (
            "nowhere",
            0,
            "no directory with a config.json, and no GGUF file; shapes known by name are Qwen/",
        ),
        ("Qwen/Qwen3-4B", 37, r"benchmark.layers = 37 must be 0 \(all\) to 36"),
    ]:
        with pytest.raises(UserError, match=message):
            costs.shape_of(name, layers)


def test_formulas_by_hand():
    # Per layer: queries and output 8 x 16 each, keys and values 8 x 8 each, MLP three of 8 x 16.
    weights = 3 * (2 * 128 + 2 * 64 + 3 * 128)
    assert costs.layer_weights(SHAPE) == weights
    norms = 3 * (8 + 8 + 4 + 4) + 8
    assert costs.parameters(SHAPE) == weights + norms + 50 * 8
    # 3 layers, 2 KV heads, 10 slots: key and value of 4 numbers each, and a position.
    assert costs.cache_bytes(SHAPE, 10, "float32") == 3 * 2 * 10 * (2 * 4 * 4 + 4)
    assert costs.cache_bytes(SHAPE, 10, "bfloat16") == 3 * 2 * 10 * (2 * 4 * 2 + 4)
    small = dataclasses.replace(SHAPE, cache_dtype="int8")
    assert costs.cache_bytes(small, 10, "float32") == 3 * 2 * 10 * (2 * (4 + 4) + 4)
    total = 4 * costs.parameters(SHAPE) + 5 * costs.cache_bytes(SHAPE, 10, "float32")
    assert costs.decode_bytes(SHAPE, 5, 10, "float32") == total
    attended = 3 * 4 * (2 * 4 * 10 + 2 * 4 * 10)  # layers, heads: q k and p v
    assert costs.decode_flops(SHAPE, 5, 10) == 5 * (2 * (weights + 400) + attended)
    assert costs.pass_flops(SHAPE, 20, 10) == 20 * (2 * weights + attended)
    assert costs.pass_flops(SHAPE, 20) == 20 * (2 * weights + attended)  # 10 on average
    assert costs.label_flops(SHAPE, 20) == 20 * (2 * weights + attended) + 3 * 4 * 4 * 400
    rules = scorer.ScorerConfig(hidden=2)
    # 24 tokens, B = 8, L = 4: evictions after 12, 16 and 20, the last that a token attends after.
    scored = 2 * 3 * 2 * 8 * (2 * (2 * 4 + 8 * 2) + 2) * 3
    begun = costs.pass_flops(SHAPE, 12) + 2 * 3 * 4 * 4 * 12 * 12  # with the statistics
    later = 12 * (2 * weights + 3 * 4 * 4 * 4 * 12) + 2 * 3 * 4 * 4 * 12 * 12
    evicted, losses = begun + later, 2 * (24 - 12) * 400
    want = costs.label_flops(SHAPE, 24) + evicted + 2 * scored
    assert costs.sft_flops(small, [rules], 24, Cadence(8, 4)) == want
    want -= costs.pass_flops(SHAPE, 12)  # that of the labels
    assert costs.sft_flops(SHAPE, [rules], 24, Cadence(8, 4)) == want
    # Two on states of their own: a pass each, on which they evict, too, and scores of all tokens.
    wide = scorer.ScorerConfig(hidden=4)
    third = 3 * scored
    want = 2 * costs.label_flops(SHAPE, 24) - costs.pass_flops(SHAPE, 24)
    want += 2 * (evicted - costs.pass_flops(SHAPE, 12)) + 3 * third
    assert costs.sft_flops(SHAPE, [], 24, Cadence(8, 4), [rules, wide]) == want
    want += evicted + 2 * scored
    assert costs.sft_flops(small, [rules], 24, Cadence(8, 4), [rules, wide]) == want
    want -= costs.pass_flops(SHAPE, 12)
    assert costs.sft_flops(SHAPE, [rules], 24, Cadence(8, 4), [rules, wide]) == want
    want = begun / 8 + later + 4 * scored + losses
    assert costs.grpo_flops(SHAPE, rules, 24, Cadence(8, 4), 8) == want
    want = 3 * evicted + scored + 2 * 3 * scored + losses
    assert costs.grpo_flops(SHAPE, rules, 24, Cadence(8, 4), 8, epochs=2) == want


def test_operations_are_those_that_the_compiler_counts():
    # One layer and one block, since the compiler counts the body of a loop once.
    config = ModelConfig("qwen3", 64, 256, 1, 4, 2, 64, 512, qk_norm=True, tied_embeddings=True)
    lm = models.LM(jax.eval_shape(lambda: models.init(jax.random.key(0), config)), config)
    tokens = 128

    def run(lm, batch):
        return replay.replay(lm, batch, policies.get("full"), Cadence(32, 16))[0]

    row = jax.ShapeDtypeStruct((1,), jnp.int32)
    batch = Batch(jax.ShapeDtypeStruct((1, tokens), jnp.int32), row, row, row)
    counted = jax.jit(run).lower(lm, batch).compile().cost_analysis()["flops"]
    # What is masked is computed too: all pairs and not half of them.
    ours = 2 * costs.pass_flops(config, tokens) - 2 * tokens * costs.layer_weights(config)
    assert counted == pytest.approx(ours, rel=0.05)


class Arriving(policies.Policy):
    """Keeps numbers of two types with each entry, besides the sums."""

    statistics = "sums"

    def arrive(self, arrival):
        norm = jnp.linalg.norm(arrival.key_btkd.astype(jnp.float32), axis=-1)
        return {"norm": norm, "value": arrival.value_btkd[..., :3]}

    def score(self, view):
        return view.arrived["norm"]


@pytest.mark.parametrize("cache_dtype", ["", "int8"])
def test_caches_have_the_bytes_that_are_said(cache_dtype):
    config, _ = oracles.make_model(heads=4, kv_heads=2, cache_dtype=cache_dtype)
    for policy in (policies.get("snapkv"), policies.get("h2o"), Arriving()):
        cache = jax.eval_shape(
            lambda policy=policy: replay.init_cache(policy, 3, config, Cadence(16, 8), jnp.bfloat16)
        )
        ours = costs.cache_bytes(config, 24, "bfloat16", policy)
        assert 3 * ours == config.layers * costs.size(cache), policy


def test_the_largest_that_fits_lies_on_the_line():
    points = [(1000, 6e9), (3000, 10e9)]  # 4 GB, and 2 MB for each
    assert costs.largest(points, 80e9) == 34_000
    assert costs.largest(points, 80e9, 256) == 256 * 132
    assert costs.largest(points, 4e9) == 0


def test_temporaries_are_counted_beside_arguments_and_results():
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    assert costs.temporaries(lambda x: x + 1, x) < 1000
    assert costs.temporaries(lambda x: jnp.sort(jnp.sin(x) @ x, axis=0).sum(), x) >= costs.size(x)
    assert costs.size({"a": np.zeros((2, 3), np.int16), "b": x}) == 12 + 4 * 256**2
