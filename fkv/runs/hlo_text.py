"""The text of an optimised XLA program as tables of instructions."""

import dataclasses
import functools
import math
import re

_BITS = {"pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "bf16": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,<=]*)\](\{[^}]*\})?")
_ON_CHIP = re.compile(r"S\([1-9]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
NAMES = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Part:
    """Part of the type of an instruction: one array."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool

    @functools.cached_property
    def bytes(self) -> int:
        found = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype) if self.dtype in _BITS else int(found[0]) if found else 0
        return math.prod(self.shape) * bits // 8


@dataclasses.dataclass
class Instruction:
    name: str
    parts: list[Part]
    op: str
    operands: list[str]
    attributes: str
    root: bool
    number: int  # of a parameter

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    def called(self, key: str) -> str | None:
        """The computation that an attribute names."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found and found[1]

    @property
    def source(self) -> str:
        """What JAX calls the operation."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


def _parts(text: str) -> list[Part]:
    found = []
    for dtype, shape, layout in _ARRAY.findall(text):
        sizes = tuple(int(re.sub(r"\D", "", x)) for x in shape.split(",") if x)
        found.append(Part(dtype, sizes, bool(_ON_CHIP.search(layout))))
    return found


def _split(text: str) -> tuple[str, str]:
    """A type, which may be a tuple, and what follows it."""
    if not text.startswith("("):
        kind, _, rest = text.partition(" ")
        return kind, rest
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[: i + 1], text[i + 2 :]
    raise ValueError(f"no type: {text[:80]}")


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """The computations of a program by name, each a table of its instructions, and the entry's."""
    computations, current, entry = {}, None, ""
    for line in text.splitlines():
        if current is None:
            found = _COMPUTATION.match(line)
            if found and "->" in line:
                current = computations[found[2]] = {}
                entry = found[2] if found[1] else entry
            continue
        if line.startswith("}"):
            current = None
            continue
        if not (found := _INSTRUCTION.match(line)):
            continue
        kind, rest = _split(re.sub(r"/\*.*?\*/", "", found[3]))
        if not (called := re.match(r"([\w\-]+)\(", rest)):
            continue
        depth, end = 1, called.end()
        while end < len(rest) and depth:
            depth += (rest[end] == "(") - (rest[end] == ")")
            end += 1
        inside, op = rest[called.end() : end - 1], called[1]
        current[found[2]] = Instruction(
            found[2], _parts(kind), op, NAMES.findall(inside), rest[end:], bool(found[1]),
            int(inside) if op == "parameter" else -1,
        )  # fmt: skip
        if op == "constant" and re.fullmatch(r"-?\d+", inside):
            current[found[2]].number = int(inside)
    return computations, entry
