"""Time, compile time and memory of every selective scan that runs here, side by side.

    python benchmarks/selective_scan.py [--repeats 10] [--json scans.json]
    python benchmarks/selective_scan.py --batch 32 --dtype bfloat16 --torch

Implementations take turns and the shortest of the repeats counts, so that other work on the machine
disturbs all of them alike; factors are relative to "plain", the textbook scan written out below.
With --torch PyTorch's kernel is one of them, on the same GPU, where PyTorch and one of the kernels
that `zzhnet_jax/comparison/dump_torch_scan.py` knows are installed; on a CPU it is a loop.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from zzhnet_jax.comparison.dump_torch_scan import find_kernel
from zzhnet_jax.comparison.timing import compile_program, milliseconds
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
    forward_compile_s: float = 0
    gradient_compile_s: float = 0
    gradient_temp_mb: float = 0


def plain(
    u: jax.Array, delta: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array, D: jax.Array
) -> jax.Array:
    """The scan as one writes it first: everything at full size, one associative scan, autodiff."""
    dtype = u.dtype
    u, delta, B, C = (x.astype(jnp.float32) for x in (u, delta, B, C))
    step = jax.nn.softplus(delta)
    B, C = (jnp.repeat(x, u.shape[2] // x.shape[2], axis=2) for x in (B, C))
    decay = jnp.exp(step[..., None] * A)
    drive = (step * u)[..., None] * B

    def compose(one: tuple, other: tuple) -> tuple:
        return one[0] * other[0], other[0] * one[1] + other[1]

    _, states = jax.lax.associative_scan(compose, (decay, drive), axis=1)
    return (jnp.sum(states * C, axis=-1) + D * u).astype(dtype)


def random_arguments(shape: ScanShape, dtype: str) -> Arguments:
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
    return {k: jnp.asarray(x, jnp.float32 if k in "AD" else dtype) for k, x in arrays.items()}


def torch_calls(arguments: Arguments) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """PyTorch's forward pass and its gradient, of the same arguments; on a CPU step by step."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    _, scan = find_kernel(torch, None if device == "cuda" else "loop")
    given = {}
    for name, x in arguments.items():
        tensor = torch.from_numpy(np.array(x, np.float32)).to(device, getattr(torch, str(x.dtype)))
        tensor = tensor if name in "AD" else tensor.movedim(1, -1).contiguous()
        given[name] = tensor.requires_grad_()
    values = [*given.values(), torch.zeros_like(given["D"])]  # a bias, which the kernels want
    cotangent = torch.ones_like(scan(*values))

    def forward() -> Any:
        with torch.no_grad():
            return scan(*values)

    return forward, lambda: torch.autograd.grad(scan(*values), list(given.values()), cotangent)


def torch_wait(_: Any) -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(shape: ScanShape, dtype: str, repeats: int, with_torch: bool) -> list[Measurement]:
    arguments = random_arguments(shape, dtype)
    cotangent = jnp.sin(jnp.arange(arguments["u"].size, dtype=jnp.float32))
    cotangent = cotangent.reshape(arguments["u"].shape).astype(dtype)
    scans: dict[str, Callable] = {"plain": lambda x: plain(**x)}
    for name in available_implementations():
        scan = partial(selective_scan, delta_softplus=True, implementation=name)
        scans[name] = lambda x, scan=scan: scan(**x)

    found, calls = {}, {}
    for name, scan in scans.items():

        def gradient(x: Arguments, cotangent: jax.Array, scan: Callable = scan) -> Arguments:
            return jax.vjp(scan, x)[1](cotangent)[0]

        try:
            forward = compile_program(scan, arguments)
            backward = compile_program(gradient, arguments, cotangent)
        except jax.errors.JaxRuntimeError as error:
            print(f"{name}: {str(error).splitlines()[0]}")
            continue
        seconds = forward.compile_s, backward.compile_s
        found[name] = Measurement(name, np.inf, np.inf, *seconds, backward.temp_bytes / 1e6)
        each = partial(forward.run, arguments), partial(backward.run, arguments, cotangent)
        calls[name] = (*each, jax.block_until_ready)
    if with_torch:
        found["torch"] = Measurement("torch", np.inf, np.inf)
        calls["torch"] = (*torch_calls(arguments), torch_wait)

    for _ in range(repeats + 1):  # the first round warms up
        for name, (forward, backward, wait) in calls.items():
            row = found[name]
            row.forward_ms = min(row.forward_ms, milliseconds(forward, wait))
            row.gradient_ms = min(row.gradient_ms, milliseconds(backward, wait))
    return list(found.values())


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
            f"{row.forward_ms:.3g}",
            f"{reference.forward_ms / row.forward_ms:.1f}",
            f"{row.gradient_ms:.3g}",
            f"{reference.gradient_ms / row.gradient_ms:.1f}",
            f"{row.forward_compile_s:.1f}",
            f"{row.gradient_compile_s:.1f}",
            f"{row.gradient_temp_mb:.0f}",
            f"{reference.gradient_temp_mb / max(row.gradient_temp_mb, 0.1):.0f}",
        )
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=10, help="timed runs of each (default 10)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--batch", type=int, help="sequences of every scan, in place of its own")
    parser.add_argument("--dtype", default="float32", help="of u, delta, B and C")
    parser.add_argument("--torch", action="store_true", help="PyTorch's kernel as well")
    options = parser.parse_args()

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too
    console = Console()
    device = jax.devices()[0]
    console.print(f"jax {jax.__version__} on {device.device_kind} ({platform.processor() or '?'})")
    console.print(
        "x: how many times faster or smaller than plain; memory: gradient's temporaries\n"
    )
    results = []
    for shape in SHAPES:
        shape = shape._replace(batch=options.batch or shape.batch)
        rows = measure(shape, options.dtype, options.repeats, options.torch)
        console.print(table(shape, rows))
        facts = dict(shape._asdict(), dtype=options.dtype)
        results.append(dict(facts, measurements=[asdict(row) for row in rows]))
    if options.json:
        report = dict(jax=jax.__version__, device=device.device_kind, results=results)
        options.json.write_text(json.dumps(report, indent=2) + "\n")
        console.print(f"wrote {options.json}")


if __name__ == "__main__":
    main()
