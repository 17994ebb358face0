"""Programs as the compilers of TPUs and GPUs make them, without such a device.

TPUs need libtpu, which the extra `tpu` brings; GPUs need what `gpu-compiler` does, in this
environment or, as JAX then looks for a GPU in every process, in a folder of its own that
$FKV_GPU_COMPILER names. Without them these tests are skipped.
"""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from configs import qwen3_4b
from fkv import policies
from fkv.cache.cadence import FULL
from fkv.engine import decoding
from fkv.jobs import dry_run, programs
from fkv.jobs.dry_run import Arm, Generation, Setup
from fkv.runs import costs, parallel, targets

SAMPLING = decoding.Sampling(0.6, 20, 0.95)
MODEL = dataclasses.replace(costs.SHAPES["Qwen/Qwen3-4B"], layers=2)
# Small, but with the shapes that matter: several groups of query heads, blocks of queries and keys.
SMALL = dataclasses.replace(
    MODEL, layers=2, width=256, heads=8, kv_heads=2, mlp_width=512, vocab_size=2048
)


@pytest.fixture(scope="module")
def tpu():
    """Compiles for a v5e, with the precision of products that users have."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip('no compiler for TPUs: pip install "fkv[tpu]"')
    before = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", None)
    yield targets.find("v5e")
    jax.config.update("jax_default_matmul_precision", before)


def setup(target, model=MODEL, model_axis=1, job="sft", **changes):
    config = qwen3_4b.get_config()
    config.update(model_axis=model_axis, **changes)
    model = dataclasses.replace(model, cache_dtype=config.cache_dtype)
    mesh = parallel.make_mesh(model_axis, devices=target.devices)
    return Setup(job, config, model, target, mesh)


def generation(where, name, rows, budget=1024, prompt=7936):
    if name == "foresight":
        policy = jax.eval_shape(lambda: programs.new_scorers(where.config, where.model))
    else:
        policy = policies.get(name)
    return Generation(where, Arm(name, policy, budget, rows, prompt, 256), SAMPLING)


def check_steps(found, rows=1):
    """What must be so of any decoding program, on any target."""
    program, weights = found.program, found.memory["language model"]
    assert found.memory["temporaries"] < 0.1 * weights, found.memory
    assert found.bytes < 1.05 * program.bytes
    assert found.flops == pytest.approx(max(1, 8 / rows) * program.flops, rel=0.35)
    largest = max(x["bytes"] for x in found.copies) if found.copies else 0
    in_loop = [x for x in found.copies if x["times"] >= program.times]
    assert not in_loop, in_loop
    assert not [x for x in found.copies if x["op"] == "float32" and x["of"]], largest
    # Nothing of a layer's size is multiplied in float32.
    wide = sum(x for kind, x in found.products.items() if "f32" in kind)
    assert wide < 0.01 * found.flops, found.products


@pytest.mark.parametrize(
    ("name", "rows"), [("full", 8), ("snapkv", 1), ("foresight", 8), ("h2o", 64)]
)
def test_a_decoding_step_on_a_tpu_reads_weights_and_caches_once(tpu, name, rows):
    where = setup(tpu)
    made = generation(where, name, rows, budget=FULL if name == "full" else 1024)
    found = where.compile(made.steps())
    check_steps(found, rows)
    assert found.bound / found.seconds > 0.8


def test_an_int8_cache_is_read_as_int8_on_a_tpu(tpu):
    where = setup(tpu, cache_dtype="int8")
    found = where.compile(generation(where, "snapkv", 8).steps())
    check_steps(found, 8)


def test_scorers_and_their_features_are_float32_on_a_tpu(tpu):
    where = setup(tpu)
    found = where.compile(generation(where, "foresight", 1).eviction())
    kinds = [kind for kind in found.products if "f32" in kind.partition(" x ")[0]]
    assert kinds and all("highest" in kind for kind in kinds), found.products
    assert found.memory["temporaries"] < 0.02 * found.memory["language model"]


def test_a_program_that_a_tpu_has_no_memory_for(tpu):
    where = setup(tpu)
    found = where.compile(generation(where, "full", 256, FULL, prompt=32_512).steps())
    assert found.fits is False and "GiB" in found.why


@pytest.mark.parametrize("job", ["sft", "grpo"])
def test_a_training_step_on_a_tpu_takes_memory_linear_in_the_trace(tpu, job):
    where = setup(tpu, SMALL, job=job, budget=256, interval=128)
    where.config.sft.update(batch=1, at_once=1)
    where.config.grpo.update(traces=1, rollouts=2, rollouts_at_once=2)
    stage = programs.stage(job, where.config, SMALL, where.mesh)
    short, long = (where.compile(dry_run._step(where, stage, n)) for n in (4096, 8192))
    assert long.memory["temporaries"] < 2.1 * short.memory["temporaries"]
    # Nothing quadratic: a table of all queries and keys of one head alone has this size.
    assert long.memory["temporaries"] < 4 * 8192**2


def test_a_split_model_exchanges_activations_only(tpu):
    where = setup(targets.find("v5e:2x2"), model_axis=4)
    found = where.compile(generation(where, "snapkv", 8).steps())
    assert found.memory["language model"] < 0.26 * costs.parameter_bytes(MODEL, "bfloat16")
    assert {x["op"] for x in found.collectives} <= {"all-reduce", "all-gather", "reduce-scatter"}
    largest = 8 * MODEL.vocab_size * 4  # the logits
    assert all(x["bytes"] <= largest for x in found.collectives), found.collectives
    check_steps(found, 8)


def test_a_decoding_step_on_a_gpu(tmp_path):
    folder = os.environ.get("FKV_GPU_COMPILER", "")
    if not folder and importlib.util.find_spec("jax_plugins") is None:
        pytest.skip('no compiler for GPUs: pip install "fkv[gpu-compiler]"')
    script = """
import dataclasses, json, sys
from fkv.runs import targets
from tests import test_targets as here
target = targets.find("h100")
data = {}
for name, rows, dtype in (("snapkv", 1, ""), ("foresight", 8, ""), ("full", 8, "int8")):
    where = here.setup(target, cache_dtype=dtype)
    made = here.generation(where, name, rows, budget=0 if name == "full" else 1024)
    found = where.compile(made.steps())
    here.check_steps(found, 8)
"""
    path = os.pathsep.join(x for x in (str(Path(__file__).parents[1]), folder) if x)
    env = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
