"""The picture of a comparison: error and time against length, one line an implementation."""

from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from .compare import Comparison, Row
from .oracle import names

# Of Okabe and Ito's palette; the markers tell the lines apart in print without colours.
_STYLES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#56B4E9", "v"),
    ("#E69F00", "P"),
    ("#000000", "X"),
)
_LARGEST_MARKER, _SMALLEST_MARKER = 6.5, 4.0
_INK, _QUIET = "#191c21", "#8a9099"
_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-11}
_RC: Any = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8.5,
    "axes.linewidth": 0.6,
    "axes.edgecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "legend.fontsize": 8,
    "mathtext.fontset": "dejavusans",
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
}


def draw_sweep(sweep: Sequence[Comparison], path: Path) -> None:
    """Draws comparisons at growing lengths.

    Args:
      sweep: comparisons of one kind of scan, shortest first.
      path: ends in .png, .pdf or .svg.
    """
    with matplotlib.rc_context(_RC):
        figure = sweep_figure(sweep)
        figure.savefig(path, dpi=300)


def sweep_figure(sweep: Sequence[Comparison]) -> Figure:
    """The figure: errors on the left, times on the right, gradients below if there are any."""
    rows = [row for comparison in sweep for row in comparison.rows if row.reason is None]
    gradients = any(row.gradient is not None for row in rows)
    figure = Figure(figsize=(6.8, 4.9 if gradients else 2.7), layout="constrained")
    axes = np.atleast_2d(figure.subplots(1 + gradients, 2, sharex=True))
    case = sweep[0].case
    _draw_errors(axes[0, 0], sweep, _error_of_y)
    axes[0, 0].set_title("Error of $y$", loc="left")
    _draw_times(axes[0, 1], sweep, "forward")
    axes[0, 1].set_title("Time of the forward pass", loc="left")
    if gradients:
        _draw_errors(axes[1, 0], sweep, _error_of_gradients)
        axes[1, 0].set_title("Error of the worst gradient", loc="left")
        _draw_times(axes[1, 1], sweep, "gradient")
        axes[1, 1].set_title("Time of the gradient", loc="left")
    for axis in axes[-1]:
        axis.set_xlabel("sequence length (steps)")
    for axis in axes.flat:
        _arrange(axis)
    lines, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    d, n = case.shape.channels, case.shape.d_state
    figure.supxlabel(
        f"{case.dtype}, {d} channels, d_state {n}; errors against a float64 oracle, median times",
        fontsize=7,
        color=_QUIET,
    )
    return figure


def _draw_errors(
    axis: Axes, sweep: Sequence[Comparison], error_of: Callable[[Row], float | None]
) -> None:
    _draw_lines(axis, sweep, error_of)
    roundoff = _ROUNDOFF[sweep[0].case.dtype]
    axis.axhline(roundoff, color=_QUIET, lw=0.8, ls=(0, (4, 3)), zorder=0)
    axis.annotate(
        f"unit roundoff of {sweep[0].case.dtype}",
        (1, roundoff),
        xycoords=("axes fraction", "data"),
        xytext=(0, 2),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=7,
        color=_QUIET,
    )
    axis.set_ylabel("relative error (Euclidean norm)")


def _draw_times(axis: Axes, sweep: Sequence[Comparison], kind: str) -> None:
    def time_of(row: Row) -> float | None:
        timing = getattr(row, kind)
        return None if timing is None else timing.run_ms

    _draw_lines(axis, sweep, time_of)
    axis.set_ylabel("time (ms)")


def _draw_lines(
    axis: Axes, sweep: Sequence[Comparison], value_of: Callable[[Row], float | None]
) -> None:
    """One line an implementation that ran; markers shrink, so that equal lines all show."""
    ran = [row.implementation for item in sweep for row in item.rows if row.reason is None]
    names_of_lines = tuple(dict.fromkeys(ran))
    sizes = np.linspace(_LARGEST_MARKER, _SMALLEST_MARKER, len(names_of_lines))
    for name, size, (colour, marker) in zip(names_of_lines, sizes, cycle(_STYLES), strict=False):
        points = _points(sweep, name, value_of)
        axis.plot(*points, marker, ls="-", color=colour, label=name, ms=size, lw=1.2, mew=0)


def _points(
    sweep: Sequence[Comparison], name: str, value_of: Callable[[Row], float | None]
) -> tuple[list[int], list[float]]:
    lengths, values = [], []
    for comparison in sweep:
        for row in comparison.rows:
            if row.implementation == name and row.reason is None:
                value = value_of(row)
                if value is not None and np.isfinite(value) and value > 0:
                    lengths.append(comparison.case.shape.length)
                    values.append(value)
    return lengths, values


def _error_of_y(row: Row) -> float:
    return row.errors["y"].norm


def _error_of_gradients(row: Row) -> float | None:
    gradients = [row.errors[n].norm for n in names(row.errors) if n not in ("y", "state")]
    return max(gradients) if gradients else None


def _arrange(axis: Axes) -> None:
    """Logarithmic axes with ticks at powers, and a light grid."""
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_locator(LogLocator(base=4, numticks=12))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())
    low, high = axis.get_ylim()
    if high < 10 * low:
        middle = np.sqrt(low * high)
        axis.set_ylim(middle / 4, middle * 4)
    axis.grid(which="major", color="#e4e6ea", lw=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(colors=_INK)
