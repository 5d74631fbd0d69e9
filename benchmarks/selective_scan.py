"""Time, compile time and memory of every selective scan that runs here, side by side.

    python benchmarks/selective_scan.py [--repeats 10] [--json scans.json]

Implementations take turns and the shortest of the repeats counts, so that other work on the machine
disturbs all of them alike; factors are relative to "plain", the textbook scan written out below.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from zzhnet_jax.kernels.selective_scan import available_implementations, selective_scan
from zzhnet_jax.kernels.selective_scan.shapes import (
    MANY_STATES,
    ONE_STATE,
    VMAMBA_TINY,
    ScanShape,
)

SHAPES = (ONE_STATE, MANY_STATES, *VMAMBA_TINY)
Arguments = dict[str, jax.Array]


@dataclass
class Measurement:
    """One implementation at one shape; the gradient's time includes the forward pass."""

    implementation: str
    forward_ms: float
    gradient_ms: float
    forward_compile_s: float
    gradient_compile_s: float
    gradient_temp_mb: float


def plain(
    u: jax.Array, delta: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array, D: jax.Array
) -> jax.Array:
    """The scan as one writes it first: everything at full size, one associative scan, autodiff."""
    step = jax.nn.softplus(delta)
    B, C = (jnp.repeat(x, u.shape[2] // x.shape[2], axis=2) for x in (B, C))
    decay = jnp.exp(step[..., None] * A)
    drive = (step * u)[..., None] * B

    def compose(one: tuple, other: tuple) -> tuple:
        return one[0] * other[0], other[0] * one[1] + other[1]

    _, states = jax.lax.associative_scan(compose, (decay, drive), axis=1)
    return jnp.sum(states * C, axis=-1) + D * u


def random_arguments(shape: ScanShape) -> Arguments:
    _, b, length, d, g, n = shape
    draw = np.random.default_rng(0).standard_normal
    arrays = dict(
        u=draw((b, length, d)),
        delta=draw((b, length, d)) * 0.5 - 1,
        A=-np.exp(draw((d, n)) * 0.5),
        B=draw((b, length, g, n)),
        C=draw((b, length, g, n)),
        D=draw(d),
    )
    return {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}


def compiled(function: Callable, *arguments: object) -> tuple[jax.stages.Compiled, float]:
    """The compiled function and the seconds that tracing and compiling took."""
    start = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    return program, time.perf_counter() - start


def milliseconds(program: jax.stages.Compiled, *arguments: object) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return 1e3 * (time.perf_counter() - start)


def measure(shape: ScanShape, repeats: int) -> list[Measurement]:
    arguments = random_arguments(shape)
    cotangent = jnp.sin(jnp.arange(arguments["u"].size, dtype=jnp.float32))
    cotangent = cotangent.reshape(arguments["u"].shape)
    scans: dict[str, Callable] = {"plain": lambda x: plain(**x)}
    for name in available_implementations():
        scan = partial(selective_scan, delta_softplus=True, implementation=name)
        scans[name] = lambda x, scan=scan: scan(**x)

    programs = {}
    for name, scan in scans.items():

        def gradient(x: Arguments, cotangent: jax.Array, scan: Callable = scan) -> Arguments:
            return jax.vjp(scan, x)[1](cotangent)[0]

        programs[name] = (
            compiled(scan, arguments),
            compiled(gradient, arguments, cotangent),
        )

    best = {name: (np.inf, np.inf) for name in scans}
    for _ in range(repeats + 1):  # the first round warms up
        for name, ((forward, _), (gradient, _)) in programs.items():
            times = milliseconds(forward, arguments), milliseconds(gradient, arguments, cotangent)
            best[name] = tuple(map(min, best[name], times))
    return [
        Measurement(
            name,
            *best[name],
            forward_compile_s=forward_seconds,
            gradient_compile_s=gradient_seconds,
            gradient_temp_mb=gradient.memory_analysis().temp_size_in_bytes / 1e6,
        )
        for name, ((_, forward_seconds), (gradient, gradient_seconds)) in programs.items()
    ]


def table(shape: ScanShape, rows: list[Measurement]) -> Table:
    _, b, length, d, g, n = shape
    title = f"{shape.name}: u ({b}, {length}, {d}), groups {g}, d_state {n}"
    view = Table(title=title, title_justify="left", title_style="bold")
    view.add_column("implementation")
    for column in ("forward", "", "gradient", "", "compile", "compile", "memory", ""):
        view.add_column(column, justify="right")
    view.add_row("", "ms", "x", "ms", "x", "fwd s", "grad s", "MB", "x", style="dim")
    reference = rows[0]
    for row in rows:
        view.add_row(
            row.implementation,
            f"{row.forward_ms:.1f}",
            f"{reference.forward_ms / row.forward_ms:.1f}",
            f"{row.gradient_ms:.1f}",
            f"{reference.gradient_ms / row.gradient_ms:.1f}",
            f"{row.forward_compile_s:.1f}",
            f"{row.gradient_compile_s:.1f}",
            f"{row.gradient_temp_mb:.0f}",
            f"{reference.gradient_temp_mb / row.gradient_temp_mb:.0f}",
        )
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=10, help="timed runs of each (default 10)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()

    console = Console()
    device = jax.devices()[0]
    console.print(f"jax {jax.__version__} on {device.device_kind} ({platform.processor() or '?'})")
    console.print(
        "x: how many times faster or smaller than plain; memory: gradient's temporaries\n"
    )
    results = []
    for shape in SHAPES:
        rows = measure(shape, options.repeats)
        console.print(table(shape, rows))
        results.append(dict(shape._asdict(), measurements=[asdict(row) for row in rows]))
    if options.json:
        report = dict(jax=jax.__version__, device=device.device_kind, results=results)
        options.json.write_text(json.dumps(report, indent=2) + "\n")
        console.print(f"wrote {options.json}")


if __name__ == "__main__":
    main()
