"""Peak FLOP/s, bandwidth and memory of the device, by its data sheet or measured."""

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fkv.errors import UserError
from fkv.runs import costs, parallel


@dataclasses.dataclass(frozen=True)
class Peaks:
    """Peak rates of a device.

    Attributes:
      flops, bandwidth: FLOP/s, and bytes/s read from memory.
      source: where the figures are from.
    """

    flops: float
    bandwidth: float
    source: str

    def roofline(self, flops: float, bytes_read: float) -> tuple[float, str]:
        """The least seconds that work takes, and whether it is bound by `memory` or `compute`."""
        by = {"compute": flops / self.flops, "memory": bytes_read / self.bandwidth}
        bound = max(by, key=by.get)
        return by[bound], bound


def peaks(source: str, dtype: str) -> Peaks:
    """Peak rates of this device.

    Args:
      source: `measured`, or a name of `costs.DEVICES` for its data sheet.
    """
    if source in costs.DEVICES:
        device = costs.DEVICES[source]
        return Peaks(device.flops, device.bandwidth, f"data sheet of {source}, bfloat16")
    if source != "measured":
        known = ", ".join(["measured", *costs.DEVICES])
        raise UserError(f"benchmark.peaks = {source!r} must be one of {known}")
    # 256 MiB, or 4 GiB: more than any processor's cache.
    size, side = (2**26, 1024) if parallel.platform() == "cpu" else (2**30, 8192)

    def best(function, *args):
        call = jax.jit(function)
        call(*args).block_until_ready()
        return min(timed(call, *args)[0] for _ in range(5))

    many = jnp.ones((size,), jnp.float32)
    # On a CPU a sum may run on one core, and a copy reads and writes: take the larger.
    bandwidth = max(4 * size / best(jnp.sum, many), 8 * size / best(lambda x: x + 1, many))
    del many
    square = jnp.ones((side, side), dtype)
    flops = 2 * side**3 / best(jnp.matmul, square, square)
    how = f"measured: {size * 4 >> 20} MiB read or copied, {side}² {dtype} matrices multiplied"
    return Peaks(flops, bandwidth, how)


def timed(call: Callable, *args) -> tuple[float, Any]:
    """Seconds until the result of a call is ready, and the result."""
    start = time.perf_counter()
    found = jax.block_until_ready(call(*args))
    return time.perf_counter() - start, found


def memory_limit(given: float = 0.0) -> int:
    """Bytes that programs may use: `given` GiB, else the device's, else 80 % of the host's."""
    if given:
        return int(given * 2**30)
    stats = jax.devices()[0].memory_stats() or {}
    if stats.get("bytes_limit"):
        return stats["bytes_limit"]
    try:
        return int(0.8 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):
        return 8 * 2**30


def peak_memory() -> dict:
    """Peak memory of this process: of the device if it reports any, else of the host."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return {"bytes": stats["peak_bytes_in_use"], "of": "device, whole run"}
    import resource  # not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"bytes": peak * (1 if sys.platform == "darwin" else 1024), "of": "host, whole run"}


def cores() -> int:
    """Processor cores available to this process, and so to JAX and the peers."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def program_bytes(compiled: jax.stages.Compiled) -> int:
    """Peak memory of a compiled program, with its arguments; donated ones count once."""
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return held + memory.temp_size_in_bytes - memory.alias_size_in_bytes
