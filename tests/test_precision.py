"""Float32 is float32: unless told, a TPU multiplies it as bfloat16, and a GPU as TF32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fkv import models, policies
from fkv.cache.cadence import Cadence
from fkv.engine import reading, replay, steps
from fkv.engine.batch import Batch, left_pad
from fkv.engine.sampling import Sampling, Samplings
from fkv.keys import keys_of
from fkv.learning import golden, grpo, pretrain, replayed, sft
from fkv.learning.fit import TrainState
from fkv.learning.tokens import token_losses
from fkv.policies import scorer
from tests import oracles
from tests.policies import BY_NAME, WEIGHTED, weighted

CADENCE, LENGTH = Cadence(8, 4), 24
FIT = dict(log_every=1, checkpoint_every=1, cadence=CADENCE)


def products(jaxpr):
    """All `dot_general` of a program, those in its loops too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: x is None):
            inner = getattr(value, "jaxpr", value)  # closed or not
            if hasattr(inner, "eqns"):
                yield from products(inner)


def model(dtype="float32", **fields):
    return jax.tree.map(lambda x: x.astype(dtype), oracles.make_lm(layers=1, **fields))


def scorers(config):
    rules = scorer.ScorerConfig(norm="rms")
    return policies.Foresight(scorer.init(jax.random.key(0), config, rules), rules, "sample")


def on_axis(step, *args):
    """A step that speaks to others, alone."""
    alone = jax.vmap(step, axis_name="data", axis_size=1, in_axes=(None,) * len(args))
    return jax.make_jaxpr(alone)(*args)


def supervised(dtype):
    lm = model(dtype)
    policy = scorers(lm.config)
    plan = sft.Plan(
        steps=10, batch=1, at_once=0, learning_rate=0.01, warmup=1, clip=1.0,
        scorer=policy.config, loss=sft.LossConfig(), **FIT,
    )  # fmt: skip
    step = functools.partial(sft.train_step, (plan,), axis="data")
    state = TrainState.init(policy.params, plan.optimiser)
    return on_axis(step, [state], lm, oracles.make_batch(lm.config, [LENGTH]))


def reinforced(epochs, dtype):
    lm = model(dtype)
    policy = scorers(lm.config)
    plan = grpo.Plan(
        steps=10, traces=1, traces_at_once=0, learning_rate=0.01, warmup=1, clip_norm=1.0,
        scorer=policy.config, grpo=grpo.GRPOConfig(rollouts=2, epochs=epochs), **FIT,
    )  # fmt: skip
    step = grpo.train_step if epochs == 1 else replayed.train_step
    step = functools.partial(step, plan, axis="data")
    state = grpo.TrainState.init(policy.params, plan.optimiser, reference=policy.params)
    losses = jnp.ones((2, LENGTH - 1))
    random = jax.random.key_data(keys_of(jax.random.key(0), 2))
    batch = oracles.make_batch(lm.config, [LENGTH, LENGTH])
    return on_axis(step, state, lm, grpo.Rollouts(batch, losses, losses, random))


def labels(dtype):
    lm = model(dtype)

    def run(lm, batch):
        _, found, hidden = golden.policy(lm, batch, CADENCE)
        return found, token_losses(lm, hidden, batch.token_bt)

    return jax.make_jaxpr(run)(lm, oracles.make_batch(lm.config, [LENGTH]))


def pretraining(dtype):
    lm = model(dtype)
    gradient = jax.value_and_grad(functools.partial(pretrain.loss, config=lm.config), has_aux=True)
    token, length = oracles.make_tokens(lm.config, [LENGTH])
    batch = Batch.of(token, length, length // 2)
    return jax.make_jaxpr(lambda params: gradient(params, batch=batch))(lm.params)


def answering(name, cache_dtype, dtype):
    lm = model(dtype, cache_dtype=cache_dtype)
    policy = scorers(lm.config) if name == "foresight" else None
    policy = weighted(name, lm.config) if name in WEIGHTED else policy or policies.get(name)
    prompts, row = left_pad([np.zeros(n, np.int32) for n in (12, 9)]), np.zeros(2, np.int32)
    how = jax.tree.map(jnp.asarray, Samplings.of([Sampling(0.6, 5, 0.9)] * 2))
    rows = steps.Rows(keys_of(jax.random.key(0), 2), prompts.prompt_b, row[:, None] + 1, how)
    dtype = jnp.dtype(dtype)

    def run(lm, policy):
        hidden, position = reading.embed(lm, prompts.token_bt), prompts.position_bt
        site = replay.Site(lm.config, CADENCE, 0, rows.key_b, rows.prompt_b)
        first, later = (hidden[:, :8], position[:, :8]), (hidden[:, 8:], position[:, 8:])
        weights, room = models.layer(lm, 0), reading.room_to_read(16, 8)
        _, held = reading.read_layer(weights, policy, site, *first, None, room)
        hidden, held = reading.read_layer(weights, policy, site, *later, held, room)
        drawn = reading.first_token(lm, rows, hidden[:, -1], later[1][:, -1], 2)
        caches, asked = steps.empty(policy, 2, lm.config, CADENCE, 16, dtype)
        caches = (reading.place_layer(policy, caches[0], held, site, np.arange(2), np.arange(2)),)
        state = steps.State(caches, asked, drawn.token[:, 0], prompts.length_b, row + 5)
        state, drawn = steps.steps(lm, policy, steps.Program(CADENCE, 4, 2), state, rows, 0)
        return steps.evict(lm.config, policy, CADENCE, state, rows), drawn

    return jax.make_jaxpr(run)(lm, policy)


RULES = ["full", "foresight", *BY_NAME, *WEIGHTED]
PROGRAMS = {
    "supervised step": supervised,
    "reinforcement step": functools.partial(reinforced, 1),
    "reinforcement step of two epochs": functools.partial(reinforced, 2),
    "golden labels and losses": labels,
    "pretraining": pretraining,
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
