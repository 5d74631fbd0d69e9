"""Reads the text of a compiled XLA program: its computations, instructions and array sizes."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_OPCODE = re.compile(r"([a-z][\w\-]*)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")
_BITS = re.compile(r"\d+")


@dataclass(frozen=True)
class ArrayShape:
    """One array of an instruction's result.

    Attributes:
      dtype: XLA's name of it, such as "f32" or "bf16".
      dims: its axes.
      in_main_memory: whether it lies there rather than on the chip, where XLA says so.
    """

    dtype: str
    dims: tuple[int, ...]
    in_main_memory: bool

    @property
    def bytes(self) -> int:
        """Its size without padding."""
        bits = _BITS.search(self.dtype)
        width = max(int(bits[0]) // 8, 1) if bits else 1
        return math.prod(self.dims) * (2 * width if self.dtype[0] == "c" else width)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique in the program.
      opcode: such as "fusion".
      result: text of the result's type.
      operands: names of other instructions of the computation.
      attributes: the rest of the line, with what the parentheses held where it is no operand.
      is_root: whether it is the computation's result.
    """

    name: str
    opcode: str
    result: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @cached_property
    def arrays(self) -> tuple[ArrayShape, ...]:
        """The arrays of the result."""
        return tuple(
            ArrayShape(
                dtype,
                tuple(int(size) for size in dims.split(",") if size),
                "S(" not in layout,
            )
            for dtype, dims, layout in _ARRAY.findall(self.result)
        )

    @property
    def bytes(self) -> int:
        """Size of the whole result."""
        return sum(array.bytes for array in self.arrays)

    @property
    def memory_bytes(self) -> int:
        """Size of what lies in main memory of it."""
        return sum(array.bytes for array in self.arrays if array.in_main_memory)

    def attribute(self, name: str) -> str | None:
        """The name of the computation that an attribute such as `calls` refers to."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


@dataclass(frozen=True)
class Computation:
    """A named list of instructions.

    Attributes:
      name: its name.
      instructions: by their names, in the order of the text.
    """

    name: str
    instructions: dict[str, Instruction]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Who takes each instruction as an operand."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self:
            for operand in dict.fromkeys(instruction.operands):
                if operand in users:
                    users[operand].append(instruction)
        return users

    @property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next(instruction for instruction in self if instruction.is_root)

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions that another one takes as operands."""
        known = self.instructions
        return [known[name] for name in instruction.operands if name in known]


@dataclass(frozen=True)
class Program:
    """A compiled program's text, taken apart.

    Attributes:
      computations: by name.
      entry: the name of the one that runs first.
      devices: how many devices run it together.
    """

    computations: dict[str, Computation]
    entry: str
    devices: int


def parse_program(text: str) -> Program:
    """Takes apart what `compiled.as_text()` gives."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if line.endswith("{") and ") -> " in line and not line.startswith(" "):
                name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
                current = Computation(name, {})
                computations[name] = current
                entry = name if line.startswith("ENTRY ") else entry
        elif line.startswith("}"):
            current = None
        elif (instruction := _parse_line(line)) is not None:
            current.instructions[instruction.name] = instruction
    partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    return Program(computations, entry, int(partitions[1]) if partitions else 1)


def _parse_line(line: str) -> Instruction | None:
    left, equals, right = line.strip().partition(" = ")
    if not equals:
        return None
    name = left.removeprefix("ROOT ").lstrip("%")
    end = _closing(right, 0) if right.startswith("(") else right.find(" ")
    result, rest = right[:end], right[end:].lstrip()
    opcode = _OPCODE.match(rest)
    if opcode is None:
        return None
    end = _closing(rest, opcode.end() - 1)
    inside = rest[opcode.end() : end - 1]
    return Instruction(
        name,
        opcode[1],
        result,
        tuple(_OPERAND.findall(inside)),
        (inside if "%" not in inside else "") + rest[end:],
        left.startswith("ROOT "),
    )


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` has been closed."""
    depth = 0
    for place in range(start, len(text)):
        if text[place] == "(":
            depth += 1
        elif text[place] == ")":
            depth -= 1
            if depth == 0:
                return place + 1
    return len(text)
