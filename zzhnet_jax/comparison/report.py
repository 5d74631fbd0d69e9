"""Everything that was measured: as JSON for programs, as Markdown for people."""

import dataclasses
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from .compare import Comparison, Row
from .oracle import names
from .tables import LEGEND, TOLERANCE, milliseconds, number, reasons, share


@dataclass(frozen=True)
class Report:
    """One run of the comparison.

    Attributes:
      comparisons: one a case.
      sweep: the same scan at growing lengths; empty unless asked for.
      bandwidth: measured memory bandwidth, GB/s.
      ahead_of_time: rows of the ahead-of-time compilation, as `ahead_of_time` gives them.
    """

    comparisons: Sequence[Comparison]
    bandwidth: float
    sweep: Sequence[Comparison] = ()
    ahead_of_time: Sequence[Mapping[str, Any]] = ()

    @property
    def passed(self) -> bool:
        """Whether no row failed."""
        every = (*self.comparisons, *self.sweep)
        return all(row.verdict != "FAIL" for comparison in every for row in comparison.rows)


def environment() -> str:
    """The software and hardware that figures were measured with, in a line."""
    device = jax.devices()[0]
    machine = f"{len(jax.devices())} x {device.device_kind}"
    return f"jax {jax.__version__}, {machine}, Python {platform.python_version()}"


def to_json(report: Report) -> dict[str, Any]:
    """The whole report; what is infinite or undefined becomes null."""
    return _finite(
        {
            "environment": environment(),
            "bandwidth_gb_s": report.bandwidth,
            "tolerance": " ".join(TOLERANCE.split()),
            "passed": report.passed,
            "scans": [_scan(comparison) for comparison in report.comparisons],
            "sweep": [_scan(comparison) for comparison in report.sweep],
            "ahead_of_time": list(report.ahead_of_time),
        }
    )


def _scan(comparison: Comparison) -> dict[str, Any]:
    case = comparison.case
    return case.shape._asdict() | {
        "dtype": case.dtype,
        "note": case.note,
        "rows": [_row(row) for row in comparison.rows],
    }


def _row(row: Row) -> dict[str, Any]:
    value = dataclasses.asdict(row) | {"verdict": row.verdict}
    for kind in ("forward", "gradient"):
        timing = getattr(row, kind)
        if timing is not None:
            value[kind]["gb_s"] = timing.gigabytes_per_second
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_markdown(report: Report) -> str:
    """The whole report: tables of costs, of errors and of their growth for each scan."""
    parts = [
        "# Selective scans compared",
        f"{environment()}; memory bandwidth {report.bandwidth:.1f} GB/s (stream triad).",
        TOLERANCE,
        LEGEND,
        *(f"- {reason}" for reason in reasons(report.comparisons)),
    ]
    for comparison in report.comparisons:
        parts += _scan_parts(comparison, report.bandwidth)
    if report.sweep:
        parts += ["## The same scan at growing lengths", *_sweep_parts(report)]
    if report.ahead_of_time:
        columns = list(dict.fromkeys(key for row in report.ahead_of_time for key in row))
        rows = [[str(row.get(key, "")) for key in columns] for row in report.ahead_of_time]
        parts += ["## Compiled ahead of time", _table(columns, rows)]
    return "\n\n".join(parts) + "\n"


def _scan_parts(comparison: Comparison, peak: float) -> list[str]:
    case, rows = comparison.case, [row for row in comparison.rows if row.reason is None]
    _, b, length, d, g, n = case.shape
    parts = [
        f"## {case.shape.name}",
        f"u ({b}, {length}, {d}), groups {g}, d_state {n}, {case.dtype}. {case.note}".strip(),
        _cost_table(rows, peak),
        _error_table(rows),
    ]
    if rows:
        ends = [f"to {piece.last}" for piece in rows[0].growth]
        growth = [[row.implementation, *(number(p.norm) for p in row.growth)] for row in rows]
        growth.append(["bound", *(number(piece.bound_norm) for piece in rows[0].growth)])
        parts += ["Error of y along the sequence:", _table(["steps", *ends], growth)]
    return parts


def _sweep_parts(report: Report) -> list[str]:
    rows = []
    for comparison in report.sweep:
        for row in comparison.rows:
            if row.reason is None:
                times = (t.run_ms if t else None for t in (row.forward, row.gradient))
                cells = ("-" if ms is None else milliseconds(ms) for ms in times)
                error = number(row.errors["y"].norm)
                rows.append([str(comparison.case.shape.length), row.implementation, error, *cells])
    return [_table(["steps", "implementation", "error of y", "forward ms", "gradient ms"], rows)]


def _cost_table(rows: Iterable[Row], peak: float) -> str:
    columns = "implementation verdict program ms runs GB/s of_peak compile_s temp_MB".split()
    cells = []
    for row in rows:
        for kind in ("forward", "gradient"):
            timing = getattr(row, kind)
            if timing is None:
                continue
            rate = timing.gigabytes_per_second
            cells.append(
                [
                    *(row.implementation, row.verdict, kind),
                    "-" if timing.run_ms is None else milliseconds(timing.run_ms),
                    str(timing.runs),
                    *(("-", "-") if rate is None else (f"{rate:.3g}", f"{rate / peak:.0%}")),
                    "-" if timing.compile_s is None else f"{timing.compile_s:.2f}",
                    "-" if timing.temp_bytes is None else f"{timing.temp_bytes / 1e6:.1f}",
                ]
            )
    return _table([column.replace("_", " ") for column in columns], cells)


def _error_table(rows: Iterable[Row]) -> str:
    columns = ["implementation", "result", "max abs", "mean abs", "max rel", "mean rel"]
    columns += ["max ulp", "mean ulp", "max of scale", "norm", "of bound"]
    cells = []
    for row in rows:
        for name in names(row.errors):
            e = row.errors[name]
            figures = (e.max_abs, e.mean_abs, e.max_rel, e.mean_rel, e.max_ulp, e.mean_ulp)
            shown = [number(x) for x in (*figures, e.max_of_scale, e.norm)]
            label = name if name in ("y", "state") else f"gradient of {name}"
            cells.append([row.implementation, label, *shown, share(e.of_bound)])
    return _table(columns, cells)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---"] * len(columns)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows))
