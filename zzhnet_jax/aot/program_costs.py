"""What a compiled program does, counted from its text: operations, memory traffic, communication.

A loop counts as often as it runs. XLA's own analysis, where a platform has it, counts loops once
and cannot see communication.
"""

import re
from dataclasses import dataclass, field

from .hlo_groups import first_group, permuted_pairs
from .hlo_text import Computation, Instruction, Program
from .products import product_flops
from .traffic import memory_traffic

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
# A kernel written by hand, of which the program says nothing but its operands.
_KERNEL = re.compile(r"tpu_custom_call|xla\.gpu\.triton")
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
        operands = computation.operands(instruction)
        count = product_flops(instruction, operands)
        if count is not None:
            dtype, flops = operands[0].arrays[0].dtype, self._costs.flops
            flops[dtype] = flops.get(dtype, 0.0) + times * count
        elif instruction.opcode == "custom-call" and _KERNEL.search(instruction.attributes):
            self._costs.kernel_calls += times
