"""What a compiled program does, counted from its text: operations, memory traffic, communication.

A loop counts as often as it runs. XLA's own analysis, where a platform has it, counts loops once
and cannot see communication.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .hlo_groups import first_group, permuted_pairs
from .hlo_text import Computation, Instruction, Program

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
# These move nothing, or what they move is counted where it is made or used.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all iota"
    " partition-id replica-id opt-barrier add-dependency".split()
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BRANCH_NAMES = ("true_computation", "false_computation")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_INTEGER = re.compile(r"^(\d+)")


@dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
      kind: one of `COLLECTIVES`.
      bytes: size of the array that each device of a group holds whole, before it (all-reduce,
        reduce-scatter, all-to-all, collective-permute) or after it (all-gather).
      group: devices that exchange with one another.
      times: how often it runs.
      channel: number that parts of one exchange share; None where there is none.
    """

    kind: str
    bytes: int
    group: tuple[int, ...]
    times: float
    channel: int | None

    @property
    def sent_bytes(self) -> float:
        """What each device sends in one run, with the algorithms that send least."""
        if self.kind == "collective-permute":
            return float(self.bytes)
        size = len(self.group)
        share = (size - 1) / size
        return self.bytes * share * (2 if self.kind == "all-reduce" else 1)


@dataclass
class ProgramCosts:
    """What one device does in one run.

    Attributes:
      flops: operations of matrix products and convolutions, two a multiply-add, by the dtype of
        their operands.
      memory_bytes: read from and written to main memory.
      collectives: exchanges between devices.
      unknown_loops: loops whose number of rounds is not in the text; they count once.
      kernel_calls: calls of hand-written kernels, of which only the memory traffic is counted.
    """

    flops: dict[str, float] = field(default_factory=dict)
    memory_bytes: float = 0.0
    collectives: list[Collective] = field(default_factory=list)
    unknown_loops: int = 0
    kernel_calls: float = 0.0

    @property
    def collective_bytes(self) -> dict[str, float]:
        """Sizes of the arrays exchanged, summed over all runs, by kind."""
        totals = dict.fromkeys(COLLECTIVES, 0.0)
        for collective in self.collectives:
            totals[collective.kind] += collective.times * collective.bytes
        return totals


def program_costs(program: Program) -> ProgramCosts:
    """Counts what one device does in one run of a program."""
    costs = ProgramCosts()
    if program.entry:
        _Counter(program, costs).visit(program.computations[program.entry], 1.0, fused=False)
    costs.collectives = _without_repeats(costs.collectives)
    return costs


def _without_repeats(collectives: list[Collective]) -> list[Collective]:
    """Drops the copies of an exchange that TPU programs spread over several fused steps."""
    kept: dict[object, Collective] = {}
    for place, collective in enumerate(collectives):
        key = place if collective.channel is None else (collective.kind, collective.channel)
        if key not in kept or kept[key].times < collective.times:
            kept[key] = collective
    return list(kept.values())


class _Counter:
    """Walks through what a program runs."""

    def __init__(self, program: Program, costs: ProgramCosts) -> None:
        self._program, self._costs = program, costs

    def visit(self, computation: Computation, times: float, *, fused: bool) -> None:
        """Adds a computation that runs so often; a fused one touches memory only at its ends."""
        for instruction in computation:
            self._count_flops(computation, instruction, times)
            self._count_collective(computation, instruction, times)
            if not fused:
                traffic = memory_traffic(self._program, computation, instruction)
                self._costs.memory_bytes += times * traffic
            self._descend(instruction, times, fused=fused)

    def _descend(self, instruction: Instruction, times: float, *, fused: bool) -> None:
        opcode, attributes = instruction.opcode, instruction.attributes
        if opcode == "while":
            rounds = self._rounds(instruction)
            self._visit_named(instruction.attribute("body"), times * rounds, fused=fused)
        elif opcode == "conditional":
            # Either branch may be taken; what both would cost together is an upper bound.
            named = _BRANCHES.search(attributes)
            names = named[1].split(",") if named else []
            for name in [*names, *map(instruction.attribute, _BRANCH_NAMES)]:
                self._visit_named(name and name.strip(" %"), times, fused=fused)
        elif opcode in ("fusion", "call", "async-start"):
            name = instruction.attribute("calls") or instruction.attribute("to_apply")
            self._visit_named(name, times, fused=fused or opcode == "fusion")

    def _visit_named(self, name: str | None, times: float, *, fused: bool) -> None:
        if name in self._program.computations:
            self.visit(self._program.computations[name], times, fused=fused)

    def _rounds(self, loop: Instruction) -> int:
        known = _TRIPS.search(loop.attributes)
        if known:
            return int(known[1])
        # JAX's loops count from 0 in steps of 1 up to a constant that the condition holds.
        condition = self._program.computations.get(loop.attribute("condition") or "")
        bounds = [
            int(number[0])
            for instruction in condition or ()
            if instruction.opcode == "constant"
            and instruction.result.startswith("s32[]")
            and (number := _INTEGER.match(instruction.attributes))
        ]
        if len(bounds) == 1:
            return bounds[0]
        self._costs.unknown_loops += 1
        return 1

    def _count_collective(
        self, computation: Computation, instruction: Instruction, times: float
    ) -> None:
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return
        operands = sum(operand.bytes for operand in computation.operands(instruction))
        size = operands if kind in ("reduce-scatter", "collective-permute") else instruction.bytes
        if kind == "all-gather" and instruction.opcode.endswith("-start"):
            size -= operands  # the result holds the operand as well
        if kind == "all-reduce" and "all-reduce-scatter" in computation.name:
            kind = "reduce-scatter"
        channel = _CHANNEL.search(instruction.attributes)
        if kind == "collective-permute":
            group = permuted_pairs(instruction.attributes)
        else:
            group = first_group(instruction.attributes, self._program.devices)
        if len(group) > 1:
            self._costs.collectives.append(
                Collective(kind, size, group, times, int(channel[1]) if channel else None)
            )

    def _count_flops(
        self, computation: Computation, instruction: Instruction, times: float
    ) -> None:
        opcode, operands = instruction.opcode, computation.operands(instruction)
        count: Callable[[Instruction, list[Instruction]], float] | None = None
        if opcode == "dot":
            count = _dot_flops
        elif opcode == "convolution":
            count = _convolution_flops
        elif opcode == "custom-call":
            target = instruction.attributes
            if "__cublas$" in target:
                count = _dot_flops
            elif "__cudnn$conv" in target:
                count = _library_convolution_flops
            elif "tpu_custom_call" in target or "xla.gpu.triton" in target:
                self._costs.kernel_calls += times
        if count is not None and len(operands) >= 2:
            dtype = operands[0].arrays[0].dtype
            flops = self._costs.flops
            flops[dtype] = flops.get(dtype, 0.0) + times * count(instruction, operands)


def memory_traffic(program: Program, computation: Computation, instruction: Instruction) -> float:
    """Bytes that one instruction reads from and writes to main memory."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0.0
    operands = computation.operands(instruction)
    if opcode == "fusion":
        return _fusion_traffic(program, instruction, operands)
    if opcode in ("dynamic-slice", "slice", "gather"):
        return 2.0 * instruction.memory_bytes
    if opcode == "dynamic-update-slice":
        return 2.0 * operands[1].memory_bytes if instruction.memory_bytes else 0.0
    read = sum(operand.memory_bytes for operand in operands)
    if opcode == "copy-start":  # its result holds the operand as well
        return float(max(instruction.memory_bytes, read))
    if opcode.endswith("-start"):
        return float(read)
    if "__cublas$" in instruction.attributes or "__cudnn$" in instruction.attributes:
        return float(read + instruction.arrays[0].bytes)  # the rest of its result is scratch
    return float(read + instruction.memory_bytes)


def _fusion_traffic(
    program: Program, instruction: Instruction, operands: list[Instruction]
) -> float:
    """As `memory_traffic`; of arrays that are sliced or updated in place, only that part counts."""
    inner = program.computations.get(instruction.attribute("calls") or "")
    if inner is None:
        return float(sum(o.memory_bytes for o in operands) + instruction.memory_bytes)
    parameters = {
        int(number[0]): part
        for part in inner
        if part.opcode == "parameter" and (number := _INTEGER.match(part.attributes))
    }
    total = 0.0
    for place, operand in enumerate(operands):
        if operand.memory_bytes and place in parameters:
            total += min(_part_read(inner, parameters[place]), operand.memory_bytes)
    root = inner.root
    results = inner.operands(root) if root.opcode == "tuple" else [root]
    for result in results:
        while result.opcode in ("bitcast", "convert", "copy") and inner.operands(result):
            result = inner.operands(result)[0]
        if result.opcode == "dynamic-update-slice":
            written = inner.operands(result)[1].bytes if result.memory_bytes else 0
        else:
            written = result.memory_bytes
        total += written
    return total


def _part_read(computation: Computation, value: Instruction) -> float:
    """How much of an array a fused computation reads."""
    total = 0.0
    for user in computation.users[value.name]:
        if user.opcode == "dynamic-slice" and user.operands[0] == value.name:
            total += user.bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            continue
        elif user.opcode == "bitcast":
            total += _part_read(computation, user)
        else:
            return float(value.bytes)
    return total


def _dot_flops(instruction: Instruction, operands: list[Instruction]) -> float:
    text = instruction.attributes
    dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", text)
    if dims is None:
        dims = re.search(r'"lhs_contracting_dimensions":\[([\d,"]*)\]', text)
    places = [int(place) for place in re.findall(r"\d+", dims[1])] if dims else []
    lhs = operands[0].arrays[0].dims
    return 2.0 * math.prod(instruction.arrays[0].dims) * math.prod(lhs[p] for p in places)


def _convolution_flops(instruction: Instruction, operands: list[Instruction]) -> float:
    """Two operations for each pair of a kernel's and an input's value that meet, padding left out.

    TPU programs write matrix products as convolutions, some with windows that mostly meet padding.
    """
    text = instruction.attributes
    lhs_labels, rhs_labels, out_labels = _labels(text)
    lhs, rhs = operands[0].arrays[0].dims, operands[1].arrays[0].dims
    out = instruction.arrays[0].dims
    window = _window(text, sum(label.isdigit() for label in out_labels))
    pairs = 1.0
    for axis in range(len(window["size"])):
        pairs *= _meetings(
            input_size=lhs[lhs_labels.index(str(axis))],
            output_size=out[out_labels.index(str(axis))],
            size=window["size"][axis],
            stride=window["stride"][axis],
            low=window["low"][axis],
            base_dilation=window["lhs_dilate"][axis],
            window_dilation=window["rhs_dilate"][axis],
        )
    channels = rhs[rhs_labels.index("i")]
    batch_groups = re.search(r"batch_group_count=(\d+)", text)
    others = out[out_labels.index("b")] * out[out_labels.index("f")]
    return 2.0 * pairs * channels * others / (int(batch_groups[1]) if batch_groups else 1)


def _meetings(
    *,
    input_size: int,
    output_size: int,
    size: int,
    stride: int,
    low: int,
    base_dilation: int,
    window_dilation: int,
) -> int:
    outputs = np.arange(output_size)[:, None] * stride - low
    places = outputs + np.arange(size)[None] * window_dilation
    inside = (places >= 0) & (places <= (input_size - 1) * base_dilation)
    return int(np.count_nonzero(inside & (places % base_dilation == 0)))


def _window(text: str, axes: int) -> dict[str, list[int]]:
    found = re.search(r"window=\{([^}]*)\}", text)
    fields = dict(part.split("=", 1) for part in found[1].split()) if found else {}

    def numbers(name: str, default: int) -> list[int]:
        value = fields.get(name)
        return [int(part) for part in value.split("x")] if value else [default] * axes

    pads = fields.get("pad", "x".join(["0_0"] * axes))
    return {
        "size": numbers("size", 1),
        "stride": numbers("stride", 1),
        "lhs_dilate": numbers("lhs_dilate", 1),
        "rhs_dilate": numbers("rhs_dilate", 1),
        "low": [int(pad.split("_")[0]) for pad in pads.split("x")] if axes else [],
    }


def _labels(text: str) -> tuple[str, str, str]:
    found = re.search(r"dim_labels=([a-z\d?]+)_([a-z\d?]+)->([a-z\d?]+)", text)
    return (found[1], found[2], found[3]) if found else ("bf", "io", "bf")


def _library_convolution_flops(instruction: Instruction, operands: list[Instruction]) -> float:
    """As `_convolution_flops` for cuDNN's three products, padding counted."""
    first, second = operands[0].arrays[0].dims, operands[1].arrays[0].dims
    result = instruction.arrays[0].dims
    if "BackwardInput" in instruction.attributes:
        images, kernel = first, second
    elif "BackwardFilter" in instruction.attributes:
        images, kernel = second, result
    else:
        images, kernel = result, second
    outputs = kernel[_labels(instruction.attributes)[1].index("o")]
    return 2.0 * math.prod(images) * math.prod(kernel) / outputs
