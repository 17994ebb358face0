"""What a device can do, by table or measured on the spot, and what is in use."""

import dataclasses
import math
import os
import sys
import time

import jax
import jax.numpy as jnp

from fkv import models
from fkv.errors import UserError
from fkv.keys import Purpose, key_of
from fkv.models import ModelConfig
from fkv.runs import costs, parallel


def random_weights(config: ModelConfig, dtype: str, seed: int = 0) -> models.Params:
    """Random parameters of a shape, drawn on the device."""
    cast = jax.jit(
        lambda key: jax.tree.map(lambda x: x.astype(dtype), models.init(key, config)),
    )
    return cast(key_of(seed, Purpose.MODEL))


@dataclasses.dataclass(frozen=True)
class Peaks:
    """The most that a device does in a second.

    Attributes:
      flops, bandwidth: FLOP/s, and bytes/s read from memory.
      source: where the figures are from.
    """

    flops: float
    bandwidth: float
    source: str

    def roofline(self, flops: float, bytes_read: float) -> tuple[float, str]:
        """Seconds that work can't beat, and whether `memory` or `compute` sets them."""
        by = {"compute": flops / self.flops, "memory": bytes_read / self.bandwidth}
        bound = max(by, key=by.get)
        return by[bound], bound


def peaks(source: str, dtype: str, repeats: int = 5) -> Peaks:
    """What the device can do.

    Args:
      source: `measured`, or a name of `costs.DEVICES` for what its maker says.
    """
    if source in costs.DEVICES:
        device = costs.DEVICES[source]
        return Peaks(device.flops, device.bandwidth, f"data sheet of {source}, bfloat16")
    if source != "measured":
        known = ", ".join(["measured", *costs.DEVICES])
        raise UserError(f"benchmark.peaks = {source!r} must be one of {known}")
    on_cpu = parallel.platform() == "cpu"
    size, side = (2**26, 1024) if on_cpu else (2**30, 8192)

    def best(function, *args):
        function(*args).block_until_ready()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            function(*args).block_until_ready()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    many = jnp.ones((size,), jnp.float32)  # 256 MiB, or 4 GiB: more than any processor's cache
    read = size * 4 / best(jax.jit(jnp.sum), many)
    # A sum on the CPU may run on one core, a copy reads and writes: take what is larger.
    copied = 2 * size * 4 / best(jax.jit(lambda x: x + 1), many)
    del many
    square = jnp.ones((side, side), dtype)
    work = 2 * side**3 / best(jax.jit(jnp.matmul), square, square)
    return Peaks(work, max(read, copied), f"measured: {size * 4 >> 20} MiB read or copied, {side}² "
                 f"{dtype} matrices multiplied")  # fmt: skip


def memory_limit(given: float = 0.0) -> int:
    """Bytes that programs may use: `given` GiB, else the device's, else 80 % of the host's."""
    if given:
        return int(given * 2**30)
    stats = jax.devices()[0].memory_stats()
    if stats and stats.get("bytes_limit"):
        return stats["bytes_limit"]
    try:
        pages = os.sysconf("SC_AVPHYS_PAGES")
        return int(0.8 * pages * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):
        return 8 * 2**30


def peak_memory() -> dict:
    """The most that this process has used: of the device where it says, else of the host."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return {"bytes": stats["peak_bytes_in_use"], "of": "device, whole run"}
    import resource  # not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"bytes": peak * (1 if sys.platform == "darwin" else 1024), "of": "host, whole run"}


def cores() -> int:
    """Processor cores that this process may use, as JAX and the peers do."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def load() -> float:
    """Processes that wanted to run in the last minute, on average; nan where unknown."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else math.nan


def program_bytes(compiled) -> int:
    """What a compiled program holds at its peak, arguments included; donated ones count once."""
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
