"""The Pallas kernel against plain attention, interpreted; and that it lowers for GPUs and TPUs."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fkv import models, policies
from fkv.cache import attention, kernels
from fkv.cache.cadence import Cadence
from fkv.cache.slots import Cache
from fkv.engine import decoding, replay
from fkv.engine.batch import Batch
from fkv.engine.decoding import Plan, Sampling
from fkv.errors import UserError
from fkv.models import LM, numerics
from fkv.runs import costs
from tests import oracles

PLATFORMS = ("gpu", "tpu")


def random_inputs(group, slots, d, dtype, kv_heads=2, shared=False):
    """Three rows: one that sees some keys, one whose cache is empty, one that is done.

    Keys and values of empty slots are as large as any: a kernel that looked at them would show it.
    """
    rng = np.random.default_rng(slots)
    q = 2 * rng.normal(size=(3, 1, kv_heads * group, d))
    k, v = rng.normal(size=(2, 3, kv_heads, slots, d))
    # Half the keys are later than the query, a tenth of the slots empty.
    key_position = np.stack(
        [rng.permutation(2 * slots)[:slots] for _ in range(3 if shared else 3 * kv_heads)]
    ).reshape(3, -1, slots)
    key_position[rng.random(key_position.shape) < 0.1] = -1
    key_position[1] = -1
    position = np.array([slots, slots, -1])
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    cache = Cache(k, v, jnp.asarray(key_position, jnp.int32))
    return q, cache, jnp.asarray(position, jnp.int32)


@jax.jit
def plain(q, cache, position):
    return attention.attend_one("plain", q, cache, position[:, None])


interpreted = jax.jit(
    functools.partial(kernels.decode_attention, interpret=True),
    static_argnames=("platform", "block"),
)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
    ("group", "slots", "d", "block", "dtype"),
    [
        (4, 64, 128, 16, jnp.float32),
        (3, 75, 64, 32, jnp.float32),  # a last block of 11
        (17, 20, 32, 0, jnp.float32),  # more heads than a tile has rows
        (4, 75, 128, 32, jnp.bfloat16),
        (1, 45, 64, 0, jnp.bfloat16),
    ],
)
def test_the_kernel_gives_what_attend_gives(platform, group, slots, d, block, dtype):
    inputs = random_inputs(group, slots, d, dtype)
    out, lse = interpreted(*inputs, platform=platform, block=block)
    want, want_lse = plain(*inputs)
    assert (out.shape, out.dtype, lse.dtype) == (want.shape, dtype, jnp.float32)
    assert np.isfinite(np.asarray(out, np.float32)).all() and np.isfinite(lse).all()
    # What a row that sees nothing gets is the same, too: the mean of all values.
    error = 2e-6 if dtype == jnp.float32 else 0.01
    as_float = [np.asarray(x, np.float32) for x in (out, want)]
    np.testing.assert_allclose(*as_float, atol=error, rtol=error)
    np.testing.assert_allclose(lse, want_lse, atol=4e-6)
    assert (lse[1:] == numerics.MASKED).all() and (lse[0] > -20).all()


def test_heads_may_share_positions_and_logits_may_be_large():
    q, *rest = random_inputs(2, 40, 16, jnp.float32, shared=True)
    inputs = (200 * q, *rest)  # no sum of exponentials survives these
    out, lse = interpreted(*inputs, platform="gpu", block=16)
    want, want_lse = plain(*inputs)
    np.testing.assert_allclose(out, want, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, rtol=2e-6)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("slots", [1, 128, 1280, 2048, 2049, 5000, 32_768])
def test_blocks_cover_the_cache(platform, slots):
    block = kernels.block_slots(slots, 256, platform)
    blocks = -(-slots // block)
    assert blocks * block - slots < (128 if platform == "gpu" else 128 * blocks)
    if platform == "tpu":  # whole tiles, or all there is
        assert block == slots or block % 128 == 0
        assert block <= kernels.TPU_BLOCK
    # Wider keys, fewer of them.
    wide = kernels.block_slots(slots, 512, platform)
    assert wide == block // 2 if platform == "gpu" else wide == block


# ---- generation


def test_generation_is_that_of_plain_attention():
    config, params = oracles.make_model()
    policy, rng = policies.get("h2o"), np.random.default_rng(0)
    plan = Plan(Cadence(12, 6), Sampling(0.0))
    prompts = [rng.integers(37, size=n) for n in (20, 5)]
    out = {
        kernel: decoding.generate(
            LM(params, dataclasses.replace(config, kernel=kernel)),
            policy,
            plan,
            prompts,
            replay.row_keys(jax.random.key(0), 2),
            limit=(18, 9),
        )
        for kernel in ("plain", "interpret")
    }
    assert [x.tolist() for x in out["interpret"]] == [x.tolist() for x in out["plain"]]
    assert [len(x) for x in out["plain"]] == [18, 9]


# ---- lowering


def lowered(platform, function, *args):
    """The StableHLO of a function, for a device that isn't there."""
    kind = {"gpu": "NVIDIA H100", "tpu": "TPU v5e"}[platform]
    device = jax.sharding.AbstractDevice(kind, None, platform)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    name = {"gpu": "cuda"}.get(platform, platform)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*args).lower(lowering_platforms=(name,)).as_text()


CALL = {"gpu": "@__gpu$xla.gpu.triton", "tpu": "@tpu_custom_call"}


def numbers(line):
    """Entries of the largest tensor that a line of StableHLO names."""
    shapes = re.findall(r"tensor<((?:\d+x)+)", line)
    return max((math.prod(map(int, x[:-1].split("x"))) for x in shapes), default=0)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
    ("kv_heads", "group", "slots", "d"),
    # Qwen3-4B; heads as of R1-Distill-Qwen-7B, with a last block that is not full; small ones.
    [(8, 4, 1280, 128), (4, 7, 5000, 64), (8, 1, 100, 32)],
)
def test_it_lowers_and_copies_no_keys(platform, kv_heads, group, slots, d):
    k = jax.ShapeDtypeStruct((2, kv_heads, slots, d), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((2, 1, kv_heads * group, d), jnp.bfloat16)
    position = jax.ShapeDtypeStruct((2,), jnp.int32)
    cache = Cache(k, k, jax.ShapeDtypeStruct(k.shape[:3], jnp.int32))
    call = functools.partial(kernels.decode_attention, platform=platform)
    text = lowered(platform, call, q, cache, position)
    size = math.prod(k.shape)
    large = [x for x in text.splitlines() if numbers(x) >= size]
    # The arguments of the program, and the call: no operation in between.
    assert len(large) == 2 and "func.func public @main" in large[0], large
    assert CALL[platform] in large[1] and text.count("stablehlo.custom_call") == 1


@pytest.mark.parametrize(("slots", "group", "masked"), [(128, 16, 3), (100, 4, 5)])
def test_a_gpu_does_not_leave_its_arrays(slots, group, masked):
    # Which the interpreter would forgive: there, blocks are cut to fit.
    inputs = random_inputs(group, slots, 16, jnp.float32)
    call = functools.partial(kernels.decode_attention, platform="gpu")
    [kernel] = [
        eqn.params["jaxpr"]
        for eqn in jax.make_jaxpr(call)(*inputs).eqns
        if eqn.primitive.name == "pallas_call"
    ]
    # Of keys and values what lies beyond the cache is not read, and no row but the group's written.
    assert str(kernel).count(" mask=") == masked


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_decoding_step_has_one_call_a_layer(platform):
    config = dataclasses.replace(costs.SHAPES["Qwen/Qwen3-4B"], layers=2, kernel=platform)
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), models.decoder.param_shapes(config)
    )
    lm, policy, row = LM(params, config), policies.get("h2o"), jax.ShapeDtypeStruct((2,), jnp.int32)
    plan = Plan(Cadence(1024, 256), Sampling(0.0))
    keys = jax.eval_shape(lambda: replay.row_keys(jax.random.key(0), 2))
    prompts = Batch(jax.ShapeDtypeStruct((2, 256), jnp.int32), row, row, row)

    def prefill(lm, policy, prompts, keys, limit):
        return decoding.prefill(lm, policy, plan, prompts, keys, limit, 256)

    def step(lm, policy, state):
        return decoding.decode_chunk(lm, policy, plan, state, 256)

    state = jax.eval_shape(prefill, lm, policy, prompts, keys, row)
    text = lowered(platform, step, lm, policy, state)
    assert text.count(CALL[platform]) == 2


# ---- errors


def test_where_there_is_no_kernel_is_said():
    with pytest.raises(UserError, match="'pallas' needs a GPU or a TPU, and JAX runs on the CPU"):
        kernels.for_platform("cpu")
    for d in (8, 80):
        with pytest.raises(UserError, match=f"power of two from 16 on a GPU, .* the model is {d}:"):
            attention.attend_one("gpu", *inputs_of_one(d, jnp.float32))
    with pytest.raises(UserError, match="does not support float16 on a TPU: set dtype to 'bfloat"):
        attention.attend_one("tpu", *inputs_of_one(8, jnp.float16))


def inputs_of_one(d, dtype):
    q, cache, position = random_inputs(1, 16, d, dtype)
    return q, cache, position[:, None]


def test_a_config_has_a_kernel_for_its_cache():
    config, _ = oracles.make_model()
    with pytest.raises(UserError, match="kernel = 'pallas' must be one of plain, gpu, tpu, inter"):
        dataclasses.replace(config, kernel="pallas")
    with pytest.raises(UserError, match="kernel = 'gpu' reads no int8: set it to 'plain'"):
        dataclasses.replace(config, kernel="gpu", cache_dtype="int8")
