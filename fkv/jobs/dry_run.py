"""Memory, bytes, FLOPs and time of a job before it runs: its programs, compiled for a target."""

import dataclasses
import functools
import json
import os
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fkv import api, files, kinds, policies
from fkv.cache.cadence import FULL
from fkv.engine import reading
from fkv.engine.requests import Plan
from fkv.engine.sampling import Sampling, never
from fkv.errors import UserError
from fkv.evaluation import tables
from fkv.jobs import answering, common, compiled, groups, programs
from fkv.jobs.benchmark import passes
from fkv.jobs.compiled import Found, Program, on_device
from fkv.models import LM, ModelConfig
from fkv.models.decoder import MODEL
from fkv.policies.base import Policy
from fkv.runs import costs, parallel, targets
from fkv.runs.targets import Target
from fkv.tasks import ledger

SHARE = 0.4  # of the peak FLOP/s, as is typical
DEVICES = ("TPU v5e", "TPU v6e", "H100", "H200")  # whose bounds are shown without a target


@dataclasses.dataclass(frozen=True)
class Setup:
    """What every part of a dry run needs.

    Attributes:
      mesh: of all devices of the target.
    """

    job: str
    config: ConfigDict
    model: ModelConfig
    target: Target
    mesh: Mesh

    def lm(self, mesh: Mesh, separate: bool) -> LM:
        """Shapes of the language model on a mesh, with stacked or separate layers."""
        return programs.model_shapes(self.model, jnp.dtype(self.config.dtype), mesh, separate)

    def compile(self, program: Program) -> Found:
        common.say(f"compiling for {self.target.name}: {program.name}")
        return compiled.compile_for(self.target, program)


def run(job: str, config: ConfigDict) -> str:
    """Prints what `launch.<job>` with this config takes on its target; allocates nothing.

    It writes nothing either, but figures as JSON to the file `dry_run_json`, if that is set.

    Raises:
      UserError: the config is wrong, the target or its compiler is absent, or the job has no dry
        run.
    """
    known = {
        "sft": _training, "grpo": _training, "evaluate": _answers, "traces": _answers,
        "generate": _answers, "benchmark": _benchmark,
    }  # fmt: skip
    if job not in known:
        raise UserError(f"launch.{job} has no dry run; {', '.join(known)} have")
    groups.check(config, job)
    for name in ("target", "dry_run_json"):
        kinds.check(name, config.get(name, ""), kinds.TEXT)
    path = config.get("dry_run_json", "")
    if path and not os.access(files.expand(path).parent, os.W_OK):  # before minutes of compiling
        raise UserError(f"dry_run_json = {path!r}: its directory is absent or can't be written to")
    if job == "traces" and config.traces.text:
        raise UserError("launch.traces has no dry run for traces.text, which runs no model")
    if job == "evaluate" and not config.evaluate.benchmark:
        raise UserError("launch.evaluate has a dry run of answers, and evaluate.benchmark is empty")
    cadence = common.cadence(config)
    if job == "benchmark" and config.benchmark.random_weights:
        shape = costs.shape_of(common.model_path(config), config.benchmark.layers)
        model = common.as_configured(config, shape)
    else:
        model = common.model_config(config)
    target = targets.find(config.get("target", ""), config.model_axis)
    mesh = parallel.make_mesh(config.model_axis, devices=target.devices)
    setup = Setup(job, config, model, target, mesh)
    head = (
        f"launch.{job}, {config.model}: {costs.parameters(model) / 1e6:,.2f} million parameters in "
        f"{config.dtype}, cache in {config.cache_dtype or config.dtype}, B = {cadence.budget}, "
        f"L = {cadence.interval}; for {_devices(mesh)} ({target.name}"
        f"{f', {target.hosts} hosts' if target.hosts > 1 else ''})"
    )
    found, lines = known[job](setup)
    usable = f"{costs.USABLE:.0%} of the memory taken as usable; " if target.sheet else ""
    lines = [head, *lines, "", *compiled.notes(found), _caveat(target, usable)]
    text = "\n".join(lines)
    common.say(text)
    if config.get("dry_run_json"):
        about = {
            "job": job, "model": config.model, "dtype": config.dtype, "target": target.name,
            "cache_dtype": config.cache_dtype, "budget": cadence.budget,
            "interval": cadence.interval, "devices": mesh.size, "hosts": target.hosts,
            "model_axis": config.model_axis,
        }  # fmt: skip
        data = json.dumps({**about, "programs": [one.data for one in found]}, indent=1)
        files.write_text(files.expand(config.dry_run_json), data + "\n")
    return text


def _caveat(target: Target, usable: str) -> str:
    where = "compiled, not measured"
    if target.platform == "tpu":
        where += "; estimates are the compiler's"
    elif target.platform == "gpu":
        where += "; estimates are by what an H100 reached" + (
            "" if target.present else ": without a card the compiler tunes nothing and lacks cuBLAS"
        )
    return f"({usable}{where})"


# ---- training


def _training(setup: Setup) -> tuple[list[Found], list[str]]:
    config, mesh, target = setup.config, setup.mesh, setup.target
    stage = programs.stage(setup.job, config, setup.model, mesh)
    tokens, why = _trace_length(config, setup.model)
    interval, at_least = config.interval, stage.plan.cadence.slots
    lengths, found = [tokens], [setup.compile(_step(setup, stage, tokens))]
    # Memory is linear in the length, so a second one says what fits.
    while target.sheet and sum(one.fits is not None and bool(one.bytes) for one in found) < 2:
        shorter = tokens // 2 ** len(found) // interval * interval
        if shorter <= at_least or len(found) > 4:
            break
        lengths.append(shorter)
        found.append(setup.compile(_step(setup, stage, shorter)))
    rows, flops = stage.device_rows(mesh), stage.rows * stage.flops(tokens)
    if setup.job == "grpo":  # and the losses of the full cache
        full = costs.pass_flops(setup.model, tokens) + costs.unembedding_flops(setup.model, tokens)
        flops += stage.traces * full
    lines = [
        f"traces of {tokens:,} tokens ({why}); {stage.rows} rows a step, micro-batches of {rows} "
        "on each group of devices that holds a model",
        "",
        compiled.memory_table(found),
        "",
        compiled.work_table(found, "a micro-batch, on a device"),
        "",
    ]
    compiled_at = zip(lengths, found, strict=True)
    points = [(n, one.memory["total"]) for n, one in compiled_at if one.bytes]
    if target.sheet and len(points) > 1:
        longest = costs.largest(sorted(points)[:2], target.sheet.memory, interval)
        lines.append(f"longest trace that fits: {longest:,} tokens")
    steps, parts = stage.plan.steps, stage.plan.micro_batches
    if target.sheet:
        best = flops / target.sheet.flops / mesh.size
        times = f"a step: {best:.3g} s at the peak, {best / SHARE:.3g} s at {SHARE:.0%} of it"
        if found[0].seconds:
            times += f", {found[0].seconds * parts:.3g} s by the estimate"
        lines.append(f"{times}; {steps:,} steps")
        return found, lines
    times = []
    for name in DEVICES:
        best = flops / costs.DEVICES[name].flops / mesh.size
        seconds = (best, best / SHARE, best / SHARE * steps / 3600)
        times.append([name, *(f"{x:.3g}" for x in seconds)])
    head = ("by its data sheet", "s a step, at the peak", "at 40 %", "hours, at 40 %")
    lines += [
        f"a step: {flops:.3g} operations, {steps:,} steps", "", tables.text(head, times), "",
        f"whether it fits, and bytes: --config.target=NAME, {targets.KNOWN}",
    ]  # fmt: skip
    return found, lines


def _step(setup: Setup, stage: programs.Stage, tokens: int, name: str = "") -> Program:
    """The step of a stage, as `parallel.pmap` maps it over the devices."""
    mesh, lm = setup.mesh, setup.lm(setup.mesh, separate=False)
    rows, state = stage.device_rows(mesh), jax.eval_shape(stage.init)
    token = jax.ShapeDtypeStruct((rows * parallel.device_count(mesh), tokens), jnp.int32)
    batch = jax.eval_shape(stage.batch, token)
    held = {
        "language model": on_device(lm),
        "scorers, optimiser": on_device(state),
        "batch": on_device(batch) // parallel.device_count(mesh),
    }
    lower = functools.partial(parallel.lower, stage.step, mesh, (state, lm), (batch,))
    flops = rows * stage.flops(tokens) / mesh.shape[MODEL]
    name = f"{name or setup.job}, {rows} x {tokens:,} tokens"
    return Program(name, lower, held, 0, flops, arrays=compiled.named(lm.params))


def _trace_length(config: ConfigDict, model: ModelConfig) -> tuple[int, str]:
    """Padded length of the longest trace, and its source."""
    if config.data.path and not files.expand(config.data.path).exists():
        field = "length" if config.traces.text else "new_tokens"
        tokens = config.traces[field]
        why = f"traces.{field}; there are none at {config.data.path} yet"
    else:
        found = common.load_traces(
            config, "train", config.data.traces, config.budget, model.vocab_size
        )
        tokens, why = int(found.padded_n.max()), "the longest one"
    if tokens <= config.budget + config.interval:
        raise UserError(
            f"traces of {tokens} tokens ({why}) are not longer than budget + interval = "
            f"{config.budget + config.interval}"
        )
    return _up(tokens, config.interval), why


# ---- generation


@dataclasses.dataclass(frozen=True)
class Arm:
    """A policy to generate with.

    Attributes:
      budget: `FULL` without eviction.
      rows, prompt, new_tokens: at a time: tokens of a row's prompt, and the most that it adds.
    """

    name: str
    policy: Policy
    budget: int
    rows: int
    prompt: int
    new_tokens: int

    @property
    def label(self) -> str:
        return f"{self.name} {self.budget or ''}".strip() + f", batch {self.rows}"

    @property
    def slots(self) -> str:
        """Of a full cache, for labels."""
        return "" if self.budget else f", {self.prompt + self.new_tokens:,} slots"


class Generation:
    """The programs of an arm, for shapes."""

    def __init__(self, setup: Setup, arm: Arm, sampling: Sampling):
        self.arm, self.model = arm, setup.model
        # Decoding takes one copy of the model.
        mesh = Mesh(setup.mesh.devices[:1], setup.mesh.axis_names)
        plan = Plan(common.cadence(setup.config, arm.budget), sampling, (0,))
        lm, shape = setup.lm(mesh, separate=True), (arm.rows, arm.prompt)
        self.decode = programs.decode(lm, arm.policy, plan, shape, arm.new_tokens, mesh)
        state, layers = self.decode.state, lm.params["layers"]
        self.slots = self.decode.room  # and a ring, which a step does not need
        if arm.policy.evicts:
            self.slots = state.caches[0].position_bks.shape[-1]
        self.held = {
            "language model": on_device(lm), "caches": on_device(state.caches),
            "queries": on_device(state.asked),
        }  # fmt: skip
        top = {name: x for name, x in lm.params.items() if name != "layers"}
        self.arrays = compiled.named((top, layers[0])) | compiled.named(state.caches[0], "cache: ")
        self.shared, self.dtype = mesh.shape[MODEL], setup.config.dtype
        self.never = never(sampling, self.model.vocab_size)

    def steps(self) -> Program:
        """`L` decoding steps; figures are of one."""
        moved, flops = (
            of(self.model, self.arm.rows, self.slots, *more) / self.shared
            for of, more in ((costs.decode_bytes, (self.dtype,)), (costs.decode_flops, ()))
        )
        name, interval = self.arm.label + self.arm.slots, self.decode.plan.cadence.interval
        made = Program(name, self.decode.steps, self.held, moved, flops, interval, self.arrays)
        return dataclasses.replace(made, never=self.never)

    def border(self) -> Program:
        """Of one layer, after every `L` steps: an eviction, or the ring of a full cache moves."""
        name = f"{self.arm.label}: {'eviction' if self.arm.budget else 'border'}"
        return Program(name, self.decode.evict_layer, self.held, 0, 0, arrays=self.arrays)

    def reading(self) -> list[Program]:
        """Of one layer: the first and the last piece of prompts, and what gives them rows."""
        arm, made, read = self.arm, self.decode, on_device(self.decode.held())
        found, one, seen = [], dataclasses.replace(self.model, layers=1), 0
        room, total = reading.room_to_read(made.room, max(made.pieces)), 0
        if arm.budget:
            room = total = seen = self.slots
        for first in (True, False)[: len(made.pieces)]:
            width = made.pieces[0 if first else -1]
            before = 0 if first else arm.prompt - width
            hidden = on_device(made.hidden(width))
            both, earlier = (costs.pass_flops(one, n, seen) for n in (before + width, before))
            flops = (both - earlier) * made.together / self.shared
            # Read and written: the weights of a layer, the hidden states, and what it holds.
            entries = (total or before) * (not first) + (total or width)
            moved = on_device(made.lm.params["layers"][0]) + 2 * hidden + read * entries / room
            held = {
                **self.held, "prompts": read * self.model.layers, "hidden states": hidden,
            }  # fmt: skip
            what = f"{made.together} x {width:,}" if made.together > 1 else f"{width:,}"
            name = f"{arm.label}: prefill of {what} tokens"
            if len(made.pieces) > 1:
                part = "first" if first else "last"
                name = f"{arm.label}: prefill, {part} {what} tokens of {arm.prompt:,}"
            lower = functools.partial(made.read_layer, first)
            program = Program(name, lower, held, moved, flops, arrays=self.arrays)
            found.append(dataclasses.replace(program, trips=reading.tiles(before)))
        held = {**self.held, "prompts": read * self.model.layers}
        name = f"{arm.label}: a prompt gets a row"
        return [*found, Program(name, made.place_layer, held, 0, 0, arrays=self.arrays)]


def _generate(
    setup: Setup, arms: Iterable[Arm], sampling: Sampling, prefill: bool = True
) -> tuple[list[Found], list[str]]:
    """Programs of arms: steps, borders and prefill, and tables of them."""
    decoding, borders, prefills = [], [], []
    for arm in arms:
        made = Generation(setup, arm, sampling)
        decoding.append(setup.compile(made.steps()))
        borders.append(setup.compile(made.border()))
        if prefill:
            prefills += map(setup.compile, made.reading())
    found = [*decoding, *borders, *prefills]
    lines = ["", compiled.memory_table(found), "", compiled.work_table(decoding, "a decoding step")]
    for some, what in ((borders, "a layer, every L steps"), (prefills, "a layer of prefill")):
        if some:
            lines += ["", compiled.work_table(some, what)]
    return found, lines


def _answers(setup: Setup) -> tuple[list[Found], list[str]]:
    config, job = setup.config, setup.job
    settings, embedded, prompt = config[job], config.model == api.EMBEDDED, 512
    if embedded:
        problems = ledger.problems(config.seed, "eval", 0, 64, common.spec(config))
        prompt = max(len(p.prompt) for p in problems)
    prompt, rows = _up(prompt, config.interval), settings.get("batch", 1)
    if job == "generate":
        new_tokens = settings.new_tokens
    else:
        new_tokens = answering.new_tokens(config, job, embedded)
    arms = [Arm(*cell, rows, prompt, new_tokens) for cell in _cells(config, setup.model, job)]
    sampling = Sampling.of(settings)
    found, lines = _generate(setup, arms, sampling)
    head = (
        f"batches of {rows} answers, prompts of {prompt} and up to {new_tokens:,} new tokens, on "
        f"{setup.config.model_axis} device{'s' * (setup.config.model_axis > 1)}"
    )
    largest = []
    if setup.target.sheet and job != "generate":
        largest = ["", *(_largest(setup, arm, sampling, found) for arm in arms)]
    return found, [head, *lines, *largest]


def _largest(setup: Setup, arm: Arm, sampling: Sampling, found: list[Found]) -> str:
    """The largest batch, by two batches that fit: memory is linear in the rows."""
    points, rows = [], arm.rows
    while len(points) < 2 and rows:
        one = dataclasses.replace(arm, rows=rows)
        some = [x for x in found if x.program.name.startswith((f"{one.label}:", f"{one.label},"))]
        some += [x for x in found if x.program.name == one.label]
        made = Generation(setup, one, sampling)
        some = some or [setup.compile(x) for x in (made.steps(), *made.reading())]
        if all(x.bytes for x in some):
            points.append((rows, max(x.memory["total"] for x in some)))
        rows //= 2
    if len(points) < 2:
        return f"{arm.label}: no batch was found to fit"
    most = costs.largest(sorted(points), setup.target.sheet.memory)
    return f"largest batch of {arm.name} {arm.budget or ''}".strip() + f": {most:,}"


def _cells(config: ConfigDict, model: ModelConfig, job: str) -> list[tuple[str, Policy, int]]:
    """The full cache if asked for, and one policy at every budget: scorers, which need most."""
    if job == "traces":
        return [("full", policies.get("full"), FULL)]
    scorers = lambda: jax.eval_shape(lambda: programs.new_scorers(config, model))  # noqa: E731
    if job == "generate":
        name = config.generate.policy
        policy = scorers() if name == "foresight" else policies.get(name)
        common.check_policies(config, model, {name: policy}, [common.cadence(config)])
        return [(name, policy, config.budget if policy.evicts else FULL)]
    settings, cells = config.evaluate, []
    at = common.cadences(config, "evaluate.budgets")
    named = {name: policies.get(name) for name in settings.policies}
    if full := named.pop("full", None):
        cells.append(("full", full, FULL))
    common.check_policies(config, model, named, at)
    if settings.scorers:
        named = {"foresight": scorers()}
    for name, policy in list(named.items())[:1]:
        cells += [(name, policy, budget) for budget in settings.budgets]
    return cells


def _benchmark(setup: Setup) -> tuple[list[Found], list[str]]:
    """The sections `decode`, `prefill` and `steps`, those of them that the config names."""
    config, interval = setup.config, setup.config.interval
    s = groups.Benchmark.of(config.benchmark, peers=config.benchmark.peers)
    sampling = Sampling.of(vars(s))
    found, lines = [], []

    def arms(batches, lengths, prefill):
        for length in lengths:
            for rows in batches:
                for name in s.policies:
                    if name == "foresight":
                        policy = jax.eval_shape(lambda: programs.new_scorers(config, setup.model))
                    else:
                        policy = policies.get(name)
                    for budget in s.budgets if policy.evicts else (FULL,):
                        # Under eviction the length of the context changes nothing.
                        if budget and not prefill and length != lengths[0]:
                            continue
                        new = interval if prefill else _up(s.new_tokens, interval)
                        prompt = length if prefill else max(length - new, interval)
                        yield Arm(name, policy, budget, rows, prompt, new)

    if "decode" in s.sections:
        more, text = _generate(setup, arms(s.batches, s.lengths, False), sampling, False)
        found, lines = found + more, lines + text
    if "prefill" in s.sections:
        some = [
            setup.compile(program)
            for arm in arms(s.prefill_batches, s.prefill_lengths, True)
            for program in Generation(setup, arm, sampling).reading()
        ]
        lines += _tables(some, "a layer of prefill")
        found += some
    if "steps" in s.sections:
        stages = passes.stages_of(config, setup.model, setup.mesh)
        some = [
            setup.compile(_step(setup, stage, s.step_length, name))
            for name, stage in stages.items()
        ]
        lines += _tables(some, "a step, on a device")
        found += some
    if not found:
        raise UserError(
            f"benchmark.sections = {tuple(s.sections)} has no section with a dry run: "
            "decode, prefill, steps"
        )
    return found, lines


def _tables(found: list[Found], what: str) -> list[str]:
    return ["", compiled.memory_table(found), "", compiled.work_table(found, what)]


def _devices(mesh: Mesh) -> str:
    count, shared = parallel.device_count(mesh), mesh.size // parallel.device_count(mesh)
    each = f" group{'s' * (count > 1)} of {shared}" if shared > 1 else ""
    return f"{count}{each} device{'s' * (mesh.size > 1)}"


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
