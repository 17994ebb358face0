"""Tables of the benchmark's sections, and what is said above and below them."""

import platform

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
    a rollout: the evicted pass twice, the losses once, four passes over the scorers
memory: of the compiled program, its arguments (weights, caches) included
a model that fits into the processor's own cache can pass the roofline of the memory"""


def about(bench: Bench) -> dict:
    chip = jax.devices()[0]
    return {
        "device": chip.device_kind,
        "devices": jax.local_device_count(),
        "backend": chip.platform,
        "machine": platform.machine(),
        "cores": device.cores(),
        "load": device.load(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "model": bench.config.model,
        "random_weights": bench.settings.random_weights,
        "layers": bench.model.layers,
        "parameters": costs.parameters(bench.model),
        "dtype": bench.config.dtype,
        "cache_dtype": bench.config.cache_dtype or bench.config.dtype,
        "budget": bench.config.budget,
        "interval": bench.interval,
        "attention_kernel": bench.config.attention_kernel,
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
        f"medians of {about['repeats']} interleaved repeats (smallest-largest)"
    )


def _bytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 1e9 else f"{count / 2**20:.1f} MiB"


def _not_measured(record: dict) -> str:
    return "no time was left" if record.get("left_out") else "does not fit"


def decode_rows(records):
    head = ["policy", "B", "batch", "length", "tokens/s", "ms p50", "p99", "roofline", "bound",
            "eviction", "memory", "compile s"]  # fmt: skip
    several = len({r["kernel"] for r in records}) > 1
    if several:
        head.insert(4, "kernel")
    measured = [r for r in records if r["fits"]]
    times_full = measured[0].get("times_full") if measured else None
    if times_full:
        head.append("x full at " + " / ".join(times_full))
    rows = []
    for r in records:
        start = [r["policy"], str(r["budget"] or "-"), str(r["batch"]), str(r["length"])]
        if r.get("limited"):
            start[2] += " (the limit)"
        if several:
            start.append(r["kernel"])
        if not r["fits"]:
            rows.append([*start, _not_measured(r), *[""] * (len(head) - len(start) - 1)])
            continue
        low, high = r["tokens_per_s_low"], r["tokens_per_s_high"]
        rows.append(
            [
                *start,
                f"{r['tokens_per_s']:.0f} ({low:.0f}-{high:.0f})",
                f"{r['ms_p50']:.3f}",
                f"{r['ms_p99']:.3f}",
                f"{100 * r['roofline']:.0f} %",
                r["bound"],
                f"{100 * r['eviction']:.1f} %" if r["budget"] else "",
                _bytes(r["program_bytes"]),
                f"{r['compile_s']:.1f}",
            ]
        )
        if times_full:
            rows[-1].append(" / ".join(f"{x:.2f}" for x in r["times_full"].values()))
    return head, rows


def growth_rows(records):
    lengths = list(records[0]["ms_per_token"]) if records else []
    head = ["policy", "B", "batch", *(f"ms at {n}" for n in lengths), "last / first"]
    rows = [
        [
            r["policy"],
            str(r["budget"]),
            str(r["batch"]),
            *(f"{r['ms_per_token'][n]:.3f}" for n in lengths),
            f"{r['growth']:.2f} ({r['growth_low']:.2f}-{r['growth_high']:.2f})",
        ]
        for r in records
    ]
    return head, rows


def _seconds(r: dict) -> str:
    return f"{r['seconds']:.3g} ({r['seconds_low']:.3g}-{r['seconds_high']:.3g})"


def pass_rows(records):
    head = ["policy", "B", "batch", "length", "seconds", "tokens/s", "MFU", "memory", "compile s"]
    rows = []
    for r in records:
        start = [r["policy"], str(r["budget"] or "-"), str(r["batch"]), str(r["length"])]
        if not r["fits"]:
            rows.append([*start, _not_measured(r), *[""] * 4])
            continue
        rows.append(
            [
                *start,
                _seconds(r),
                f"{r['tokens_per_s']:.0f}",
                f"{100 * r['mfu']:.1f} %",
                _bytes(r["program_bytes"]),
                f"{r['compile_s']:.1f}",
            ]
        )
    return head, rows


def step_rows(records):
    head = ["step", "traces", "rows", "length", "seconds", "MFU", "compile s"]
    rows = [
        [r["step"], str(r["traces"]), str(r["rows"]), str(r["length"]), _seconds(r),
         f"{100 * r['mfu']:.1f} %", f"{r['compile_s']:.1f}"]
        for r in records
    ]  # fmt: skip
    return head, rows


def peer_rows(records):
    head = ["who", "cache", "batch", "tokens/s", "ms a step", "ours is faster", "same tokens",
            "held", "prefill s", "first call s"]  # fmt: skip
    rows = []
    for r in records:
        start = [r["who"], r["arm"], str(r["batch"])]
        if "error" in r:
            rows.append([*start, r["error"][:60], *[""] * 6])
            continue
        low, high = r["tokens_per_s_low"], r["tokens_per_s_high"]
        ratio = [f"{r[f'ours_is_faster{x}']:.2f}" for x in ("", "_low", "_high")
                 if f"ours_is_faster{x}" in r]  # fmt: skip
        rows.append(
            [
                *start,
                f"{r['tokens_per_s']:.0f} ({low:.0f}-{high:.0f})",
                f"{r['ms_per_step']:.2f}",
                f"{ratio[0]} ({ratio[1]}-{ratio[2]})" if ratio else "",
                f"{100 * r['same_tokens']:.0f} %" if "same_tokens" in r else "",
                str(r["held"]),
                f"{r['prefill_s']:.3f}",
                f"{r['first_call_s']:.1f}",
            ]
        )
    return head, rows
