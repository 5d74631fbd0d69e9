"""Time and memory of whole networks, and how much of the time the selective scans take.

  export GLIBC_TUNABLES=glibc.malloc.hugetlb=1    # as the Makefile does; see README
  python benchmarks/networks.py zzhnet_tiny mambabcd_tiny
  python benchmarks/networks.py mambabcd_tiny --train --batch 2

Figures are medians after compilation. The share of scans is the time of the network's scans run
alone, on random inputs of the same shapes, over the time of the whole forward pass. A program's
memory is its temporaries, arguments and results, those written over arguments counted once.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from zzhnet_jax.kernels.cross_scan import selective_scan_2d
from zzhnet_jax.models import functional, registry
from zzhnet_jax.models.cost import replace_everywhere
from zzhnet_jax.models.vssm import scans


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median time of a call, after one that is not counted."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def compiled(function: Callable, *arguments: Any, **options: Any) -> tuple[Callable, float]:
    """The function compiled for its arguments, and the seconds that took."""
    lowered = jax.jit(function, **options).lower(*arguments)
    began = time.perf_counter()
    program = lowered.compile()
    return program, time.perf_counter() - began


def random_like(shape: jax.ShapeDtypeStruct, seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape.shape, shape.dtype)


def scan_seconds(trace: Callable[[], Any], repeats: int) -> float:
    """Seconds that all two-dimensional scans of a network take by themselves."""
    calls: list[tuple[tuple, dict]] = []

    def record(
        *arguments: Any, delta_bias: jax.Array, dt_proj: jax.Array, **options: Any
    ) -> jax.Array:
        arrays = (*arguments, delta_bias, dt_proj)
        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
        calls.append((tuple(shapes), options))
        return selective_scan_2d(*arguments, delta_bias=delta_bias, dt_proj=dt_proj, **options)

    with mock.patch.object(scans, "selective_scan_2d", record):
        trace()
    total = 0.0
    for shapes, options in calls:
        arrays = [random_like(shape, i) for i, shape in enumerate(shapes)]
        arrays[2] = -jnp.exp(arrays[2])

        def scan(*arrays: jax.Array, options: dict = options) -> jax.Array:
            *given, delta_bias, dt_proj = arrays
            return selective_scan_2d(*given, delta_bias=delta_bias, dt_proj=dt_proj, **options)

        program, _ = compiled(scan, *arrays)
        total += median_seconds(lambda p=program, a=arrays: p(*a), repeats)
    return total


def build(name: str, *, remat: bool = False) -> tuple[Any, Any, Any]:
    config = replace_everywhere(registry.preset(name), "remat", remat)
    graphdef, params, stats = functional.abstract(
        lambda rngs: registry.build(name, config, 2, rngs=rngs)
    )
    # Time does not depend on the weights, and drawing millions of them takes longer than to run.
    params = jax.tree.map(lambda leaf: 0.02 * random_like(leaf, leaf.size % 997), params)
    stats = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), stats)
    return graphdef, params, stats


def forward_figures(name: str, size: int, batch: int, repeats: int) -> dict[str, float]:
    graphdef, params, stats = build(name)
    shape = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
    images = [random_like(shape, i) for i in range(registry.num_images(name))]

    def forward(params: Any, *images: jax.Array) -> Any:
        return functional.apply(graphdef, params, stats, *images)[0]

    program, compile_seconds = compiled(forward, params, *images)
    seconds = median_seconds(lambda: program(params, *images), repeats)
    # A new function, since the trace of `forward` itself is remembered and would not be made again.
    scanning = scan_seconds(
        lambda: jax.eval_shape(lambda *a: forward(*a), params, *images), repeats
    )
    return {
        "forward_seconds": seconds,
        "scan_share": scanning / seconds,
        "compile_seconds": compile_seconds,
        "temporary_mb": program.memory_analysis().temp_size_in_bytes / 1e6,
    }


def train_figures(name: str, size: int, batch: int, repeats: int, remat: bool) -> dict[str, float]:
    graphdef, params, stats = build(name, remat=remat)
    shape = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
    images = [random_like(shape, i) for i in range(registry.num_images(name))]

    def loss(params: Any, *images: jax.Array) -> jax.Array:
        key = jax.random.key(0)
        output, _ = functional.apply(graphdef, params, stats, *images, train=True, key=key)
        return sum(jnp.mean(jnp.square(leaf)) for leaf in jax.tree.leaves(output))

    def step(params: Any, *images: jax.Array) -> Any:
        gradient = jax.grad(loss)(params, *images)
        return jax.tree.map(lambda p, g: p - 1e-4 * g, params, gradient)

    program, compile_seconds = compiled(step, params, *images, donate_argnums=0)
    memory = program.memory_analysis()

    def run() -> Any:
        nonlocal params
        params = program(params, *images)
        return params

    seconds = median_seconds(run, repeats)
    whole = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    whole -= memory.alias_size_in_bytes
    return {
        "step_seconds": seconds,
        "compile_seconds": compile_seconds,
        "temporary_mb": memory.temp_size_in_bytes / 1e6,
        "program_mb": whole / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="networks, as `zzhnet models` lists them")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--train", action="store_true", help="a step of gradient descent as well")
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    results = {}
    for name in options.models:
        arguments = (name, options.size, options.batch, options.repeats)
        results[name] = {"forward": forward_figures(*arguments)}
        if options.train:
            for remat in (False, True):
                key = "step, blocks recomputed" if remat else "step"
                results[name][key] = train_figures(*arguments, remat)
    device = jax.devices()[0]
    table = Table(
        title=f"batch {options.batch}, {options.size}x{options.size}, {device.device_kind}, jax"
        f" {jax.__version__}"
    )
    headings = ("seconds", "in scans", "compile, s", "temporary, MB", "program, MB")
    for heading in ("network", "program", *headings):
        table.add_column(heading, justify="left" if heading in ("network", "program") else "right")
    for name, programs in results.items():
        for program, figures in programs.items():
            seconds = figures.get("forward_seconds", figures.get("step_seconds"))
            share = f"{figures['scan_share']:.0%}" if "scan_share" in figures else ""
            table.add_row(
                name,
                program,
                f"{seconds:.3f}",
                share,
                f"{figures['compile_seconds']:.1f}",
                f"{figures['temporary_mb']:.0f}",
                f"{figures['program_mb']:.0f}" if "program_mb" in figures else "",
            )
    Console().print(table)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"options": vars(options), "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
