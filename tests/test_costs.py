"""The arithmetic of costs against what is counted: weights, the compiler's operations, bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fkv import costs, models, policies, replay
from fkv.models import ModelConfig
from tests import oracles

QWEN3_4B = ModelConfig(
    "qwen3", 151_936, 2560, 36, 32, 8, 128, 9728, qk_norm=True, tied_embeddings=True
)
R1_QWEN_7B = ModelConfig("qwen2", 152_064, 3584, 28, 28, 4, 128, 18_944, qkv_bias=True)


def test_parameters_are_those_of_the_model():
    config, params = oracles.make_model()
    assert costs.parameters(config) == sum(x.size for x in jax.tree.leaves(params))
    assert costs.parameter_bytes(config, "bfloat16") == 2 * costs.parameters(config)
    # As on their model cards: 4.0 and 3.6 billion with and without embeddings; 7.6 and 6.5.
    assert round(costs.parameters(QWEN3_4B) / 1e9, 1) == 4.0
    assert round(costs.matrix(QWEN3_4B) / 1e9, 1) == 3.6
    assert round(costs.parameters(R1_QWEN_7B) / 1e9, 1) == 7.6
    assert round(costs.matrix(R1_QWEN_7B) / 1e9, 1) == 6.5


def test_operations_are_those_that_the_compiler_counts():
    # One layer and one block, since the compiler counts the body of a loop once.
    config = ModelConfig("qwen3", 64, 256, 1, 4, 2, 64, 512, qk_norm=True, tied_embeddings=True)
    params = jax.eval_shape(lambda: models.init(jax.random.key(0), config))
    tokens = 128

    def run(params, token, length):
        full = policies.get("full")
        return replay.replay(config, params, token, length, full, 32, 16)[0]

    row = jax.ShapeDtypeStruct((1, tokens), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    counted = jax.jit(run).lower(params, *row).compile().cost_analysis()["flops"]
    # What is masked is computed too: all pairs and not half of them.
    ours = costs.full_pass(config, tokens)
    ours += costs.attention(config, tokens * (tokens - 1) / 2)
    assert counted == pytest.approx(ours, rel=0.05)


def test_caches_have_the_bytes_that_are_said():
    config, _ = oracles.make_model(heads=4, kv_heads=2)
    for name in ("snapkv", "h2o"):
        policy = policies.get(name)
        cache = jax.eval_shape(
            lambda policy=policy: replay.init_cache(policy, 3, config, 16, 8, jnp.bfloat16)
        )
        ours = costs.cache_bytes(config, 24, "bfloat16", bool(policy.statistics))
        assert 3 * ours == config.layers * costs.size(cache), name


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
