"""The steps of both stages over several devices and several processes, each with its own launch."""

import dataclasses
import functools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from fkv import models
from fkv.errors import UserError
from fkv.learning import sft
from fkv.models import decoder
from fkv.policies import scorer
from fkv.runs import parallel
from tests import oracles
from tests.learning import sft_plan

# How many traces of a device count differs: 2, 2, 1, 2; then 0, 2, 0, 1; then all. A group of
# rollouts lies on one device or on two.
SCRIPT = """
import functools
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from fkv import models, policies
from fkv.engine import replay
from fkv.engine.batch import Batch
from fkv.engine.requests import Plan
from fkv.engine.sampling import Sampling
from fkv.learning import fit, grpo, replayed, sft
from fkv.policies import scorer
from fkv.runs import parallel, rundir
from fkv.errors import UserError
from launch import app
from tests import decoding, oracles
from tests.learning import CADENCE, grpo_plan, sft_plan

path, out, model_axis, several = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:]
if several:
    app.join()
mesh = parallel.make_mesh(model_axis)
copies = parallel.device_count(mesh)
parallel.check_batch(8, mesh)
try:
    parallel.check_batch(7, mesh)
except UserError as error:
    print(f"said: {error}")

# ---- the language model: no device ever holds more than its part and one tensor
insert, peak = models.loading._insert, 0

def watched(*args):
    global peak
    stack = insert(*args)
    parts = [part.data for x in jax.live_arrays() for part in x.addressable_shards]
    held = {(x.device, x.unsafe_buffer_pointer()): x.nbytes for x in parts}
    for device in jax.local_devices():
        peak = max(peak, sum(n for (where, _), n in held.items() if where == device))
    return stack

models.loading._insert = watched
own = models.load(path / "model", mesh=parallel.make_mesh(model_axis, "process"))
models.loading._insert = insert
leaves = jax.tree.leaves(own)
size, largest = sum(x.nbytes for x in leaves), max(x.nbytes for x in leaves)
part = sum(x.addressable_shards[0].data.nbytes for x in leaves)
assert part < size * (1 / model_axis + 0.02), part / size
assert peak < part + largest / model_axis, (peak / size, part / size)
everywhere = own.replace(params=parallel.view(own.params, mesh))

# ---- the supervised step
rules = scorer.ScorerConfig(norm="rms")
plan = sft_plan(rules, sft.LossConfig(1.0), steps=10)
state = fit.TrainState.init(dict(np.load(path / "scorers.npz")), plan.optimiser)
states = parallel.replicate([state], mesh)
step = functools.partial(sft.train_step, (plan,), axis=parallel.AXIS)
step = parallel.pmap(step, mesh, constants=2, batched=1)
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
    token, length = jax.device_get(oracles.make_tokens(own.config, [*lengths, 45], seed=i))
    if i == 1:
        compiled.clear()
    states, (metrics,) = step(states, everywhere, Batch.of(token[:8], length[:8]))
    (state,) = states
    for name, x in {**state.params, **metrics, "step": state.step}.items():
        assert x.sharding.is_fully_replicated and len(x.sharding.device_set) == mesh.size
        parts = [np.asarray(part.data) for part in x.addressable_shards]
        assert all((part == parts[0]).all() for part in parts)  # devices stay together
        found[f"{name}_{i}"] = parts[0]
assert not compiled, "the second step compiled again"

# ---- the step of the reinforcement stage
reference = jax.device_get(state.params)
batch = jax.device_get(oracles.make_batch(own.config, [45, 41, 43], seed=9))
rows = (batch, *np.random.default_rng(0).random((2, 3, 44), dtype=np.float32))
keys = jax.random.key_data(replay.row_keys(jax.random.key(0), 12))
rows = jax.tree.map(lambda x: np.repeat(x, 4, axis=0), rows)
rows = grpo.Rollouts(*rows, np.asarray(keys))
for title, module, epochs in (("grpo", grpo, 1), ("twice", replayed, 2)):
    plan = grpo_plan(rules, grpo.GRPOConfig(rollouts=4, epochs=epochs, eta=0.01))
    state = grpo.TrainState.init(reference, plan.optimiser, reference=reference)
    step = functools.partial(module.train_step, plan, axis=parallel.AXIS)
    step = parallel.pmap(step, mesh, constants=2, batched=1)
    state = parallel.replicate(state, mesh)
    state, metrics = step(state, everywhere, rows)
    for name, x in {**state.params, **metrics}.items():
        found[f"{title}_{name}"] = np.asarray(x)

# ---- decoding by one copy
if copies == 1:
    params = parallel.view(own.params, parallel.make_mesh(model_axis, "copy"))
    policy = policies.Foresight(jax.device_get(state.params), rules)
    prompts = [np.arange(30) % 7, np.arange(13) % 11]
    plan = Plan(CADENCE, Sampling(1.0, top_k=8))
    keys = replay.row_keys(jax.random.key(1), 2)
    given, asked = (own.replace(params=params), policy, plan), (prompts, keys, [24, 24])
    batch = decoding.batcher(*given, *asked)
    for x in jax.tree.leaves(batch._caches):
        assert x.addressable_shards[0].data.shape[1] * model_axis == own.config.kv_heads
    tokens = decoding.rows(decoding.steps(batch), 2)
    found["tokens"] = np.stack(tokens)

    # And as it is loaded, with separate layers: the second step compiles nothing.
    copy = parallel.make_mesh(model_axis, "copy")
    lm = models.load(path / "model", mesh=copy, separate=True)
    first = {other: name for name, other in models.decoder.OUTPUTS_FIRST.items()}
    for name, x in lm.params["layers"][1].items():
        stack = own.params["layers"][first.get(name, name)].addressable_shards[0].data
        shape = np.moveaxis(stack, -1, 1).shape if name in first else stack.shape
        assert x.addressable_shards[0].data.shape == shape[1:], name
    sharding = {name: x.sharding for name, x in lm.params["layers"][1].items()}
    batch, stepped = decoding.batcher(lm, *given[1:], *asked), []
    while batch.live or batch.waiting:
        stepped.append(batch.step())
        assert len(stepped) == 1 or not compiled, compiled
        compiled.clear()
    assert len(stepped) > 2
    assert (np.stack(decoding.rows(stepped, 2)) == found["tokens"]).all()
    back = models.stack(lm)
    for name, x in back.params["layers"].items():
        there = own.params["layers"][name].sharding
        assert x.sharding.is_equivalent_to(there, x.ndim), name
    again = models.separate(back).params["layers"][1]
    assert all(x.sharding.is_equivalent_to(sharding[n], x.ndim) for n, x in again.items())

# ---- several processes have one run
if several:
    index, count = jax.process_index(), jax.process_count()
    assert [parallel.anywhere(index == i) for i in (0, 1, 9)] == [True, True, False]
    assert parallel.share([{"from": index}] * index) == [
        {"from": i} for i in range(count) for _ in range(i)
    ]
    total = parallel.total({"n": np.arange(3) + index})["n"]
    assert total.tolist() == [sum(i + j for j in range(count)) for i in range(3)]

    for step in (1, 2):  # the second resumes
        run = rundir.open_run(path / "run", ConfigDict({"x": 1}))
        saved = run.resume(state)
        assert (saved and saved.step) == (step - 1 or None)
        if saved:
            jax.tree.map(np.testing.assert_array_equal, saved.state, state)
        run.log(step, {"loss": 0.5})
        run.save(step, state, keep=1)
        assert [p.name for p in (path / "run/checkpoints").iterdir()] == [str(step)]
        run.close()
        if step == 1 and run._held:
            run._held.close()
    try:
        rundir.open_run(path / "run", ConfigDict({"x": 2}))
    except UserError as error:
        print(f"said: {error}")

    # The last process hangs until the test wakes it.
    if index == count - 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        try:
            parallel.barrier("the meeting", seconds=1)
        except UserError as error:
            print(f"said: {error}")
        (path / "waited").touch()
    parallel.barrier("the end")
if parallel.first():
    np.savez(out, **found)
"""


def start(script, *arguments, devices=1, processes=1):
    """Processes that run a script, each with that many CPU devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = []
    for index in range(processes):
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_cpu_multi_thread_eigen=false "
            f"--xla_force_host_platform_device_count={devices}",
        }
        if processes > 1:
            environment["JAX_COORDINATOR_ADDRESS"] = address
            environment["JAX_NUM_PROCESSES"] = str(processes)
            environment["JAX_PROCESS_ID"] = str(index)
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", script, *map(str, arguments)],
                env=environment,
                cwd=Path(__file__).parents[2],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def finish(started):
    """What each of them printed; if one fails, the rest end and the test says what it said."""
    printed = []
    try:
        for process in started:
            out, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors
            printed.append(re.findall("said: (.*)", out))  # Gloo prints too
    finally:
        for process in started:
            process.kill()
    return printed


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What every layout of devices found after every step, and what its processes printed."""
    path = tmp_path_factory.mktemp("parallel")
    lm = oracles.make_lm(layers=2, vocab_size=40)
    models.save(path / "model", lm)
    scorers = scorer.init(jax.random.key(0), lm.config, scorer.ScorerConfig())
    np.savez(path / "scorers.npz", **scorers)
    one = start(SCRIPT, path, path / "one.npz", 1)
    four = start(SCRIPT, path, path / "four.npz", 1, devices=4)
    shared = start(SCRIPT, path, path / "shared.npz", 2, devices=2)
    printed = {"one": finish(one), "four": finish(four), "shared": finish(shared)}
    several = start(SCRIPT, path, path / "several.npz", 2, "several", devices=2, processes=2)
    while not (path / "waited").exists() and several[0].poll() is None:
        time.sleep(0.1)
    several[-1].send_signal(signal.SIGCONT)
    printed["several"] = finish(several)
    return {n: (dict(np.load(path / f"{n}.npz")), said) for n, said in printed.items()}


@pytest.mark.parametrize("layout", ["four", "shared", "several"])
def test_any_layout_of_devices_does_what_one_device_does(runs, layout):
    """Four copies of the model, one that two devices share, and two processes with such a one."""
    one, several = runs["one"][0], runs[layout][0]
    assert one.keys() - several.keys() == (set() if layout == "shared" else {"tokens"})
    assert {"loss_2", "overlap_2", "grad_norm_2", "grpo_w1", "grpo_loss"} <= several.keys()
    assert one["step_2"] == several["step_2"] == 3
    for name, x in several.items():
        np.testing.assert_allclose(x, one[name], rtol=1e-5, atol=1e-5, err_msg=name)
    for i in (1, 2):
        assert abs(one[f"w1_{i}"] - one[f"w1_{i - 1}"]).max() > 1e-3  # every step moves
    assert abs(one["grpo_w1"] - one["w1_2"]).max() > 1e-3
    assert one["grpo_reward_spread"] > 0
    assert (one["tokens"] >= 0).all()


def test_a_step_made_again_is_the_same_program():
    def program(plan):
        step = functools.partial(sft.train_step, (plan,), axis=parallel.AXIS)
        return parallel._program(step, parallel.make_mesh(), 2, 1)

    plan = sft_plan(scorer.ScorerConfig(), sft.LossConfig(1.0), steps=10)
    one, other = program(plan), program(dataclasses.replace(plan, clip=2 * plan.clip))
    assert program(dataclasses.replace(plan)) is one and other is not one


def test_refuses_a_batch_that_the_devices_can_not_share(runs):
    assert runs["one"][1] == runs["shared"][1] == [[]]
    assert runs["four"][1] == [["batch = 7 can't be split over 4 devices; use a multiple of 4"]]
    assert runs["several"][1][0][0] == (
        "batch = 7 can't be split over 4 devices, 2 to a copy of the model; use a multiple of 2"
    )


def test_one_process_opens_the_run_and_all_hear_of_an_error(runs):
    said = [lines[1] for lines in runs["several"][1]]
    assert "holds a run with another config (x: 1 -> 2): use another --workdir" in said[0]
    assert all(line.startswith("process 0 can't open ") for line in said[1:])


def test_a_process_that_hangs_is_named(runs):
    *waited, hung = runs["several"][1]
    assert len(hung) == 2
    for lines in waited:
        assert lines[2] == (
            "the meeting: waited 1 s for process 1 of 2: see its log, then restart all of them"
        )


def test_refuses_a_model_that_the_devices_can_not_share():
    with pytest.raises(UserError, match="model_axis = 2 must divide the 1 devices of a process"):
        parallel.make_mesh(2)
    mesh = jax.sharding.AbstractMesh((1, 4), ("data", "model"))
    P = jax.sharding.PartitionSpec
    for name, shape, spec in [
        ("k_kdm", (3, 8, 16, 32), P(None, "model", None, None)),
        ("o_hdm", (3, 16, 8, 32), P(None, "model", None, None)),
        ("q_norm_d", (3, 8), P(None, None)),
        ("embed_vm", (37, 32), P(None, None)),  # can't be cut evenly, so it is not
    ]:
        assert decoder.sharding(name, shape, mesh).spec == spec
    with pytest.raises(UserError, match="model_axis = 4 must divide the 2 KV heads"):
        decoder.sharding("k_bias_kd", (3, 2, 8), mesh)
