"""What a TPU kernel costs in issued instructions, read from the compiler's final schedule.

A TPU core issues one bundle a cycle, a very long instruction with a slot for each of its units. The
compiler writes the bundles of every kernel to a folder if `LIBTPU_INIT_ARGS` asks for it before
libtpu is loaded, so the compilation belongs in a process of its own:

    LIBTPU_INIT_ARGS=<dump_flags(folder)>  python -c "... jax.jit(f).lower(...).compile()"
    read_schedule(folder, "selective_scan_forward")

Bundles are counted, nothing is run: waiting for memory does not appear in the count.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UserError

# A line such as " 0x144 LB: >> { ...": address, what begins here, loop depth, instructions.
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|\d+)\s*([A-Z]{2})?\s*:\s*(>*)\s*\{(.*)")
_LOOP_BODY = "LB"
_TOTAL = re.compile(r"total scheduled bundles:\s*(\d+)")
_LIMIT = re.compile(r"= scmp\.ge\.s32\.totalorder [^;]*?, (\d+) /\* loop exit test \*/")
# The compiler copies a block that hangs over the end of its array in loops of its own: as many rows
# as there are, at most those of the block, 16 at a time and the rest one by one.
_COMPUTED_LIMIT = re.compile(r"= scmp\.ge\.s32\.totalorder [^;]*?, (%s\w+)")
_CAPPED = re.compile(r"(%s\w+) = smov \([^;]*?\), (\d+)")
_REST = re.compile(r"(%s\w+) = sand\.u32 (?:\([^;]*?\), )?(\d+),")
_SHIFTED = re.compile(r"(%s\w+) = sshrl\.u32 (?:\([^;]*?\), )?(%s\w+), (\d+)")
_SPILLED = re.compile(r"\bv\w+ = vld [^;]*_spill\]|\bvst [^;]*_spill\]")


class ScheduleError(UserError):
    """The compiler left no schedule, or one in a form that is not known."""


@dataclass(frozen=True)
class Loop:
    """One loop of a kernel.

    Attributes:
      depth: 1 for the loop over the grid, more for loops inside.
      trips: how often it runs each time it is entered; at most, if that is computed.
      bundles: bundles of one iteration, without those of loops inside.
      spills: vector registers written to memory and read back in it for want of registers.
      innermost: whether it has no loop inside.
    """

    depth: int
    trips: int
    bundles: int
    spills: int
    innermost: bool


@dataclass(frozen=True)
class TpuSchedule:
    """The final schedule of one kernel.

    Attributes:
      kernel: its name in the program.
      bundles: all of them, each counted once.
      loops: its loops in program order, outer before inner.
    """

    kernel: str
    bundles: int
    loops: tuple[Loop, ...]

    @property
    def innermost(self) -> tuple[int, ...]:
        """Bundles of one iteration of each innermost loop, in program order."""
        return tuple(loop.bundles for loop in self.loops if loop.innermost)

    @property
    def inner_bundles(self) -> int:
        """Bundles issued in one turn of the grid by the loops inside."""
        total, trips = 0, {1: 1}
        for loop in self.loops:
            if loop.depth > 1:
                trips[loop.depth] = trips[loop.depth - 1] * loop.trips
                total += trips[loop.depth] * loop.bundles
        return total

    @property
    def outer_bundles(self) -> int:
        """Bundles of one turn of the grid outside those loops: moving blocks, start and end.

        What runs in some turns alone, such as the first, counts as if it ran in all.
        """
        return sum(loop.bundles for loop in self.loops if loop.depth == 1)


def dump_flags(folder: Path) -> str:
    """Value of `LIBTPU_INIT_ARGS` that makes the compiler write its schedules to a folder."""
    return f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"


def read_schedule(folder: Path, kernel: str) -> TpuSchedule:
    """The schedule of a kernel from a folder of dumps; the last one if it was compiled repeatedly.

    Args:
      folder: as given to `dump_flags`.
      kernel: `name` of the `pallas_call`.

    Raises:
      ScheduleError: the folder has no schedule of that kernel.
    """
    pattern = re.compile(rf"(\d+)-{re.escape(kernel)}(?:\.\d+)?-\d+-(.*final_bundles)\.txt")
    found: dict[str, tuple[int, Path]] = {}
    for path in folder.glob("*final_bundles.txt"):
        match = pattern.fullmatch(path.name)
        if match:
            found[match[2]] = max(found.get(match[2], (0, path)), (int(match[1]), path))
    names = ("schedule-analysis_final_bundles", "final_bundles")
    if any(name not in found for name in names):
        raise ScheduleError(
            f"{folder} has no final schedule of a kernel {kernel!r}: compile it for a TPU with "
            "LIBTPU_INIT_ARGS set to dump_flags() before libtpu is loaded"
        )
    analysis, bundles = (found[name][1].read_text() for name in names)
    return parse_schedule(kernel, analysis, bundles)


def parse_schedule(kernel: str, analysis: str, bundles: str) -> TpuSchedule:
    """The schedule from the texts of the compiler's two files.

    Args:
      kernel: name to give it.
      analysis: text of `*-schedule-analysis_final_bundles.txt`.
      bundles: text of `*-final_bundles.txt`.

    Raises:
      ScheduleError: the number of bundles is not there, or a loop's number of iterations.
    """
    total = _TOTAL.search(analysis)
    if total is None:
        raise ScheduleError(f"the schedule analysis of {kernel!r} gives no total of bundles")
    loops: list[Loop] = []
    path: list[int] = []  # indices of the loops that the current line is in
    most: dict[str, int] = {}  # of registers
    computed: dict[int, int] = {}  # trips of loops, at most
    for line in bundles.splitlines():
        match = _BUNDLE.match(line)
        if not match:
            continue
        label, depth, text = match[1], len(match[2]), match[3]
        if label == _LOOP_BODY:
            path = [*path[: depth - 1], len(loops)]
            if depth > 1:
                loops[path[-2]] = replace(loops[path[-2]], innermost=False)
            loops.append(Loop(depth, 0, 0, 0, innermost=True))
        if depth:
            path = path[:depth]
            loop = loops[path[-1]]
            spills = loop.spills + len(_SPILLED.findall(text))
            loops[path[-1]] = replace(loop, bundles=loop.bundles + 1, spills=spills)
        for limit in _LIMIT.findall(text):
            # Loops that end together are tested together, the inner one first.
            untested = [i for i in path if not loops[i].trips]
            if untested:
                loops[untested[-1]] = replace(loops[untested[-1]], trips=int(limit))
        _bound_registers(text, most)
        for register in _COMPUTED_LIMIT.findall(text) if depth else ():
            if register in most:
                computed[path[-1]] = most[register]
    loops = [replace(x, trips=x.trips or computed.get(i, 0)) for i, x in enumerate(loops)]
    if any(loop.trips == 0 for loop in loops):
        raise ScheduleError(f"the schedule of {kernel!r} has a loop without a constant limit")
    return TpuSchedule(kernel=kernel, bundles=int(total[1]), loops=tuple(loops))


def _bound_registers(text: str, most: dict[str, int]) -> None:
    """Adds the registers that the instructions of a bundle leave with a known upper bound."""
    for register, bound in _CAPPED.findall(text) + _REST.findall(text):
        most[register] = int(bound)
    for register, source, bits in _SHIFTED.findall(text):
        if source in most:
            most[register] = most[source] >> int(bits)


def bundles_per_step(
    schedule: TpuSchedule, *, steps: int, tiles: int, inner: bool = False
) -> float:
    """Bundles for each time step and 128 channels.

    Args:
      schedule: of a kernel whose grid has more than one turn.
      steps: time steps of one turn of the grid.
      tiles: groups of 128 channels that a turn handles.
      inner: count the loops inside a turn alone, without its `outer_bundles`.
    """
    outer = 0 if inner else schedule.outer_bundles
    return (schedule.inner_bundles + outer) / (steps * tiles)
