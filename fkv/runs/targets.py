"""What programs are compiled for: the devices that are here, or others, without having one.

Compilers need no device. For TPUs it is libtpu, and for NVIDIA GPUs XLA's plugin with NVIDIA's
assembler, without autotuning, cuBLAS and cuDNN: kernels and workspaces differ from those of a card.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from fkv.errors import UserError
from fkv.runs import costs, hlo

TPU, GPU = 'pip install "fkv[tpu]"', 'pip install "fkv[gpu-compiler]"'
# As cloud offers name them, by the start of what JAX calls their devices.
_TPUS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
_LARGEST = {"v5e": 256, "v5p": 8960, "v6e": 256}  # slices, in chips
_CLOCKS = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}  # cycles per second
_GPUS = {  # what the compiler has to know of a card, beside what all three share
    "a100": dict(
        cores=108, shared=166_912, per_core=167_936, fpus=64, bandwidth=2_039_000_000_000,
        l2=41_943_040, clock=1.41, memory=85_174_583_296, capability=8,
        name="NVIDIA A100-SXM4-80GB",
    ),
    "h100": dict(
        cores=132, shared=232_448, per_core=233_472, fpus=128, bandwidth=3_352_320_000_000,
        l2=52_428_800, clock=1.98, memory=84_942_979_072, capability=9,
        name="NVIDIA H100 80GB HBM3",
    ),
    "h200": dict(
        cores=132, shared=232_448, per_core=233_472, fpus=128, bandwidth=4_890_000_000_000,
        l2=62_914_560, clock=1.98, memory=150_110_011_392, capability=9, name="NVIDIA H200",
    ),
}  # fmt: skip
# What an H100 reached: a copy and a product against the data sheet, and the time between kernels of
# a decoding step beyond that of their bytes (RESULTS.md, "On an H100").
_REACHED, _KERNEL = {"bandwidth": 0.86, "flops": 0.75}, 1.5e-6
_GPU_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared}
  shared_memory_per_core: {per_core} registers_per_core_limit: 65536
  registers_per_block_limit: 65536 core_count: {cores} fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock}
  device_memory_size: {memory} cuda_compute_capability {{ major: {capability} }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{name}"
"""
KNOWN = "cpu, v5e:2x2 (or v5p, v6e; any slice), h100, h200, a100, or h100:8 for several"


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
      name: as the user gives it.
      devices: of JAX, all of them.
      sheet: of a device, where it is known.
      clock: of a TPU, in cycles per second; 0 for others.
      on_chip: bytes of intermediates that a GPU's L2 cache is taken to hold.
      rates: of a GPU, whose compiler estimates no times.
      options: of the compiler.
      present: whether the devices are here.
    """

    name: str
    devices: tuple
    sheet: costs.Device | None
    clock: float = 0.0
    on_chip: int = 0
    rates: hlo.Rates | None = None
    options: dict = dataclasses.field(default_factory=dict)
    present: bool = False

    @property
    def platform(self) -> str:
        """`cpu`, `gpu` or `tpu`."""
        return self.devices[0].platform

    @property
    def hosts(self) -> int:
        return len({device.process_index for device in self.devices})

    def compile(self, lowered: jax.stages.Lowered) -> "Compiled":
        """The program for this target.

        Raises:
          DoesNotFitError: it needs more memory than a TPU has.
        """
        try:
            with _cache(self.present):
                compiled = lowered.compile(compiler_options=self.options or None)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise DoesNotFitError(_used(str(error))) from None
        return Compiled(compiled, self)


class DoesNotFitError(Exception):
    """A program that needs more memory than its device has; the message says how much."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program, and what is known of it."""

    program: jax.stages.Compiled
    target: Target

    @property
    def memory(self) -> Any:
        """XLA's account: `argument_size_in_bytes`, `temp_size_in_bytes` and so on, of a device."""
        return self.program.memory_analysis()

    @property
    def temporaries(self) -> int:
        return self.memory.temp_size_in_bytes

    @property
    def peak(self) -> int:
        """Bytes with its arguments; donated ones count once."""
        memory = self.memory
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes
        return held + memory.temp_size_in_bytes - memory.alias_size_in_bytes

    def count(self, never: Sequence[str] = (), trips: int = 1) -> hlo.Counted:
        """Bytes, FLOPs and more, loops times their trips; see `hlo.count`."""
        target, text = self.target, self.program.as_text()
        assumed = hlo.Assumed(tuple(never), trips)
        return hlo.count(text, target.clock or 1.0, target.on_chip, target.rates, assumed)


def find(name: str = "", at_least: int = 1) -> Target:
    """A target by its name; by default the devices that are here.

    Args:
      at_least: devices that a process needs; of a CPU JAX can make as many.

    Raises:
      UserError: the name is unknown, or the compiler is not installed.
    """
    kind, _, shape = name.partition(":")
    if at_least > 1 and name in ("", "cpu"):
        with contextlib.suppress(RuntimeError):  # JAX has its devices already
            jax.config.update("jax_num_cpu_devices", at_least)
    if not name:
        devices = tuple(jax.devices())
        sheet = sheet_of(devices[0].device_kind)
        rates = _rates(sheet) if devices[0].platform == "gpu" else None
        return Target(devices[0].device_kind, devices, sheet, rates=rates, present=True)
    if name == "cpu":
        return Target("cpu", tuple(jax.devices("cpu")[:at_least]), None, present=True)
    if kind in _TPUS and re.fullmatch(r"(\d+x\d+(x\d+)?)?", shape):
        return _tpu(name, kind, shape)
    if kind in _GPUS and re.fullmatch(r"[1-9]\d{0,2}", shape or "1"):
        return _gpu(name, kind, int(shape or 1))
    raise UserError(f"target = {name!r} must be one of: {KNOWN}")


def sheet_of(kind: str) -> costs.Device | None:
    """The data sheet of a device by its `device_kind`."""
    for name, other in _TPUS.items():
        if kind == other:
            return costs.DEVICES[f"TPU {name}"]
    known = [name for name in costs.DEVICES if re.search(rf"\b{name}\b", kind)]
    return costs.DEVICES[known[0]] if known else None


def _tpu(name: str, kind: str, shape: str) -> Target:
    if shape and math.prod(map(int, shape.split("x"))) > _LARGEST[kind]:
        raise UserError(f"target = {name!r}: a slice of {kind} has at most {_LARGEST[kind]} chips")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"target = {name!r} needs the compiler for TPUs: {TPU}")
    one_host = "2x2x1" if kind == "v5p" else "2x2"
    # A slice of eight may be one machine, on which a model can be split eight ways.
    bounds = [2, 4, 1] if shape == "2x4" else [2, 2, 1]
    stand_ins = {
        "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_ACCELERATOR_TYPE": {"v5e": "v5litepod-4"}.get(
            kind, f"{kind}-4"),
    }  # fmt: skip
    for variable, value in stand_ins.items():
        os.environ.setdefault(variable, value)
    topology = f"{kind}:{shape or one_host}"
    devices = _devices(name, "tpu", topology, chips_per_host_bounds=bounds)
    # Of a chip alone, the first of a machine.
    devices = devices if shape else devices[:1]
    return Target(name, devices, costs.DEVICES[f"TPU {kind}"], _CLOCKS[kind])


def _gpu(name: str, kind: str, count: int) -> Target:
    plugins, root = importlib.util.find_spec("jax_plugins"), _assembler()
    found = plugins and [
        x for path in plugins.submodule_search_locations for x in Path(path).glob("xla_cuda*")
    ]
    if not found or root is None:
        raise UserError(f"target = {name!r} needs the compiler for GPUs: {GPU}")
    config = _GPU_CONFIG.format(**_GPUS[kind])
    devices = _devices(name, "cuda", "", target_config=config, topology=f"1x1x{count}")
    options = {"xla_gpu_autotune_level": 0, "xla_gpu_cuda_data_dir": str(root)}
    sheet = costs.DEVICES[kind.upper()]
    return Target(name, devices, sheet, 0.0, _GPUS[kind]["l2"] // 4, _rates(sheet), options)


def _rates(sheet: costs.Device | None) -> hlo.Rates | None:
    """What a GPU is taken to reach."""
    reached = {name: share * getattr(sheet, name) for name, share in _REACHED.items() if sheet}
    return hlo.Rates(**reached, kernel=_KERNEL) if reached else None


def _assembler() -> Path | None:
    """Where pip has put NVIDIA's assembler, of CUDA 12 or 13."""
    for package in ("nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvcc"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            for file in importlib.metadata.files(package) or ():
                if file.name == "ptxas":
                    return Path(file.locate()).parents[1]
    return None


def _devices(name: str, platform: str, slice_: str, **options) -> tuple:
    if not jax.config.jax_platforms:  # JAX would look for the compiler's devices, and complain
        jax.config.update("jax_platforms", "cpu")
    try:
        found = topologies.get_topology_desc(slice_, platform, **options)
    except (jax.errors.JaxRuntimeError, NotImplementedError, RuntimeError) as error:
        why = str(error).strip().splitlines()[0]
        raise UserError(f"target = {name!r}: the compiler refuses it ({why})") from None
    return tuple(found.devices)


def _used(message: str) -> str:
    """What an error of the TPU's compiler says of memory."""
    pair = r"([\d.]+\w)"
    for form in (rf"Used {pair} of {pair} hbm", rf"\({pair}\) exceeds available HBM \({pair}\)"):
        if found := re.search(form, message):
            return f"needs {found[1]}iB of {found[2]}iB"
    return message.splitlines()[0][:200]


@contextlib.contextmanager
def _cache(use: bool):
    """With or without JAX's cache of programs, which can't read those for absent devices."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", before and use)
    compilation_cache.reset_cache()  # it remembers whether it is in use
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
