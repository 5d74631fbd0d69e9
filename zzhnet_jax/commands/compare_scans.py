"""`zzhnet compare-scans`: implementations of the selective scan side by side on this machine."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console

from zzhnet_jax.comparison.ahead_of_time import AotRow, compile_ahead
from zzhnet_jax.comparison.cases import HARD_CASES, Case, make_case
from zzhnet_jax.comparison.compare import Comparer, Comparison, check_names
from zzhnet_jax.comparison.plot import draw_sweep
from zzhnet_jax.comparison.report import Report, environment, to_json, to_markdown
from zzhnet_jax.comparison.shapes import parse_shapes
from zzhnet_jax.comparison.sweep import sweep_lengths
from zzhnet_jax.comparison.tables import (
    LEGEND,
    TOLERANCE,
    WIDTH,
    ahead_of_time_reasons,
    ahead_of_time_tables,
    comparison_table,
    growth_table,
    heading,
    reasons,
)
from zzhnet_jax.comparison.timing import measure_bandwidth
from zzhnet_jax.comparison.torch_dump import read_torch_dump
from zzhnet_jax.errors import ConfigError

from .arguments import Switch, option, parse
from .shared import write_files

_DEFAULT_SHAPES = ("vmamba_tiny@256",)
_PICTURES = (".png", ".pdf", ".svg")
DtypeName = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class CompareArguments:
    """Compares every implementation of the selective scan on this machine.

    Each is held to a float64 oracle, value by value, and timed; hard cases are included by name.
    The exit code is 1 if any result is further from the oracle than rounding explains.

    Attributes:
      shapes: scans to compare on: NETWORK@SIZE stands for one a stage of that network for one image
        of SIZE x SIZE, b,l,d,n,g for itself (batch, length, channels, d_state, groups). Unless
        given, vmamba_tiny@256; with --from-torch, none.
      dtypes: of u, delta, B and C; the arithmetic is float32 whatever they are.
      implementations: which to compare; all unless given.
      cases: hard cases to add: very_long, large_delta, tiny_delta, near_zero_A, cancelling, bf16;
        all of them unless given, none if given without a name.
      grad: also compare and time gradients.
      aot: also compile for accelerators that are not here, and show what the kernels take of them.
      repeats: timed runs of each program, at most; the median counts.
      from_torch: file that zzhnet_jax/comparison/dump_torch_scan.py wrote where PyTorch has its
        kernel.
      json: file for everything measured.
      markdown: file for the same as tables.
      plot: picture of error and time against length, .png, .pdf or .svg.
    """

    shapes: Annotated[tuple[str, ...], option("SHAPE ...")] = ()
    dtypes: tuple[DtypeName, ...] = ("float32",)
    implementations: Annotated[tuple[str, ...], option("NAME ...")] = ()
    cases: Annotated[tuple[str, ...], option("CASE ...")] = tuple(HARD_CASES)
    grad: Switch = False
    aot: Switch = False
    repeats: int = 7
    from_torch: Annotated[Path | None, option("FILE.npz")] = None
    json: Annotated[Path | None, option("FILE")] = None
    markdown: Annotated[Path | None, option("FILE")] = None
    plot: Annotated[Path | None, option("FILE.png")] = None

    def __post_init__(self) -> None:
        for name in self.cases:
            if name not in HARD_CASES:
                raise ConfigError("--cases", name, f"one of {', '.join(HARD_CASES)}")
        if self.repeats < 1:
            raise ConfigError("--repeats", self.repeats, "at least 1")
        if not self.dtypes:
            raise ConfigError("--dtypes", "", "one of float32, bfloat16, float16")
        if self.plot is not None and self.plot.suffix not in _PICTURES:
            raise ConfigError("--plot", str(self.plot), f"a file ending in {', '.join(_PICTURES)}")


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    arguments = parse(CompareArguments, argv, prog="zzhnet compare-scans")
    names = check_names(arguments.implementations)
    makers = _cases(arguments)
    console = Console(width=None if Console().is_terminal else WIDTH)
    console.print(environment(), highlight=False)
    bandwidth = measure_bandwidth()
    console.print(f"memory bandwidth {bandwidth:.1f} GB/s (stream triad)", highlight=False)
    console.print(f"\n{TOLERANCE}\n\n{LEGEND}\n", highlight=False, soft_wrap=True, markup=False)

    comparer = Comparer(
        names,
        gradients=arguments.grad,
        repeats=arguments.repeats,
        patient=bool(arguments.implementations),
    )
    comparisons = []
    with _status() as tell:
        for name, make in makers:
            tell(name)
            comparisons.append(comparer.compare(make()))
            console.print(f"[bold]{heading(comparisons[-1].case)}", highlight=False)
            console.print(comparison_table(comparisons[-1], bandwidth))
        sweep = []
        if arguments.plot is not None:
            like = comparisons[0].case
            sweep = sweep_lengths(comparer, like.shape, like.dtype, each=tell)
        compiled: list[AotRow] = []
        for case in _to_compile(comparisons) if arguments.aot else ():
            tell(f"{case.shape.name}, ahead of time")
            compiled += compile_ahead(case, names, gradients=arguments.grad)
    report = Report(comparisons, bandwidth, sweep, compiled)
    longest = max(comparisons, key=lambda comparison: comparison.case.shape.length)
    if any(row.growth for row in longest.rows):
        name = longest.case.shape.name
        console.print(f"[bold]{name}: error of y, relative to y, over steps up to")
        console.print(growth_table(longest))
    for table in ahead_of_time_tables(compiled):
        console.print(table)
    for line in (*reasons(comparisons), *ahead_of_time_reasons(compiled)):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    _write(arguments, report, console)
    return 0 if report.passed else 1


def _cases(arguments: CompareArguments) -> list[tuple[str, Callable[[], Case]]]:
    """Name and maker of every case, so that only one's arrays are held at a time."""
    texts = arguments.shapes
    recorded = [] if arguments.from_torch is None else read_torch_dump(arguments.from_torch)
    if not texts and arguments.from_torch is None:
        texts = _DEFAULT_SHAPES
    found: list[tuple[str, Callable[[], Case]]] = []
    found += [(case.shape.name, partial(copy, case)) for case in recorded]
    for shape in parse_shapes(texts):
        found += [(shape.name, partial(make_case, shape, dtype)) for dtype in arguments.dtypes]
    found += [(name, HARD_CASES[name]) for name in dict.fromkeys(arguments.cases)]
    if not found:
        raise ConfigError("--cases", "", "at least one case where no shape is given")
    return found


def _to_compile(comparisons: Sequence[Comparison]) -> list[Case]:
    """Cases to compile ahead of time: those of given shapes; hard ones where there are no others.

    What is hard about a case does not show in a compiled program.
    """
    cases = [comparison.case for comparison in comparisons]
    return [case for case in cases if case.shape.name not in HARD_CASES] or cases


@contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    """Gives a function that tells, on a terminal, which scan is being compared."""
    console = Console(stderr=True)
    with console.status("") as status:
        yield lambda name: status.update(f"comparing on {name}")


def _write(arguments: CompareArguments, report: Report, console: Console) -> None:
    """Writes the files that were asked for, and says so."""
    writers: list[tuple[Path | None, Callable[[Path], object]]] = [
        (arguments.json, lambda path: path.write_text(_json(report))),
        (arguments.markdown, lambda path: path.write_text(to_markdown(report))),
        (arguments.plot, lambda path: draw_sweep(report.sweep, path)),
    ]
    for target, write in writers:
        if target is not None:
            write_files(target.parent, {target.name: write})
            console.print(f"wrote {target}", highlight=False, soft_wrap=True, markup=False)


def _json(report: Report) -> str:
    return json.dumps(to_json(report), indent=1, allow_nan=False) + "\n"
