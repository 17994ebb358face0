"""Programs as the compilers of TPUs and GPUs make them, without such a device.

TPUs need libtpu, which the extra `tpu` brings; GPUs need what `gpu-compiler` does, in this
environment or, as JAX then looks for a GPU in every process, in a folder of its own that
$FKV_GPU_COMPILER names. Without them these tests are skipped.
"""

import dataclasses
import functools
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
from fkv.engine.sampling import Sampling
from fkv.jobs import compiled, dry_run, programs
from fkv.jobs.compiled import Program
from fkv.jobs.dry_run import Arm, Generation, Setup
from fkv.runs import costs, parallel, targets

SAMPLING = Sampling(0.6, 20, 0.95)
MODEL = dataclasses.replace(costs.SHAPES["Qwen/Qwen3-4B"], layers=2)
# Small, but with the shapes that matter: several groups of query heads, blocks of queries and keys.
SMALL = dataclasses.replace(
    MODEL, layers=1, width=256, heads=8, kv_heads=2, mlp_width=512, vocab_size=2048
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


def setup(target, model=MODEL, model_axis=1, **changes):
    config = qwen3_4b.get_config()
    config.update(model_axis=model_axis, **changes)
    model = dataclasses.replace(model, cache_dtype=config.cache_dtype)
    mesh = parallel.make_mesh(model_axis, devices=target.devices)
    return Setup("sft", config, model, target, mesh)


def generation(where, name, rows, budget=1024, prompt=7936):
    if name == "foresight":
        policy = jax.eval_shape(lambda: programs.new_scorers(where.config, where.model))
    else:
        policy = policies.get(name)
    return Generation(where, Arm(name, policy, budget, rows, prompt, 256), SAMPLING)


def check_steps(found):
    """What must be so of any decoding program, on any target."""
    program, weights = found.program, found.memory["language model"]
    assert found.memory["temporaries"] < 0.1 * weights, found.memory
    # Fewer, where small caches stay on the chip.
    assert 0.8 * program.bytes < found.bytes < 1.05 * program.bytes
    again = [x for x in found.copies if x["times"] >= program.times or x["op"] == "float32"]
    assert not again, again  # in the loop, or in float32
    if found.target.platform == "tpu":  # a GPU multiplies a single row on its ordinary cores
        kinds = {kind.removesuffix(" default") for kind in found.products}
        assert kinds <= {"bf16 x bf16", "bf16 x s8", "s8 x bf16"}, found.products


@pytest.mark.parametrize(("name", "rows"), [("full", 8), ("foresight", 1)])
def test_a_decoding_step_on_a_tpu_reads_weights_and_caches_once(tpu, name, rows):
    where = setup(tpu)
    made = generation(where, name, rows, budget=FULL if name == "full" else 1024)
    found = where.compile(made.steps())
    check_steps(found)
    # Few rows, and the few queries of a KV head, are padded to eight.
    assert found.program.flops < 1.01 * found.flops < 1.5 * 8 / rows * found.program.flops
    # The compiler gives a single streamed product of a v5e 71 to 76 % of its bandwidth.
    assert found.bound / found.seconds > 0.7


def test_an_int8_cache_is_read_as_int8_on_a_tpu(tpu):
    where = setup(tpu, cache_dtype="int8")
    found = where.compile(generation(where, "snapkv", 8).steps())
    check_steps(found)


def test_scorers_and_their_features_are_float32_on_a_tpu(tpu):
    where = setup(tpu)
    found = where.compile(generation(where, "foresight", 1).border())
    kinds = [kind for kind in found.products if "f32" in kind.partition(" x ")[0]]
    assert kinds and all("highest" in kind for kind in kinds), found.products
    assert found.memory["temporaries"] < 0.02 * found.memory["language model"]


def test_a_program_that_a_tpu_has_no_memory_for(tpu):
    where = setup(tpu)
    shape = jax.ShapeDtypeStruct((2**13, 2**10), jax.numpy.bfloat16)
    shape = parallel.replicated(shape, where.mesh)
    lower = functools.partial(jax.jit(lambda x: jax.numpy.tile(x, (2**11, 1)) + 1).lower, shape)
    found = where.compile(Program("too large", lower, {}, 0, 0))
    assert found.fits is False and "GiB of 15.75GiB" in found.why
    assert "too large" in compiled.memory_table([found]) and "no: needs" in compiled.memory_table(
        [found]
    )


def test_a_supervised_step_on_a_tpu_has_nothing_quadratic(tpu):
    where, tokens = setup(tpu, SMALL, budget=256, interval=128), 8192
    where.config.sft.update(batch=1, at_once=1)
    stage = programs.stage("sft", where.config, SMALL, where.mesh)
    found = where.compile(dry_run._step(where, stage, tokens))
    # All queries and keys of one head, in two bytes each.
    assert found.memory["temporaries"] < 2 * tokens**2


def test_a_split_model_exchanges_activations_only(tpu):
    where = setup(targets.find("v5e:2x2"), model_axis=4)
    found = where.compile(generation(where, "snapkv", 8).steps())
    assert found.memory["language model"] < 0.26 * costs.parameter_bytes(MODEL, "bfloat16")
    largest = 8 * MODEL.vocab_size * 4  # the logits
    assert all(x["bytes"] <= largest for x in found.collectives), found.collectives
    check_steps(found)


def test_a_decoding_step_on_a_gpu():
    folder = os.environ.get("FKV_GPU_COMPILER", "")
    if not folder and importlib.util.find_spec("jax_plugins") is None:
        pytest.skip('no compiler for GPUs: pip install "fkv[gpu-compiler]"')
    script = """
from fkv.runs import targets
from tests import test_targets as here
target = targets.find("h100")
for name, rows, dtype in (("foresight", 1, ""), ("full", 8, "int8")):
    where = here.setup(target, cache_dtype=dtype)
    made = here.generation(where, name, rows, budget=0 if name == "full" else 1024)
    here.check_steps(where.compile(made.steps()))
"""
    path = os.pathsep.join(x for x in (str(Path(__file__).parents[1]), folder) if x)
    strict = ("JAX_DEFAULT_MATMUL_PRECISION", "XLA_FLAGS")  # of the other tests
    env = {name: value for name, value in os.environ.items() if name not in strict}
    env |= {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
