"""Draws the figures of docs/kernels.md: how each implementation cuts the scan.

    python docs/draw_kernels.py

One language for all: time runs to the right; boxes of a row that no arrow joins are computed at
once; an arrow is a state that one box waits for; a dot is a state kept for the gradient.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

IMAGES = Path(__file__).parent / "images"
INK, QUIET, PAPER = "#191c21", "#6b7280", "#ffffff"
WORK, STATE, KEPT = "#cfe3f3", "#fbe3cf", "#D55E00"
EDGE = "#0072B2"
WIDTH = 16.0  # time steps shown
RC = {
    "font.size": 8,
    "svg.fonttype": "path",
    "svg.hashsalt": "zzhnet",
    "font.family": "DejaVu Sans",
}


def canvas(rows: float, *, labels: float = 4.6) -> tuple[Figure, Axes]:
    """A figure of so many rows, the label column on the left."""
    figure = Figure(figsize=(7.6, 0.36 * rows + 0.12))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_xlim(-labels, WIDTH + 0.6)
    axis.set_ylim(-rows, 0.25)
    axis.axis("off")
    return figure, axis


def label(axis: Axes, row: float, text: str, note: str = "") -> None:
    """Names a row, on the left of it."""
    axis.text(-0.3, -row - 0.5, text, ha="right", va="center", color=INK)
    if note:
        axis.text(-0.3, -row - 1.02, note, ha="right", va="center", color=QUIET, fontsize=6.5)


def boxes(
    axis: Axes, row: float, count: int, *, ticks: int = 0, colour: str = WORK, size: float = 0.86
) -> list[tuple[float, float]]:
    """Equal boxes over the whole time axis; gives their left and right edges."""
    width = WIDTH / count
    gap = width * (1 - size) / 2
    edges = []
    for k in range(count):
        left, right = k * width + gap, (k + 1) * width - gap
        axis.add_patch(
            Rectangle((left, -row - 0.85), right - left, 0.7, fc=colour, ec=EDGE, lw=0.8)
        )
        for tick in range(1, ticks):
            x = left + (right - left) * tick / ticks
            axis.plot((x, x), (-row - 0.85, -row - 0.15), color=EDGE, lw=0.5, alpha=0.6)
        edges.append((left, right))
    return edges


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """A state that is passed on."""
    style = {"arrowstyle": "-|>", "mutation_scale": 7, "shrinkA": 0, "shrinkB": 0}
    axis.add_patch(FancyArrowPatch(start, end, lw=0.9, color=INK, **style))


def chain(axis: Axes, row: float, edges: Sequence[tuple[float, float]], *, back: bool) -> None:
    """Arrows from each box to the next one in scan order."""
    y = -row - 0.5
    for (_, right), (left, _) in pairwise(edges):
        arrow(axis, *(((left, y), (right, y)) if back else ((right, y), (left, y))))


def dots(axis: Axes, row: float, xs: Sequence[float]) -> None:
    """States kept for the gradient."""
    axis.plot(xs, [-row] * len(xs), "o", color=KEPT, ms=3.6, clip_on=False)


def tree(axis: Axes, row: float, xs: Sequence[float]) -> float:
    """A parallel prefix over points: levels of pairwise joins; gives the number of levels."""
    level, distance, top = 0, 1, -row
    while distance < len(xs):
        y, below = top - 0.55 * level, top - 0.55 * (level + 1)
        for k, x in enumerate(xs):
            axis.plot((x, x), (y, below), color=EDGE, lw=0.6)
            if k >= distance:
                axis.plot((xs[k - distance], x), (y, below), color=EDGE, lw=0.6)
        axis.plot(xs, [below] * len(xs), "o", ms=2.2, color=EDGE)
        level, distance = level + 1, 2 * distance
    return level * 0.55


def sequential() -> Figure:
    """One step after another."""
    figure, axis = canvas(1.6)
    label(axis, 0, "one step at a time", "all channels at once")
    edges = boxes(axis, 0, 16, size=0.62)
    chain(axis, 0, edges, back=False)
    dots(axis, 1.2, [right + 0.19 for _, right in edges])
    return figure


def associative() -> Figure:
    """A parallel prefix over the whole length."""
    figure, axis = canvas(4.8)
    label(axis, 0, "decay and drive", "of every step")
    edges = boxes(axis, 0, 16, size=0.62)
    middles = [(left + right) / 2 for left, right in edges]
    label(axis, 1.6, "parallel prefix", "log2(length) levels")
    depth = tree(axis, 0.95, middles)
    label(axis, 0.95 + depth + 0.1, "y of every step")
    boxes(axis, 0.95 + depth + 0.1, 16, size=0.62)
    dots(axis, 0.95 + depth + 1.25, middles)
    return figure


def chunked() -> Figure:
    """Chunk after chunk."""
    figure, axis = canvas(3.4)
    label(axis, 0, "forward", "a chunk at once, in cache")
    edges = boxes(axis, 0, 4, ticks=8)
    chain(axis, 0, edges, back=False)
    dots(axis, 1.25, [left for left, _ in edges])
    label(axis, 1.7, "gradient", "states of a chunk again")
    edges = boxes(axis, 1.7, 4, ticks=8, colour=STATE)
    chain(axis, 1.7, edges, back=True)
    for left, _ in edges:
        arrow(axis, (left, -1.32), (left + 0.12, -1.83))
    return figure


def pallas_tpu() -> Figure:
    """Channel blocks in parallel, time blocks one after another."""
    figure, axis = canvas(4.0)
    for row in range(2):
        label(axis, row, f"channels, block {row}", "state in VMEM" if row else "")
        edges = boxes(axis, row, 4, ticks=8)
        chain(axis, row, edges, back=False)
    dots(axis, 2.2, [left for left, _ in edges])
    label(axis, 2.6, "gradient", "states of a chunk in VMEM")
    edges = boxes(axis, 2.6, 4, ticks=8, colour=STATE)
    chain(axis, 2.6, edges, back=True)
    for left, _ in edges:
        arrow(axis, (left, -2.27), (left + 0.12, -2.73))
    return figure


def pallas_gpu() -> Figure:
    """Segments of time in parallel, twice."""
    figure, axis = canvas(4.1)
    label(axis, 0, "ends", "a program a segment")
    edges = boxes(axis, 0, 4, ticks=8)
    label(axis, 1.2, "combine", "a state a segment")
    states = [(right - 0.5, right) for _, right in edges]
    for (left, right), (_, x) in zip(states, edges, strict=True):
        axis.add_patch(Rectangle((left, -2.05), right - left, 0.7, fc=STATE, ec=EDGE, lw=0.8))
        arrow(axis, (x - 0.25, -0.87), (x - 0.25, -1.33))
    chain(axis, 1.2, states, back=False)
    label(axis, 2.45, "apply", "a program a segment")
    edges = boxes(axis, 2.45, 4, ticks=8)
    for (_, right), (left, _) in zip(states, edges[1:], strict=False):
        arrow(axis, (right - 0.1, -2.07), (left + 0.15, -2.58))
    dots(axis, 3.75, [left + (right - left) * k / 2 for left, right in edges for k in range(2)])
    return figure


def triton() -> Figure:
    """Tiles of time in parallel, with a prefix over and inside them."""
    figure, axis = canvas(4.6)
    label(axis, 0, "ends", "a program a tile")
    edges = boxes(axis, 0, 8, ticks=4)
    ends = [(left + right) / 2 for left, right in edges]
    label(axis, 1.35, "combine", "a parallel prefix over tiles")
    depth = tree(axis, 0.95, ends)
    row = 0.95 + depth + 0.15
    label(axis, row, "outputs", "a parallel prefix in a tile")
    edges = boxes(axis, row, 8)
    for left, right in edges:
        for distance in (1, 2):
            xs = np.linspace(left + 0.2, right - 0.2, 4)
            y = -row - 0.28 - 0.22 * (distance - 1)
            for k, x in enumerate(xs):
                axis.plot((x, x), (y, y - 0.22), color=EDGE, lw=0.5)
                if k >= distance:
                    axis.plot((xs[k - distance], x), (y, y - 0.22), color=EDGE, lw=0.5)
    dots(axis, row + 1.2, [left for left, _ in edges])
    return figure


def fused() -> Figure:
    """The four routes through one image, each reading and adding in place."""
    figure = Figure(figsize=(7.2, 1.75))
    titles = ("rows, forward", "columns, forward", "rows, backward", "columns, backward")
    for k, title in enumerate(titles):
        axis = figure.add_axes((0.02 + 0.245 * k, 0.02, 0.225, 0.82))
        axis.set_xlim(-0.6, 5.6)
        axis.set_ylim(-0.6, 3.6)
        axis.set_aspect("equal")
        axis.axis("off")
        axis.set_title(title, fontsize=8, color=INK, pad=2)
        for x, y in np.ndindex(6, 4):
            corner = (x - 0.42, y - 0.42)
            axis.add_patch(Rectangle(corner, 0.84, 0.84, fc=WORK, ec=EDGE, lw=0.5))
        columns, backward = k % 2 == 1, k >= 2
        lines = 6 if columns else 4
        for line in range(lines):
            ends = ((line, 3), (line, 0)) if columns else ((0, 3 - line), (5, 3 - line))
            start, end = ends[::-1] if backward else ends
            arrow(axis, start, end)
    return figure


FIGURES = {
    "sequential": sequential,
    "associative": associative,
    "chunked": chunked,
    "pallas_tpu": pallas_tpu,
    "pallas_gpu": pallas_gpu,
    "triton": triton,
    "fused": fused,
}


def main() -> None:
    """Writes every figure."""
    with matplotlib.rc_context(RC):
        for name, draw in FIGURES.items():
            draw().savefig(IMAGES / f"scan_{name}.svg", facecolor=PAPER, metadata={"Date": None})


if __name__ == "__main__":
    main()
