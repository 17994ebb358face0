"""Float32 is float32: unless told, a TPU multiplies it as bfloat16, and a GPU as TF32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fkv import policies
from fkv.cache import kernels
from fkv.cache.slots import Cache
from fkv.engine import decoding, replay
from fkv.engine.decoding import Sampling
from fkv.keys import keys_of
from fkv.learning import golden, grpo, pretrain, sft
from fkv.policies import scorer
from tests import oracles

BUDGET, INTERVAL, LENGTH = 8, 4, 24
SIZES = (BUDGET, INTERVAL)


def products(jaxpr):
    """All `dot_general` of a program, those in its loops and kernels too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: x is None):
            inner = getattr(value, "jaxpr", value)  # closed or not
            if hasattr(inner, "eqns"):
                yield from products(inner)


def model(dtype="float32", **fields):
    config, params = oracles.make_model(layers=1, **fields)
    return config, jax.tree.map(lambda x: x.astype(dtype), params)


def scorers(config):
    rules = scorer.ScorerConfig(norm="rms")
    return policies.Foresight(scorer.init(jax.random.key(0), config, rules), rules, "sample")


def on_axis(step, *args):
    """A step that speaks to others, alone."""
    alone = jax.vmap(step, axis_name="data", axis_size=1, in_axes=(None,) * len(args))
    return jax.make_jaxpr(alone)(*args)


def supervised(dtype):
    config, params = model(dtype)
    policy, optimiser = scorers(config), sft.optimizer(0.01, 1, 10, 1.0)
    step = functools.partial(
        sft.train_step, config, policy.config, sft.LossConfig(), optimiser, *SIZES, "data"
    )
    state = sft.init_state(policy.params, optimiser)
    return on_axis(step, state, params, *oracles.make_tokens(config, [LENGTH]))


def reinforced(dtype):
    config, params = model(dtype)
    policy, optimiser = scorers(config), grpo.optimizer(0.01, 1, 1.0)
    settings = grpo.GRPOConfig(rollouts=2, epochs=2)
    step = functools.partial(
        grpo.train_step, config, policy.config, settings, optimiser, *SIZES, "data"
    )
    state = sft.init_state(policy.params, optimiser)
    token, length = oracles.make_tokens(config, [LENGTH, LENGTH])
    losses = jnp.ones((2, LENGTH - 1))
    random = jax.random.key_data(keys_of(jax.random.key(0), 2))
    batch = grpo.Batch(token, length, losses, losses, losses > 0, random)
    return on_axis(step, state, params, policy.params, batch)


def labels(dtype):
    config, params = model(dtype)

    def run(params, token, length):
        _, found, hidden = golden.policy(config, params, token, length, *SIZES)
        return found, replay.token_losses(config, params, hidden, token)

    return jax.make_jaxpr(run)(params, *oracles.make_tokens(config, [LENGTH]))


def pretraining(dtype):
    config, params = model(dtype)
    gradient = jax.value_and_grad(functools.partial(pretrain.loss, config=config), has_aux=True)
    token, length = oracles.make_tokens(config, [LENGTH])
    return jax.make_jaxpr(
        lambda params: gradient(params, token_bt=token, prompt_b=length // 2, length_b=length)
    )(params)


def answering(name, cache_dtype, dtype):
    config, params = model(dtype, cache_dtype=cache_dtype)
    policy = scorers(config) if name == "foresight" else policies.get(name)
    keys, token = keys_of(jax.random.key(0), 2), np.zeros((2, 12), np.int32)
    padding, limit = np.array([0, 3], np.int32), np.array([5, 5], np.int32)
    fixed = dict(sampling=Sampling(0.6, 5, 0.9), stop=(1,))

    def run(params, policy):
        state = decoding.prefill(
            config, params, policy, token, padding, keys, limit, *SIZES, new_tokens=8, **fixed
        )
        return decoding.decode_chunk(config, params, policy, state, 12, *SIZES, **fixed)

    return jax.make_jaxpr(run)(params, policy)


def kernel(dtype):
    q, k = jnp.ones((1, 1, 4, 16), dtype), jnp.ones((1, 2, 32, 16), dtype)
    position = jnp.zeros((1, 1, 32), jnp.int32)
    attend = functools.partial(kernels.decode_attention, platform="gpu", interpret=True)
    return jax.make_jaxpr(attend)(q, Cache(k, k, position), jnp.ones(1, jnp.int32))


RULES = sorted(set(policies.names()) - {"forced"})
PROGRAMS = {
    "supervised step": supervised,
    "reinforcement step": reinforced,
    "golden labels and losses": labels,
    "pretraining": pretraining,
    "decode kernel": kernel,
    **{f"answers, {name}": functools.partial(answering, name, "") for name in RULES},
    "answers, int8": functools.partial(answering, "foresight", "int8"),
}


# Bfloat16 is never trained.
CASES = [(name, "float32") for name in PROGRAMS]
CASES += [(name, "bfloat16") for name in PROGRAMS if name != "pretraining"]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_products_of_float32_are_of_the_highest_precision(name, dtype):
    """Those of two bfloat16 stay fast: they are exact, and their sums float32 where it is said."""
    highest = (jax.lax.Precision.HIGHEST,) * 2
    with jax.default_matmul_precision("default"):  # elsewhere, tests set the highest
        found = list(products(PROGRAMS[name](dtype).jaxpr))
    kinds = {x.aval.dtype.name for eqn in found for x in eqn.invars}
    assert found and kinds <= ({"float32"} if dtype == "float32" else {"float32", "bfloat16"})
    for eqn in found:
        exact = "float32" in {x.aval.dtype.name for x in eqn.invars}
        assert (eqn.params["precision"] == highest) == exact, eqn
