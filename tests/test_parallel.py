"""The steps of both stages over several devices, each count of devices in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

# How many traces of a device count differs: 2, 2, 1, 2; then 0, 2, 0, 1; then all.
SCRIPT = """
import sys

import jax
import numpy as np

from fkv import grpo, parallel, replay, scorer, sft
from fkv.errors import UserError
from tests import oracles

devices = int(sys.argv[1])
assert parallel.device_count() == devices
parallel.check_batch(8)
try:
    parallel.check_batch(6)
except UserError as error:
    print(error)

config, params = oracles.make_model(layers=2)
rules = scorer.ScorerConfig(norm="rms")
optimiser = sft.optimizer(1e-2, 0, 10, 1.0)
state = sft.init_state(scorer.init(jax.random.key(0), config, rules), optimiser)
state, everywhere = parallel.replicate((state, params))

def device_step(state, params, token, length):
    return sft.train_step(
        config, rules, sft.LossConfig(1.0), optimiser, 16, 8, parallel.AXIS,
        state, params, token, length,
    )

step = parallel.pmap(device_step, constants=2, batched=2)
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
)
batches = [
    [45, 33, 40, 38, 24, 41, 45, 29],
    [9, 20, 45, 30, 24, 3, 44, 24],
    [45, 44, 43, 42, 41, 40, 39, 38],
]
found = {}
for i, lengths in enumerate(batches):
    token, length = jax.device_get(oracles.make_tokens(config, [*lengths, 45], seed=i))
    if i == 1:
        compiled.clear()
    state, metrics = step(state, everywhere, token[:8], length[:8])
    for name, x in {**state.params, **metrics, "step": state.step}.items():
        assert x.sharding.is_fully_replicated and len(x.sharding.device_set) == devices
        parts = [np.asarray(part.data) for part in x.addressable_shards]
        assert all((part == parts[0]).all() for part in parts)  # devices stay together
        found[f"{name}_{i}"] = parts[0]
assert not compiled, "the second step compiled again"

# A group of rollouts lies on one device or on two.
settings = grpo.GRPOConfig(rollouts=4, epochs=2, eta=0.01)
optimiser = grpo.optimizer(1e-2, 0, 1.0)
reference = jax.device_get(state.params)
state = sft.init_state(reference, optimiser)
token, length = jax.device_get(oracles.make_tokens(config, [45, 41], seed=9))
rng = np.random.default_rng(0)
index = np.arange(44)[None]
counted = (index >= 23) & (index < length[:, None] - 1)
rows = (token, length, *rng.random((2, 2, 44), dtype=np.float32), counted)
keys = jax.random.key_data(replay.row_keys(jax.random.key(0), 8))
batch = grpo.Batch(*(np.repeat(x, 4, axis=0) for x in rows), np.asarray(keys))

def device_step(state, params, reference, batch):
    return grpo.train_step(
        config, rules, settings, optimiser, 16, 8, parallel.AXIS, state, params, reference, batch
    )

step = parallel.pmap(device_step, constants=3, batched=1)
state, metrics = step(state, everywhere, reference, batch)
for name, x in {**state.params, **metrics}.items():
    found[f"grpo_{name}"] = np.asarray(x)
np.savez(sys.argv[2], **found)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What 1 and 4 devices found after every step, and what they printed."""
    path = tmp_path_factory.mktemp("parallel")
    started = {}
    for devices in (1, 4):
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} "
            f"--xla_force_host_platform_device_count={devices}",
        }
        command = [sys.executable, "-c", SCRIPT, str(devices), str(path / f"{devices}.npz")]
        started[devices] = subprocess.Popen(
            command,
            env=environment,
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    printed = {}
    for devices, process in started.items():
        printed[devices], errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return {n: (dict(np.load(path / f"{n}.npz")), printed[n]) for n in started}


def test_four_devices_do_what_one_does(runs):
    (one, _), (four, _) = runs[1], runs[4]
    assert one.keys() == four.keys() and {"loss_2", "overlap_2", "grad_norm_2"} <= one.keys()
    assert one["step_2"] == four["step_2"] == 3
    for name, x in one.items():
        np.testing.assert_allclose(four[name], x, rtol=1e-5, atol=1e-5, err_msg=name)
    for i in (1, 2):
        assert abs(one[f"w1_{i}"] - one[f"w1_{i - 1}"]).max() > 1e-3  # every step moves
    assert abs(one["grpo_w1"] - one["w1_2"]).max() > 1e-3
    assert one["grpo_reward_spread"] > 0


def test_refuses_a_batch_that_the_devices_can_not_share(runs):
    assert runs[1][1] == ""
    message = "batch = 6 can't be split over 4 devices; use a multiple of that\n"
    assert runs[4][1] == message
