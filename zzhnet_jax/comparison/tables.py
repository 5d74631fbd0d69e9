"""Comparisons as tables that fit a terminal of 100 columns."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .cases import Case
from .compare import Comparison, Row, worst_gradient
from .timing import Timing

WIDTH = 100

TOLERANCE = """\
Tolerance: each value may differ from the float64 oracle by as much as rounding can add up to, found
value by value: all terms by magnitude, (1 + 2^-24) for each operation, and half a unit in
the last place of the output's dtype. "of bound" is the largest error's share of that."""

LEGEND = """\
error: largest, relative to the oracle's largest value; ulp: mean, in units in the last place of y.
worst gradient: the one with the largest such error. fwd, grad: median times of the scan, and of its
gradient with the forward pass that it needs. GB/s: bytes of arguments and results, each once, over
that time; peak: its share of the stream triad's. comp: seconds to compile (the longer of the two).
temp: memory beside arguments and results (the larger of the two)."""

_SHORT = {"delta_bias": "bias"}


def heading(case: Case) -> str:
    """A case in one line."""
    name, b, length, d, g, n = case.shape
    text = f"{name}: u ({b}, {length}, {d}), groups {g}, d_state {n}, {case.dtype}"
    return f"{text}\n{case.note}" if case.note else text


def comparison_table(comparison: Comparison, peak: float) -> Table:
    """One row an implementation.

    Args:
      comparison: of one case.
      peak: measured memory bandwidth in GB/s.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0)
    gradients = any(row.gradient or worst_gradient(row) for row in comparison.rows)
    table.add_column("", no_wrap=True)
    headings = ["y\nerror", "\nulp", "of\nbound", "fwd\nms", "\nGB/s", "\npeak"]
    if gradients:
        headings[2:2] = ["worst gradient\nerror"]
        headings += ["grad\nms", "\nGB/s", "\npeak"]
    for text in (*headings, "comp\ns", "temp\nMB", ""):
        table.add_column(text, justify="right", no_wrap=True)
    for row in comparison.rows:
        if row.reason is None:
            table.add_row(*_cells(row, gradients, peak))
    return table


def reasons(comparisons: Iterable[Comparison]) -> list[str]:
    """Why implementations were not run, each reason once, with the scans where not everywhere."""
    comparisons = list(comparisons)
    found: dict[tuple[str, str], list[str]] = {}
    for comparison in comparisons:
        for row in comparison.rows:
            if row.reason is not None:
                key = (f"{row.implementation} {row.verdict}", row.reason)
                found.setdefault(key, []).append(comparison.case.shape.name)
    return [
        f"{name}: {reason}"
        + ("" if len(where) == len(comparisons) else f" ({', '.join(dict.fromkeys(where))})")
        for (name, reason), where in found.items()
    ]


def growth_table(comparison: Comparison) -> Table:
    """Errors of y along the sequence, one row an implementation, the bound last."""
    rows = [row for row in comparison.rows if row.growth]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("")
    for piece in rows[0].growth:
        table.add_column(str(piece.last), justify="right")
    for row in rows:
        table.add_row(row.implementation, *(number(piece.norm) for piece in row.growth))
    table.add_row("bound", *(number(p.bound_norm) for p in rows[0].growth), style="dim")
    return table


def ahead_of_time_tables(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Kernels compiled for accelerators that are not here, a table an implementation."""
    tables = []
    found = [row for row in rows if "reason" not in row]
    for name in dict.fromkeys(row["implementation"] for row in found):
        own = [row for row in found if row["implementation"] == name]
        columns = [key for key in own[0] if key != "implementation"]
        table = Table(
            title=f"{name}, compiled ahead of time",
            title_justify="left",
            title_style="bold",
            box=SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        for key in columns:
            text = isinstance(own[0][key], str)
            table.add_column(key, justify="left" if text else "right", overflow="fold")
        for row in own:
            table.add_row(*(str(row[key]) for key in columns))
        tables.append(table)
    return tables


def ahead_of_time_reasons(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Why implementations were not compiled, each reason once."""
    lines = (f"{r['implementation']} not compiled: {r['reason']}" for r in rows if "reason" in r)
    return list(dict.fromkeys(lines))


def _cells(row: Row, gradients: bool, peak: float) -> list[str]:
    y = row.errors["y"]
    cells = [row.implementation, number(y.max_of_scale), short(y.mean_ulp)]
    if gradients:
        worst = worst_gradient(row)
        name, error = ("-", "") if worst is None else (worst[0], number(worst[1].max_of_scale))
        cells.append(f"{_SHORT.get(name, name)} {error}".rstrip())
    cells.append(share(max(figures.of_bound for figures in row.errors.values())))
    for timing in (row.forward, row.gradient)[: 1 + gradients]:
        cells += _time_cells(timing, peak)
    timings = [timing for timing in (row.forward, row.gradient) if timing is not None]
    cells.append(_largest([timing.compile_s for timing in timings], 1))
    cells.append(_largest([_megabytes(timing) for timing in timings], 0))
    cells.append({"FAIL": "[bold red]FAIL[/]"}.get(row.verdict, row.verdict))
    return cells


def _time_cells(timing: Timing | None, peak: float) -> list[str]:
    if timing is None or timing.run_ms is None or timing.gigabytes_per_second is None:
        return ["-", "-", "-"]
    rate = timing.gigabytes_per_second
    return [milliseconds(timing.run_ms), short(rate), f"{rate / peak:.0%}"]


def _megabytes(timing: Timing) -> float | None:
    return None if timing.temp_bytes is None else timing.temp_bytes / 1e6


def _largest(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{max(known):.{digits}f}" if known else "-"


def number(x: float) -> str:
    """Two digits, such as 1.3e-07 or 0.26."""
    return f"{x:.1e}" if x and not 0.01 <= abs(x) < 100 else f"{x:.2g}"


def short(x: float) -> str:
    """Two digits; one and an exponent from 1000 on."""
    if x >= 1000:
        return f"{x:.0e}".replace("e+0", "e").replace("e+", "e")
    return f"{x:.0f}" if x >= 100 else f"{x:.2g}"


def share(x: float) -> str:
    """A share of 1 with two decimals; what is small shows as such."""
    return f"{x:.2f}" if x < 1000 else f"{x:.0e}"


def milliseconds(x: float) -> str:
    """Three digits."""
    return f"{x:.3g}" if x < 1000 else f"{x:.0f}"
