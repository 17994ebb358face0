import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fkv import models
from fkv.models import ModelConfig
from fkv.models.config import from_hf
from fkv.models.decoder import param_shapes, rotate
from tests.models import SMALL, full_logits, random_lm, tokens, torch_logits, torch_model

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "factor": 2.0}

MODELS = {
    "qwen3, tied, wide heads": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3, biases, untied": ("qwen3", {"head_dim": 16, "attention_bias": True, "rope_theta": 1e6}),
    "qwen2, untied": ("qwen2", {"rms_norm_eps": 1e-2}),
    "qwen2, tied, MHA": ("qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama, one KV head": ("llama", {"num_key_value_heads": 1, "head_dim": 16}),
    "llama, biases": ("llama", {"head_dim": 16, "attention_bias": True, "mlp_bias": True}),
    "llama, llama3 scaling": ("llama", {"head_dim": 16, "rope_scaling": LLAMA3}),
    "llama, linear scaling": ("llama", {"head_dim": 16, "rope_scaling": LINEAR}),
    "qwen3, yarn scaling": ("qwen3", {"head_dim": 16, "rope_scaling": YARN}),
}


@pytest.mark.parametrize(("family", "settings"), MODELS.values(), ids=MODELS.keys())
def test_logits_are_those_of_pytorch(family, settings, tmp_path):
    model = torch_model(family, **settings)
    model.save_pretrained(tmp_path)
    lm = models.load(tmp_path)
    token_bt = tokens(96)  # beyond the 32 or 64 positions of the config
    want = torch_logits(model, token_bt)
    np.testing.assert_allclose(full_logits(lm, token_bt), want, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3_tiny", "qwen2_tiny"])
def test_logits_are_those_of_the_released_code(name, shared_reference):
    lm = models.load(shared_reference / name)
    replay = np.load(shared_reference / name / "replay.npz")
    got = full_logits(lm, replay["input_ids"])
    np.testing.assert_allclose(got[0], replay["full_logits"], atol=1e-4)


@pytest.mark.parametrize(
    ("max_positions", "theta", "scaling"),
    [
        (131_072, 5e5, LLAMA3 | {"original_max_position_embeddings": 8192}),
        (40_960, 1e6, YARN | {"original_max_position_embeddings": 32_768}),
        (4096, 1e4, YARN | {"truncate": False, "beta_fast": 16, "beta_slow": 2}),
        (4096, 1e4, YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}),
        (4096, 1e4, YARN | {"mscale": 1.0, "mscale_all_dim": 0}),
        (4096, 1e4, YARN | {"mscale": 0.0, "mscale_all_dim": 0.7}),
        (4096, 1e4, YARN | {"attention_factor": 1.5}),
        (4096, 1e4, {"rope_type": "yarn", "factor": 4.0}),
        (4096, 1e4, LINEAR),
    ],
)
def test_rotary_frequencies_are_those_of_pytorch(max_positions, theta, scaling):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    settings = SMALL | {
        "max_position_embeddings": max_positions,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "head_dim": 128,
    }
    config = from_hf(settings | {"architectures": ["LlamaForCausalLM"]})
    init = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[scaling["rope_type"]]
    want, want_scale = init(transformers.LlamaConfig(**settings), "cpu")
    inv, scale = config.inv_frequencies()
    np.testing.assert_allclose(inv, want.numpy(), rtol=2e-6)
    assert scale == pytest.approx(want_scale)


CONFIG = ModelConfig(
    family="llama",
    vocab_size=29,
    width=32,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=16,
    mlp_width=64,
)


def test_rotated_products_depend_on_the_distance_alone():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, CONFIG.head_dim)).astype(np.float32)
    turn = jax.jit(lambda x, position: rotate(x, position.reshape(1, 1), CONFIG))

    def product(i, j):
        return float((turn(q, jnp.array(i)) * turn(k, jnp.array(j))).sum())

    assert product(7, 2) == pytest.approx(product(1007, 1002), abs=1e-3)
    assert product(7, 2) != pytest.approx(product(2, 7), abs=1e-1)


def test_bfloat16_parameters_give_bfloat16_caches_and_float32_logits():
    lm = random_lm(CONFIG, jnp.bfloat16)
    layer = jax.tree.map(lambda x: x[0], lm.params["layers"])
    hidden = jnp.zeros((1, 5, CONFIG.width), jnp.bfloat16)
    project, finish = (functools.partial(f, CONFIG) for f in (models.project, models.finish))
    q, k, v = jax.eval_shape(project, layer, hidden, jnp.arange(5)[None])
    out = jax.eval_shape(finish, layer, hidden, q)
    assert all(x.dtype == jnp.bfloat16 for x in (q, k, v, out))
    token_bt = tokens(12, CONFIG.vocab_size)
    got = full_logits(lm, token_bt)
    want = full_logits(jax.tree.map(lambda x: x.astype(np.float32), lm), token_bt)
    assert got.dtype == jnp.float32
    difference = np.abs(got - want).max() / np.abs(want).max()
    assert 1e-4 < difference < 0.05


def test_init():
    config = dataclasses.replace(
        CONFIG, qk_norm=True, qkv_bias=True, out_bias=True, mlp_bias=True, width=128
    )
    init = jax.jit(models.init, static_argnums=(1, 2))
    params = init(jax.random.key(0, impl="rbg"), config, 3.0)  # rbg compiles twice as fast
    shape = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert shape == jax.tree.map(lambda x: (x.shape, x.dtype), param_shapes(config))
    layers = params["layers"]
    assert np.all(layers["q_norm_d"] == 3) and np.all(layers["k_norm_d"] == 3)
    assert np.all(layers["attn_norm_m"] == 1) and np.all(params["final_norm_m"] == 1)
    assert not any(np.any(x) for name, x in layers.items() if "bias" in name)
    # fan-in 128, and 64 for the two that write to the residual stream, 6 of them
    assert layers["q_hdm"].std() == pytest.approx(128**-0.5, rel=0.05)
    assert params["head_vm"].std() == pytest.approx(128**-0.5, rel=0.05)
    assert layers["o_hdm"].std() == pytest.approx((64 * 6) ** -0.5, rel=0.05)
    assert layers["down_fm"].std() == pytest.approx((64 * 6) ** -0.5, rel=0.05)
    assert not np.allclose(layers["gate_mf"], layers["up_mf"])


def test_the_config_of_a_language_model_is_static():
    lm = models.LM({"embed_vm": jnp.ones((2, 3))}, CONFIG)
    assert jax.jit(lambda lm: lm.replace(params=lm.config.width))(lm).params == CONFIG.width
    assert jax.tree.map(jnp.shape, lm) == models.LM({"embed_vm": (2, 3)}, CONFIG)
    assert len(jax.tree.leaves(lm)) == 1
