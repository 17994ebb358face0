"""Tables of the benchmark's sections, with a header and the formulas behind them."""

import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from fkv.jobs.benchmark import device
from fkv.jobs.benchmark.base import Bench
from fkv.runs import costs

FORMULAS = """\
roofline: the larger of bytes / bandwidth and FLOPs / peak, over the measured time of a step
  bytes a step: every weight once (no input embedding), and the keys, values and positions of all
    slots of every row; FLOPs a step: 2 a weight and row, 4 h d a layer, slot and row
MFU: FLOPs / peak over the measured time
  a pass: 2 a weight of the layers and token, 4 h d a layer, token and entry attended to (half the
    prompt for the full cache, B + L under eviction); labels: 2 h d T²/2 a layer more; a supervised
    step: labels, the evicted pass, the statistics of every eviction, two passes over the scorers;
    a rollout: the evicted pass and its losses once, four passes over the scorers
in forwards: the time over that of `forward`, a pass with the full cache, for as many rows
memory: of the compiled program, with its arguments (weights, caches)
a model that fits into the processor's own cache can exceed the roofline of the memory"""


def about(bench: Bench) -> dict:
    """Model, settings and machine."""
    chip, config = jax.devices()[0], bench.config
    named = ("model", "dtype", "budget", "interval")
    return {
        **{name: config[name] for name in named},
        "device": chip.device_kind,
        "devices": jax.local_device_count(),
        "backend": chip.platform,
        "machine": platform.machine(),
        "cores": device.cores(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else math.nan,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "random_weights": bench.settings.random_weights,
        "layers": bench.lm.config.layers,
        "parameters": costs.parameters(bench.lm.config),
        "cache_dtype": config.cache_dtype or config.dtype,
        "repeats": bench.settings.repeats,
        "peak_flops": bench.peaks.flops,
        "bandwidth": bench.peaks.bandwidth,
        "peaks": bench.peaks.source,
        "peak_memory": device.peak_memory(),
        "memory_limit": bench.limit,
    }


def title(about: dict) -> str:
    memory = about["peak_memory"]
    return (
        f"{about['model']}, {about['parameters'] / 1e6:.2f} M parameters in {about['layers']} "
        f"layers, {about['dtype']}, cache in {about['cache_dtype']}; L = {about['interval']}\n"
        f"{about['devices']} x {about['device']}, {about['cores']} cores, load {about['load']}, "
        f"JAX {about['jax']}\n"
        f"{about['peak_flops'] / 1e9:.0f} GFLOP/s, {about['bandwidth'] / 1e9:.1f} GB/s "
        f"({about['peaks']})\n"
        f"peak memory {memory['bytes'] / 2**30:.2f} GiB ({memory['of']}); "
        f"medians of {about['repeats']} interleaved repeats (min-max)"
    )


# ---- tables

# By header: a format of the record's fields, or a function of the record.
Columns = Mapping[str, str | Callable[[dict], str]]
Table = tuple[list[str], list[list[str]]]


def _table(records: Sequence[dict], first: Columns, rest: Columns) -> Table:
    """Header and rows; an error replaces the `rest` of its row."""

    def cells(record, columns):
        return [x(record) if callable(x) else x.format_map(record) for x in columns.values()]

    rows = []
    for r in records:
        why = [r["error"][:60], *[""] * (len(rest) - 1)] if not r["fits"] else []
        rows.append([*cells(r, first), *(why or cells(r, rest))])
    return [*first, *rest], rows


def _spread(name: str, how: str) -> str:
    """Format of a median and its range."""
    return f"{{{name}:{how}}} ({{{name}_low:{how}}}-{{{name}_high:{how}}})"


def _percent(name: str, digits: int = 0) -> Callable[[dict], str]:
    return lambda r: f"{100 * r[name]:.{digits}f} %" if name in r else ""


def _memory(record: dict) -> str:
    count = record["program_bytes"]
    return f"{count / 2**30:.2f} GiB" if count >= 1e9 else f"{count / 2**20:.1f} MiB"


_ARM = {
    "policy": "{policy}", "B": lambda r: str(r["budget"] or "-"), "batch": "{batch}",
    "length": "{length}",
}  # fmt: skip
_PROGRAM = {"memory": _memory, "compile s": "{compile_s:.1f}"}


def decode_rows(records: Sequence[dict]) -> Table:
    first: dict[str, Any] = {
        **_ARM,
        "batch": lambda r: f"{r['batch']}{' (the limit)' if r.get('limited') else ''}",
    }
    rest = {
        "tokens/s": _spread("tokens_per_s", ".0f"),
        "ms p50": "{ms_p50:.3f}",
        "p99": "{ms_p99:.3f}",
        "roofline": _percent("roofline"),
        "bound": "{bound}",
        "eviction": lambda r: _percent("eviction", 1)(r) if r["budget"] else "",
        **_PROGRAM,
    }
    if full := next((r["times_full"] for r in records if r.get("times_full")), None):
        rest["x full at " + " / ".join(full)] = lambda r: " / ".join(
            f"{x:.2f}" for x in r["times_full"].values()
        )
    return _table(records, first, rest)


def growth_rows(records: Sequence[dict]) -> Table:
    lengths = next((list(r["ms_per_token"]) for r in records if r["fits"]), [])
    first = {name: _ARM[name] for name in ("policy", "B", "batch")}
    marks = {f"ms at {n}": lambda r, n=n: f"{r['ms_per_token'][n]:.3f}" for n in lengths}
    return _table(records, first, {**marks, "last / first": _spread("growth", ".2f")})


_SECONDS = {"seconds": _spread("seconds", ".3g")}


def pass_rows(records: Sequence[dict]) -> Table:
    speed = {"tokens/s": "{tokens_per_s:.0f}", "MFU": _percent("mfu", 1)}
    return _table(records, _ARM, {**_SECONDS, **speed, **_PROGRAM})


def step_rows(records: Sequence[dict]) -> Table:
    first = {name: f"{{{name}}}" for name in ("step", "traces", "rows", "length")}
    rest = {
        **_SECONDS,
        "in forwards": "{forwards:.2f}",
        "MFU": _percent("mfu", 1),
        "compile s": "{compile_s:.1f}",
    }
    return _table(records, first, rest)


def peer_rows(records: Sequence[dict]) -> Table:
    faster = _spread("ours_is_faster", ".2f")
    rest = {
        "tokens/s": _spread("tokens_per_s", ".0f"),
        "ms a step": "{ms_per_step:.2f}",
        "ours is faster": lambda r: faster.format_map(r) if "ours_is_faster" in r else "",
        "same tokens": _percent("same_tokens"),
        "held": "{held}",
        "prefill s": "{prefill_s:.3f}",
        "first call s": "{first_call_s:.1f}",
    }
    return _table(records, {"who": "{who}", "cache": "{arm}", "batch": "{batch}"}, rest)


def queue_rows(records: Sequence[dict]) -> Table:
    def ratio(name):
        how = _spread(name, ".2f")
        return lambda r: how.format_map(r) if name in r else ""

    first = {name: f"{{{name}}}" for name in ("who", "cache", "how", "rows", "requests")}
    rest = {
        **_SECONDS,
        "tokens/s": _spread("tokens_per_s", ".0f"),
        "over its rows": ratio("over_rows"),
        "over our first": ratio("over_ours"),
        "rows in use": lambda r: f"{r['rows_in_use']:.1f}" if "rows_in_use" in r else "",
        "same answers": _percent("same_answers"),
    }
    return _table(records, first, rest)
