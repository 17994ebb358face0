"""Programs compiled for a target, and what the compiler says of them: what dry runs print."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from fkv.evaluation import tables
from fkv.runs import costs, targets
from fkv.runs.targets import Target

_SHOWN = 6  # of copies and of collectives, the largest


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of a job.

    Attributes:
      name: as tables show it.
      lower: traces it for the target.
      held: bytes on a device, by kind, of all that is in memory while it runs.
      bytes, flops: that it cannot do without, on a device, in one of its parts; 0 where that is not
        known.
      times: the number of its equal parts, such as decoding steps.
      arrays: shapes on a device by name, to say what is copied.
      never: see `hlo.count`: branches that this run never takes.
      trips: of loops whose number the data decide.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    held: Mapping[str, int]
    bytes: float
    flops: float
    times: int = 1
    arrays: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    never: tuple[str, ...] = ()
    trips: int = 1


@dataclasses.dataclass(frozen=True)
class Found:
    """What was found of a program; bytes, FLOPs and seconds of one of its equal parts.

    Attributes:
      program, target: what was compiled, and for what.
      fits: whether everything fits into a device's memory; None where that is not known.
      why: what the compiler says if it does not.
      memory: bytes on a device by kind, with `results` that reuse no argument's, `temporaries` and
        `total`.
      bytes, flops: that the program moves and multiplies.
      most_bytes: that it would move if it took its costliest branches, never mind the settings.
      seconds: by the compiler's estimate, plus the bytes of operations that it gives none for over
        the bandwidth; of a GPU, whose compiler gives none, by `hlo.Rates`; 0 for other devices.
      copies, collectives: as `hlo.Moved`, as dictionaries.
      products: FLOPs by the dtypes of their operands.
      compile_seconds: tracing included.
    """

    program: Program
    target: Target
    fits: bool | None
    why: str
    memory: dict[str, int]
    bytes: float = 0
    most_bytes: float = 0
    flops: float = 0
    seconds: float = 0
    copies: Sequence[dict] = ()
    collectives: Sequence[dict] = ()
    products: Mapping[str, float] = dataclasses.field(default_factory=dict)
    compile_seconds: float = 0

    @property
    def bound(self) -> float:
        """The least seconds by the data sheet; 0 where there is none."""
        sheet = self.target.sheet
        if sheet is None:
            return 0.0
        return max(self.program.bytes / sheet.bandwidth, self.program.flops / sheet.flops)

    @property
    def data(self) -> dict[str, Any]:
        """As JSON."""
        skipped = ("program", "target")
        found = {
            x.name: getattr(self, x.name) for x in dataclasses.fields(self) if x.name not in skipped
        }
        ideal = {"ideal_bytes": self.program.bytes, "ideal_flops": self.program.flops}
        return {"name": self.program.name, **found, **ideal, "bound_seconds": self.bound}


def compile_for(target: Target, program: Program) -> Found:
    """Compiles a program and counts it."""
    start = time.perf_counter()
    memory = dict(program.held)
    try:
        compiled = target.compile(program.lower())
    except targets.DoesNotFitError as error:
        return Found(program, target, False, str(error), memory)
    seconds = time.perf_counter() - start
    account = compiled.memory
    memory["results"] = account.output_size_in_bytes - account.alias_size_in_bytes
    memory["temporaries"] = compiled.temporaries
    memory["total"] = sum(memory.values())
    fits = memory["total"] <= costs.USABLE * target.sheet.memory if target.sheet else None
    counted, times = compiled.count(program.never, program.trips), program.times
    most = compiled.count((), program.trips) if program.never else counted
    cost, estimate = counted.cost, counted.cost.seconds
    if estimate and target.sheet:
        estimate += cost.unestimated / target.sheet.bandwidth
    copies = [
        {**dataclasses.asdict(x), "of": _name(x.what, program.arrays)} for x in counted.copies
    ]
    return Found(
        program, target, fits, "", memory, cost.bytes / times, most.cost.bytes / times,
        cost.flops / times, estimate / times, copies,
        [dataclasses.asdict(x) for x in counted.collectives],
        {kind: flops / times for kind, flops in counted.products.items()}, seconds,
    )  # fmt: skip


def on_device(tree: Any) -> int:
    """Bytes on a device of a pytree of shapes, with or without a sharding."""
    return sum(math.prod(_local(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def named(tree: Any, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Shapes on a device by the last name of their path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {prefix + jax.tree_util.keystr(path[-1:]).strip("[].'"): _local(x) for path, x in leaves}


def _local(x) -> tuple[int, ...]:
    there = getattr(x, "sharding", None)
    return there.shard_shape(x.shape) if there is not None else x.shape


def _name(what: str, arrays: Mapping[str, tuple[int, ...]]) -> str:
    """The weights or caches that have as many numbers as an array, such as `bf16[8,128]`."""
    sizes = [int(x) for x in what.partition("[")[2].rstrip("]").split(",") if x]
    same = [name for name, shape in arrays.items() if math.prod(shape) == math.prod(sizes)]
    return " or ".join(same[:3])


# ---- as text


def memory_table(found: Sequence[Found]) -> str:
    """Memory of a device, a line for each program."""
    last = ("results", "temporaries", "total")
    kinds = list(dict.fromkeys(kind for one in found for kind in one.memory if kind not in last))
    kinds += last
    rows = [
        [one.program.name, *(_gb(one.memory.get(kind)) for kind in kinds), _fits(one)]
        for one in found
    ]
    return tables.text(("memory of a device, GB", *kinds, "fits"), rows)


def work_table(found: Sequence[Found], what: str = "") -> str:
    """Bytes, FLOPs and seconds beside their bounds."""
    head = (what or "a run", "HBM GB", "ideal", "ratio", "TFLOP", "ideal", "bound ms",
            "estimate ms", "share", "compiled in s")  # fmt: skip
    return tables.text(head, [_work(one) for one in found if one.fits is not False or one.bytes])


def _work(one: Found) -> list[str]:
    ideal = one.program.bytes
    return [
        one.program.name,
        f"{one.bytes / 1e9:,.4g}",
        f"{ideal / 1e9:,.4g}" if ideal else "",
        f"{one.bytes / ideal:.3f}" if ideal else "",
        f"{one.flops / 1e12:,.4g}",
        f"{one.program.flops / 1e12:,.4g}" if one.program.flops else "",
        f"{one.bound * 1e3:,.4g}" if one.bound else "",
        f"{one.seconds * 1e3:,.4g}" if one.seconds else "none",
        f"{one.bound / one.seconds:.0%}" if one.seconds and one.bound else "",
        f"{one.compile_seconds:.0f}",
    ]


def notes(found: Sequence[Found]) -> list[str]:
    """What is copied, and exchanged between devices; equal notes of several programs once."""
    lines = []
    for one in found:
        for title, moved in (("copies", one.copies), ("exchanges", one.collectives)):
            said = [
                f"{x['op']} {x['what']}" + (f" ({x['of']})" if x.get("of") else "")
                + f" x {x['times']:,} = {x['bytes'] * x['times'] / 1e9:,.3g} GB"
                for x in moved[:_SHOWN]
            ]  # fmt: skip
            if said:
                rest = f"; {len(moved) - _SHOWN} more" if len(moved) > _SHOWN else ""
                lines.append(f"{one.program.name} {title}: {'; '.join(said)}{rest}")
        if one.most_bytes > 1.001 * one.bytes:
            lines.append(
                f"{one.program.name}: {one.most_bytes / one.bytes:.3f} times these bytes where "
                "rows ask for another way to draw tokens"
            )
        upcast = {k: v for k, v in one.products.items() if "f32" in k}
        if upcast:
            share = sum(upcast.values()) / max(sum(one.products.values()), 1)
            lines.append(f"{one.program.name}: {share:.1%} of the products are float32")
    return lines


def _fits(one: Found) -> str:
    if one.fits is None:
        return ""
    return "yes" if one.fits else f"no{': ' if one.why else ''}{one.why}"


def _gb(size: float | None) -> str:
    return "" if size is None else f"{size / 1e9:.2f}"
