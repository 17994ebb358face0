"""What an optimised XLA program moves and multiplies, counted from its text.

XLA's own cost analysis counts the body of a loop once. Here loops count times their trips; of a
conditional, the costliest branch but those that are known never to be taken. What lies in on-chip
memory is free: TPU programs say what does; of a GPU, intermediates that its L2 cache can hold are
taken to.

Nothing here is measured. Bytes are those that the program asks for. Times are the TPU compiler's
estimates, which it gives for most operations, but not for sort, gather, scatter and custom calls;
the compiler for GPUs gives none, and they come from rates that a device reached (`Rates`).
"""

import collections
import dataclasses
import math
import re

from fkv.runs.hlo_text import NAMES, Instruction, Part, parse

_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')

_FREE = {
    "parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "iota",
    "partition-id", "replica-id", "opt-barrier", "add-dependency", "reshape",
}  # fmt: skip
_COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
    "collective-broadcast", "ragged-all-to-all",
)  # fmt: skip
_IN_PLACE = ("dynamic-update-slice", "scatter")
_SAME = ("bitcast", "reshape", "copy", "transpose")  # of the same numbers


@dataclasses.dataclass(frozen=True)
class Moved:
    """Equal operations that write arrays anew, or exchange them.

    Attributes:
      op: `copy`, `transpose`, `float32` (an upcast), or the name of a collective.
      what: dtype and shape of an array, such as `bf16[8,1280,128]`.
      bytes: of one array, on a device.
      times: how often in a run of the program.
    """

    op: str
    what: str
    bytes: int
    times: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """A run of a program, or of a loop in it, on one device.

    Attributes:
      bytes: read from and written to HBM.
      flops: of matrix products.
      seconds: the compiler's estimate, or by `Rates`; 0 where there is none.
      unestimated: bytes, among `bytes`, of operations without an estimate.
    """

    bytes: float = 0
    flops: float = 0
    seconds: float = 0
    unestimated: float = 0

    def plus(self, other: "Cost", times: int = 1) -> "Cost":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Cost(*(x + times * y for x, y in pairs))


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop: its trips in a run of the program, all in all, and the cost of one trip."""

    trips: int
    cost: Cost
    source: str


@dataclasses.dataclass(frozen=True)
class Counted:
    """What is counted of a program.

    Attributes:
      cost: of a run.
      loops: costliest first.
      copies: arrays written anew (copies, transposes, upcasts to float32), largest first.
      collectives: between devices, largest first.
      products: operand dtypes of matrix products, with the precision asked for, such as
        `f32 x f32 highest`, and the FLOPs of each kind.
    """

    cost: Cost
    loops: list[Loop]
    copies: list[Moved]
    collectives: list[Moved]
    products: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a device reaches, to estimate the time of kernels that run one after another.

    Attributes:
      bandwidth: of its memory, bytes per second.
      flops: of matrix products, per second.
      kernel: seconds that each kernel takes beside its work.
    """

    bandwidth: float
    flops: float
    kernel: float


@dataclasses.dataclass(frozen=True)
class Assumed:
    """What the program leaves to its data.

    Attributes:
      never: `jax.named_scope`s of branches that are not taken.
      trips: of loops whose number is no constant.
    """

    never: tuple[str, ...] = ()
    trips: int = 1


def count(
    text: str,
    clock: float = 1.0,
    cached: int = 0,
    rates: Rates | None = None,
    assumed: Assumed = Assumed(),
) -> Counted:
    """Counts an optimised program.

    Args:
      text: of it, from `jax.stages.Compiled.as_text`.
      clock: of the device, in cycles per second, for the compiler's estimates.
      cached: intermediates of at most so many bytes are taken to stay on the chip.
      rates: for times where the compiler estimates none.
      assumed: of branches and loops that the data decide.
    """
    return _Counter(text, clock, cached, rates, assumed).count()


class _Counter:
    """The walk over one program."""

    def __init__(self, text, clock, cached, rates, assumed):
        self.computations, self.entry = parse(text)
        self.clock, self.cached, self.rates, self.assumed = clock, cached, rates, assumed
        self.loops, self.products = [], collections.Counter()
        self.moved = {"copies": collections.Counter(), "collectives": collections.Counter()}
        self.flops_of = {}

    def count(self) -> Counted:
        cost = self._walk(self.entry, 1)
        largest = [
            sorted((Moved(*key, times) for key, times in found.items()), key=_total, reverse=True)
            for found in self.moved.values()
        ]
        loops = sorted(self.loops, key=lambda x: -x.trips * (x.cost.seconds or x.cost.bytes))
        return Counted(cost, loops, *largest, dict(self.products))

    # ---- control flow

    def _walk(self, name: str, times: int) -> Cost:
        cost, table = Cost(), self.computations[name]
        for one in table.values():
            if one.op == "while":
                trips, body = self._trips(one), one.called("body")
                inner = self._walk(body, times * trips)
                cost = cost.plus(inner, trips)
                self.loops.append(Loop(times * trips, inner, one.source))
            elif one.op == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", one.attributes)
                names = NAMES.findall(branches[1]) if branches else [
                    one.called(f"{x}_computation") for x in ("true", "false")
                ]  # fmt: skip
                taken = [x for x in names if not self._never(x)] or names
                costs = [self._walk(branch, times) for branch in taken]
                cost = cost.plus(max(costs, key=lambda x: (x.seconds, x.bytes, x.flops)))
            elif one.op == "call" and not _kernel(self.computations[one.called("to_apply")]):
                cost = cost.plus(self._walk(one.called("to_apply"), times))
            else:
                cost = cost.plus(self._single(table, one, times))
        return cost

    def _never(self, branch: str) -> bool:
        """Whether all that a branch computes is in a scope that is not taken."""
        table = self.computations[branch].values()
        paths = [x.source.split("/") for x in table if x.op not in _FREE]
        paths = [x for x in paths if len(x) > 1]  # others bear the name of a primitive, or none
        return any(paths and all(x in y for y in paths) for x in self.assumed.never)

    def _trips(self, loop: Instruction) -> int:
        if found := _TRIPS.search(loop.attributes):
            return int(found[1])
        # A constant limit is compared with the index here, or in a fusion that takes it.
        table, limits = self.computations[loop.called("condition")], []
        for one in table.values():
            if one.op == "compare" or self._inner(one):
                limits += [table.get(x) for x in one.operands]
            for inside in map(self.computations.get, self._inner(one)):
                compared = [x for x in inside.values() if x.op == "compare"]
                limits += [inside.get(y) for x in compared for y in x.operands]
        limits = [x.number for x in limits if x is not None and x.op == "constant"]
        return max([1, *limits]) if limits else self.assumed.trips

    # ---- one instruction

    def _single(self, table, one: Instruction, times: int) -> Cost:
        base = one.op.removesuffix("-start").removesuffix("-done")
        if one.op in _FREE or one.op.endswith("-done"):
            return Cost()
        if base in _COLLECTIVES or (base == "async" and self._collective(one)):
            what = max(one.parts, key=lambda x: x.bytes)
            op = base if base in _COLLECTIVES else self._collective(one)
            self.moved["collectives"][op, _said(what), what.bytes] += times
        moved, inner = self._bytes(table, one), self._inner(one)
        flops = self._products(one, table, times) + sum(self._flops(x, times) for x in inner)
        self._written_anew(table, one, inner, times)
        if rates := self.rates:
            work = max(moved / rates.bandwidth, flops / rates.flops)
            return Cost(moved, flops, work + rates.kernel)
        found = re.search(r'"estimated_cycles":"(\d+)"', one.attributes)
        seconds = int(found[1]) / self.clock if found else 0.0
        asynchronous = one.op.endswith("-start")
        return Cost(moved, flops, seconds, 0 if found or asynchronous else moved)

    def _inner(self, one: Instruction) -> list[str]:
        """Computations that run inside an instruction."""
        names = [one.called("calls"), one.called("to_apply") if one.op == "call" else None]
        return [x for x in names if x in self.computations]

    def _collective(self, one: Instruction) -> str:
        for name in self._inner(one):
            for x in self.computations[name].values():
                if x.op in _COLLECTIVES:
                    return x.op
        return ""

    def _resident(self, table, name: str) -> bool:
        """Whether an array is more than an intermediate that stays on the chip."""
        one = table[name]
        if not self.cached or one.bytes > self.cached:
            return True
        if one.op in ("bitcast", "reshape") and one.operands[0] in table:
            return self._resident(table, one.operands[0])
        element = 0
        if one.op == "get-tuple-element":
            element = int(re.search(r"index=(\d+)", one.attributes)[1])
            one = table[one.operands[0]]
        if one.op in ("parameter", "while", "conditional", "call"):
            return True
        return self._updates(one, element)  # a cache

    def _updates(self, one: Instruction, element: int) -> bool:
        """Whether an element of a result is an operand that is updated in place."""
        if one.op in _IN_PLACE:
            return True
        for name in self._inner(one):
            table = self.computations[name]
            root = next(x for x in table.values() if x.root)
            root = table[root.operands[element]] if root.op == "tuple" else root
            return _through(table, root).op in _IN_PLACE
        return False

    def _bytes(self, table, one: Instruction) -> float:
        def off_chip(name):
            if name not in table or not self._resident(table, name):
                return 0
            return sum(x.bytes for x in table[name].parts if not x.on_chip)

        own = sum(x.bytes for x in one.parts if not x.on_chip)
        written = own if self._resident(table, one.name) else 0
        if one.op == "copy-start":
            return sum(x.bytes for x in one.parts[:2] if not x.on_chip)
        if one.op in ("slice-start", "dynamic-slice-start", "async-start"):
            arrays = [x for x in one.parts if x.shape]
            last = arrays[-1] if arrays else None
            return last.bytes * (1 + (not last.on_chip)) if last else 0
        if inner := self._inner(one):
            reads = [
                self._read(inner[0], i, table[x]) if off_chip(x) else 0
                for i, x in enumerate(one.operands)
                if x in table
            ]
            return sum(reads) + (self._write(inner[0], one) if written else 0)
        if one.op == "dynamic-update-slice":
            update = table[one.operands[1]].bytes
            return update + (0 if one.parts[0].on_chip else update)
        if one.op in ("dynamic-slice", "slice"):
            return (one.bytes if off_chip(one.operands[0]) else 0) + written
        if one.op == "gather":
            return (one.bytes if off_chip(one.operands[0]) else 0) + written
        return sum(off_chip(x) for x in one.operands) + written

    def _read(self, name: str, number: int, given: Instruction) -> float:
        """Bytes that a fusion reads of an operand: slices, where it reads only slices."""
        table = self.computations[name]
        found = [x for x in table.values() if x.op == "parameter" and x.number == number]
        if not found:
            return given.bytes

        def used(one, depth=0):
            if one.root:
                return one.bytes
            total = 0
            for user in table.values():
                if one.name not in user.operands:
                    continue
                if user.op in ("dynamic-slice", "slice"):
                    total += user.bytes
                elif user.op == "gather" and user.operands[0] == one.name:
                    total += user.bytes
                elif user.op in _SAME and depth < 8 and user.bytes == one.bytes:
                    total += used(user, depth + 1)
                elif user.op in _IN_PLACE and user.operands[0] == one.name:
                    pass
                elif inner := self._inner(user):
                    at = [i for i, x in enumerate(user.operands) if x == one.name]
                    total += sum(self._read(inner[0], i, one) for i in at)
                else:
                    return one.bytes
            return total

        return min(used(found[0]), given.bytes)

    def _write(self, name: str, one: Instruction) -> float:
        """Bytes that a fusion writes: the update, where it updates in place."""
        table = self.computations[name]
        root = next(x for x in table.values() if x.root)
        outs = [table[x] for x in root.operands] if root.op == "tuple" else [root]
        total = 0
        for out, part in zip(outs, one.parts, strict=False):
            out = _through(table, out)
            if part.on_chip:
                continue
            update = {"dynamic-update-slice": 1, "scatter": -1}.get(out.op)
            source = out.operands[update] if update is not None else None
            total += table[source].bytes if source in table else part.bytes
        return total

    def _written_anew(self, table, one: Instruction, inner: list[str], times: int) -> None:
        """Notes copies, transposes and upcasts, of arrays of a megabyte or more."""
        op = one.op.removesuffix("-start")
        if op in ("copy", "transpose"):
            source = table.get(one.operands[0])
            # Between HBM and on-chip memory is not a copy but a read.
            if one.parts[0].on_chip or (source and source.parts[0].on_chip):
                return
            self._note(op, one.parts[0], times)
        elif op == "convert" and one.parts[0].dtype == "f32":
            self._note("float32", one.parts[0], times)
        for name in inner:
            body = self.computations[name]
            root = next(x for x in body.values() if x.root)
            outs = [body[x] for x in root.operands] if root.op == "tuple" else [root]
            for out, part in zip(outs, one.parts, strict=False):
                ops, out = [], out
                while out.op in (*_SAME, "convert") and out.operands[0] in body:
                    ops, out = [*ops, out.op], body[out.operands[0]]
                # Nothing but a copy: it ends at an operand, or at a slice of one.
                if out.op not in ("parameter", "slice", "dynamic-slice") or part.on_chip:
                    continue
                if "convert" in ops and part.dtype == "f32":
                    self._note("float32", part, times)
                elif "transpose" in ops:
                    self._note("transpose", part, times)
                elif part.bytes > 0:
                    self._note("copy", part, times)

    def _note(self, op: str, part: Part, times: int) -> None:
        if part.bytes >= 2**20:
            self.moved["copies"][op, _said(part), part.bytes] += times

    # ---- products

    def _flops(self, name: str, times: int) -> float:
        """FLOPs of the products in a computation without loops."""
        table = self.computations[name]
        return sum(
            self._products(x, table, times) + sum(self._flops(y, times) for y in self._inner(x))
            for x in table.values()
        )

    def _products(self, one: Instruction, table, times: int) -> float:
        if one.op == "dot":
            left = table[one.operands[0]].parts[0].shape
            over = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)[1]
            terms = math.prod(left[int(i)] for i in over.split(",") if i)
            flops = 2 * math.prod(one.parts[0].shape) * terms
        elif one.op == "convolution":
            flops = _convolution(one, *(table[x].parts[0].shape for x in one.operands[:2]))
        else:
            return 0
        kinds = " x ".join(table[x].parts[0].dtype for x in one.operands[:2])
        asked = re.search(r"operand_precision=\{(\w+)", one.attributes)
        self.products[f"{kinds} {asked[1] if asked else 'default'}"] += flops * times
        return flops


def _kernel(table: dict[str, Instruction]) -> bool:
    """Whether a computation is run as one kernel: it has no control flow of its own."""
    return not any(x.op in ("while", "conditional", "call") for x in table.values())


def _through(table: dict[str, Instruction], one: Instruction) -> Instruction:
    """The operation whose numbers an instruction only reinterprets."""
    while one.op in ("bitcast", "reshape") and one.operands and one.operands[0] in table:
        one = table[one.operands[0]]
    return one


def _convolution(one: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """FLOPs of a convolution; TPU programs have matrix products, batched ones too, in this form."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    window = re.search(r"window=\{([^}]*)\}", one.attributes)
    options = dict(x.split("=") for x in window[1].split()) if window else {}
    flops = 2 * one.parts[0].shape[labels[3].index("b")] * one.parts[0].shape[labels[3].index("f")]
    flops *= right[labels[2].index("i")]
    for axis in sorted(set(labels[3]) - {"b", "f"}):

        def sizes(key, default, axis=axis):
            return options.get(key, "").split("x")[int(axis)] if key in options else default

        kernel, out = int(sizes("size", "1")), one.parts[0].shape[labels[3].index(axis)]
        source = left[labels[1].index(axis)]
        stride, low = int(sizes("stride", "1")), int(sizes("pad", "0_0").split("_")[0])
        spread, dilate = int(sizes("lhs_dilate", "1")), int(sizes("rhs_dilate", "1"))
        last = (source - 1) * spread
        flops *= sum(
            0 <= (at := i * stride + k * dilate - low) <= last and at % spread == 0
            for i in range(out)
            for k in range(kernel)
        )
    return flops


def _said(part: Part) -> str:
    return f"{part.dtype}[{','.join(map(str, part.shape))}]"


def _total(moved: Moved) -> int:
    return moved.bytes * moved.times
