"""Budget advice from a person's own traces: losses by replay, then what `advice` makes of them."""

import contextlib
import json
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fkv import policies
from fkv.cache.cadence import Cadence
from fkv.data.traces import Traces
from fkv.errors import UserError
from fkv.evaluation import advice, charts, tables
from fkv.evaluation.advice import MORE, Advice, Curve
from fkv.evaluation.recall import GOLDEN
from fkv.files import write_text
from fkv.jobs import common, evaluate, groups, losses
from fkv.jobs.losses import Given
from fkv.jobs.measuring import Job
from fkv.policies.base import Policy
from fkv.runs import costs, parallel, preemption, provenance, rundir
from fkv.runs.rundir import open_run

ALL = "all"
# What a run may be asked for more of; everything else must stay as it was.
MAY_DIFFER = (
    *(name for name in common.other_jobs("advise") if name != "evaluate"),
    *(f"evaluate.{name}" for name in groups.Evaluate.kinds() if not name.startswith("action")),
    "advise", "eval",
)  # fmt: skip


def run(config: ConfigDict, workdir: str) -> list[dict]:
    """The smallest budgets of golden eviction, scorers and policies, on all traces and each group.

    Resumes, and adds policies, budgets and traces to what was measured. Writes `losses.jsonl`,
    `retained.jsonl` and `advice.{txt,md,csv,json,png,pdf}`; returns the JSON's advice.
    """
    groups.check(config, "advise")
    settings = config.advise
    part = ConfigDict(config).copy_and_resolve_references()
    if not (settings.policies or part.evaluate.scorers):
        raise UserError("advise.policies and evaluate.scorers are empty: nothing to advise on")
    part.evaluate.policies, part.evaluate.budgets = settings.policies, settings.budgets
    for name in ("budgets", "percent"):
        if list(settings[name]) != sorted({*settings[name]}) or not settings[name]:
            raise UserError(f"advise.{name} = {settings[name]} must be ascending, at least one")
    _places(config)
    named, inputs = evaluate.policies_of(part)
    at = common.cadences(config, "advise.budgets")
    shape = common.model_config(config)
    what = f"{len(named)} policies", common.said_cadence(config, settings.budgets)
    common.announce("advise", config, workdir, shape, what)
    common.check_policies(config, shape, named, at)
    rundir.check_run(workdir, config, MAY_DIFFER, inputs)
    traces = _traces(config, shape.vocab_size)
    model = common.load_language_model(config, separate=False)
    inputs |= common.language_inputs(model)
    given, group_n = _together(traces)
    opened = open_run(workdir, config, MAY_DIFFER, inputs)
    opened.resume({})
    with preemption.noticed() as asked_to_end:
        job = Job(config, opened, model, named, asked_to_end)
        curves = _curves(job, given, at, _parts(group_n))
        heads = _heads(job, given, curves, at) if settings.heads else {}
    found = _advice(job, traces, curves, heads, group_n)
    if parallel.first():
        _write(job, found, curves, group_n)
    opened.close()
    return found


# ---- traces


def _places(config: ConfigDict) -> dict[str, str]:
    """Where the traces of each group are, by its name."""
    if not config.advise.groups:
        return {ALL: config.data.eval_path}
    found = {}
    for entry in config.advise.groups:
        name, _, path = entry.partition("=")
        if not name or not path or name == ALL:
            raise UserError(
                f"advise.groups: {entry!r} must be of the form name=traces, with a name other than "
                f"{ALL!r}"
            )
        if name in found:
            raise UserError(f"advise.groups: {name!r} is given twice")
        found[name] = path
    return found


def _traces(config: ConfigDict, vocabulary: int) -> dict[str, Traces]:
    """The traces of each group, by its name."""
    found, least = {}, min(config.advise.budgets)
    for name, path in _places(config).items():
        part = ConfigDict(config).copy_and_resolve_references()
        part.data.eval_path = path
        where = f"advise.groups: {name}={path}" if config.advise.groups else "advise"
        with common.of_field(where):
            count = config.advise.traces
            found[name] = common.load_traces(part, "eval", count, least, vocabulary)
            if len(found[name]) < 2:
                raise UserError("an interval over traces needs at least two that are long enough")
    return found


def _together(traces: dict[str, Traces]) -> tuple[Given, np.ndarray]:
    """The traces of all groups, and the group of each."""
    names = [f"{name}/{digest}" for name, x in traces.items() for digest in x.digests()]
    width = max(x.token_nt.shape[1] for x in traces.values())
    pad = [np.pad(x.token_nt, ((0, 0), (0, width - x.token_nt.shape[1]))) for x in traces.values()]
    others = (
        [getattr(x, f) for x in traces.values()] for f in ("length_n", "prompt_n", "padded_n")
    )
    group_n = np.repeat(list(traces), [len(x) for x in traces.values()])
    return Given(Traces(np.concatenate(pad), *map(np.concatenate, others)), names), group_n


def _parts(group_n: np.ndarray) -> dict[str, np.ndarray]:
    """Indices of the traces of each group, and of all."""
    names = list(dict.fromkeys(group_n.tolist()))
    found = {name: np.flatnonzero(group_n == name) for name in names if len(names) > 1}
    return {ALL: np.arange(len(group_n)), **found}


# ---- measuring


def _curves(job: Job, given: Given, at: Sequence[Cadence], parts) -> dict[str, Curve]:
    """Losses added by golden eviction and every policy, at the ladder and where it is halved."""
    settings, interval = job.config.advise, job.config.interval
    store = losses.measure(job, given, at)
    budgets = {name: {c.budget for c in at} for name in (GOLDEN, *job.named)}
    for turn in range(settings.halvings + 1):
        curves = {name: _curve(store, name, budgets[name], at[0], given) for name in budgets}
        wanted = {}
        for name, curve in curves.items():
            for rows in parts.values():
                for limit in settings.percent:
                    new = advice.halfway(curve.take(rows), limit, interval)
                    if new is not None and turn < settings.halvings:
                        wanted.setdefault(new, []).append(name)
        for budget, names in sorted(wanted.items()):
            some = {name: p for name, p in job.named.items() if name in names}
            part = _with(job, some)
            store = losses.measure(part, given, [common.cadence(job.config, budget)])
            for name in (GOLDEN, *some):  # golden eviction comes with every pass
                budgets[name].add(budget)
        if not wanted:
            break
    return curves


def _with(job: Job, named: dict[str, Policy]) -> Job:
    return Job(job.config, job.run, job.model, named, job.asked_to_end)


def _curve(store, name: str, budgets, least: Cadence, given: Given) -> Curve:
    """Of the tokens that count at the least budget, at all budgets alike."""

    def nats(name, budget, what):
        return np.array([store.rows[name, budget, x][what][0] for x in given.names])

    excess = {b: nats(name, b, "nll") - nats(name, b, "full") for b in sorted(budgets)}
    return Curve(excess, nats(GOLDEN, least.budget, "full"))


def _heads(job: Job, given: Given, curves: dict[str, Curve], at: Sequence[Cadence]) -> dict:
    """Budgets per layer and KV head, by policy and limit, with what they add where it is measured.

    Returns:
      (budgets [layers, KV heads], Curve with one budget, or None for golden eviction and policies
      that can't be wrapped).
    """
    settings, some = job.config.advise, given.first(job.config.advise.heads)
    asked = {
        (name, x): float(advice.smallest(c.budgets, c.percent(), x))
        for name, c in curves.items() for x in settings.percent
    }  # fmt: skip
    extra = {int(budget) for budget in asked.values() if budget != MORE}
    ladder = sorted({c.budget for c in at} | extra)
    longest = some.traces.length_n.max()
    ladder = [b for b in ladder if b + job.config.interval < longest]
    cadences = [common.cadence(job.config, b) for b in ladder]
    held = losses.measure_retained(job, some, cadences)
    found, kept = {}, {}
    for (name, limit), smallest in asked.items():
        if smallest == MORE or smallest not in ladder:
            continue
        # On the traces long enough for the largest budget, so that all are of the same traces.
        shares = {b: losses.shares(held, name, b, some.names) for b in ladder}
        whole = ~np.isnan(np.stack([x.mean((1, 2)) for x in shares.values()])).any(0)
        if not whole.any():
            continue
        lost = {b: 1 - x[whole].mean(0) for b, x in shares.items()}
        budget_yk = advice.per_head(lost, float(lost[int(smallest)].sum()))
        found[name, limit] = budget_yk, None
        if name in job.named:
            digest = provenance.of_arrays(budget_yk.astype("<i4"))[:8]
            array, most = jnp.asarray(budget_yk, jnp.int32), int(budget_yk.max())
            with contextlib.suppress(UserError):  # some can't be wrapped
                uneven = policies.Uneven(job.named[name], budget_yk=array, most=most)
                kept[name, limit] = f"{name} by head {digest}", uneven
    if kept:
        store = losses.measure(_with(job, dict(kept.values())), given, at[:1])
        for cell, (label, _) in kept.items():
            found[cell] = found[cell][0], _curve(store, label, {at[0].budget}, at[0], given)
    return found


# ---- what is written


def _advice(job: Job, traces: dict[str, Traces], curves, heads, group_n) -> list[dict]:
    """JSON data: for each group, policy and limit."""
    config, shape, found = job.config, job.model.config, []
    length_n = np.concatenate([x.length_n for x in traces.values()])
    for group, rows in _parts(group_n).items():
        length = round(float(length_n[rows].mean()))
        full = costs.cache_bytes(shape, length, config.dtype)
        for name, curve in curves.items():
            for limit in config.advise.percent:
                one = advice.advise(curve.take(rows), limit)
                row = {"group": group, "traces": len(rows), "policy": name, "percent": limit}
                row |= _said(one)
                if one.budget != MORE:
                    policy = job.named.get(name, policies.get("knorm"))
                    cadence = common.cadence(config, int(one.budget))
                    size = costs.evicted_bytes(shape, policy, cadence, config.dtype)
                    row |= {"cache_bytes": size, "share_of_full": size / full}
                    row["paste"] = f"--config.budget={int(one.budget)}"
                if group == ALL and (name, limit) in heads:
                    row["heads"] = _of_heads(*heads[name, limit], limit)
                found.append(row)
    return found


def _said(one: Advice) -> dict:
    ends = (one.budget, one.low, one.high)
    budget, low, high = (None if x == MORE else int(x) for x in ends)
    added = dict(zip(("value", "low", "high"), one.added, strict=True)) if one.added else None
    return {
        "budget": budget, "low": low, "high": high, "said": one.said(one.budget),
        "interval": " to ".join(dict.fromkeys((one.said(one.low), one.said(one.high)))),
        "added_percent": added,
        "least_measured": one.least, "most_measured": one.most,
    }  # fmt: skip


def _of_heads(budget_yk: np.ndarray, curve: Curve | None, limit: float) -> dict:
    added = within = None
    if curve is not None:
        low, high = curve.ends()[:, 0].tolist()
        added = {"value": float(curve.percent()[0]), "low": low, "high": high}
        within = added["value"] <= limit
    return {
        "mean": float(budget_yk.mean()), "budgets": budget_yk.tolist(), "added_percent": added,
        "within": within,
    }  # fmt: skip


HEAD = (
    "traces", "policy", "within", "smallest budget", "95 % interval", "added there, %",
    "cache, KiB", "of full, %", "by head: mean budget", "added by them, %",
)  # fmt: skip


def _cells(row: dict) -> list[str]:
    def added(x):
        return "{value:.2f} ({low:.2f} to {high:.2f})".format(**x) if x else ""

    heads = row.get("heads", {})
    size = row.get("cache_bytes")
    return [
        row["group"], row["policy"], f"{row['percent']:g} %", row["said"], row["interval"],
        added(row["added_percent"]),
        "" if size is None else f"{size / 2**10:,.0f}",
        "" if size is None else f"{100 * row['share_of_full']:.1f}",
        f"{heads['mean']:.0f}" if heads else "", 
        added(heads.get("added_percent")) + ", too much" * (heads.get("within") is False),
    ]  # fmt: skip


def _write(job: Job, found: list[dict], curves: dict[str, Curve], group_n) -> None:
    config, path = job.config, job.run.path
    measured = sorted({b for c in curves.values() for b in c.budgets})
    note = (
        f"{config.model}, L = {config.interval}, {len(group_n)} traces. Smallest budget: of those "
        f"measured ({', '.join(map(str, measured))}), from which on all add at most so much to the "
        "full cache's loss, on the tokens that the smallest of them could harm; intervals are a "
        "bootstrap's over traces. Cache: of a row, and its share of a full cache of the traces' "
        "mean length. By head: budgets per layer and KV head that lose no more attention in all; "
        "what they add is measured, but for golden eviction, which is hindsight."
    )
    names = ("low", "high", "least_measured", "most_measured", "cache_bytes", "share_of_full")
    head = ("group", "policy", "percent", "budget", *names, "added", "heads_mean", "heads_added")
    rows = []
    for row in found:
        added, heads = row["added_percent"] or {}, row.get("heads", {})
        last = (
            added.get("value"),
            heads.get("mean"),
            (heads.get("added_percent") or {}).get("value"),
        )
        rows.append([*(row.get(x) for x in (*head[:4], *names)), *last])
    csv = tables.comma_separated(head, rows)
    table = tables.write(path / "advice", HEAD, [_cells(row) for row in found], csv, note)
    data = {"model": config.model, "interval": config.interval, "note": note, "advice": found}
    write_text(path / "advice.json", json.dumps(data, indent=1) + "\n")
    parts = {
        group: {name: curve.take(rows) for name, curve in curves.items()}
        for group, rows in _parts(group_n).items()
    }
    charts.advice(parts, config.advise.percent, path / "advice.png")
    common.say(f"\n{table}\n\n{note}\nwritten to {path}: advice.(txt md csv json png pdf)")
