"""Compiles the scan kernels, and a whole training step, for accelerators that are not here.

  make aot                      everything: 5 kinds of TPU, 3 of GPU, a training step on two of them
  make aot AOT_ARGS=--quick     kernels on one kind each, and a small network's step

Prints one table and ends with exit code 1 if something does not compile, spills registers or does
not fit. Memory is that of one device: for kernels the temporaries, for a step everything.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from zzhnet_jax.aot.compile import compile_for, describe
from zzhnet_jax.aot.gpu_resources import GpuResources, pallas_resources
from zzhnet_jax.aot.report import quantity
from zzhnet_jax.aot.targets import parse_target
from zzhnet_jax.aot.tpu_schedule import bundles_per_step, dump_flags, read_schedule
from zzhnet_jax.kernels.selective_scan.pallas_gpu import pallas_gpu_scan
from zzhnet_jax.kernels.selective_scan.pallas_tpu import pallas_tpu_scan
from zzhnet_jax.kernels.selective_scan.pallas_tpu_plan import SUBLANES, Plan

TPUS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
CAPABILITIES = {80: "sm_80", 90: "sm_90", 100: "sm_100"}
STATES = (1, 16)
# A scan that no block divides evenly.
BATCH, LENGTH, CHANNELS, GROUPS = 2, 1000, 768, 4
KERNELS = {"forward": "selective_scan_forward", "gradient": "selective_scan_backward"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One program on one target.

    Attributes:
      program: what was compiled.
      target: for what.
      seconds: how long that took.
      memory: bytes of one device.
      registers: of a thread.
      spilled: bytes of a thread that did not fit them.
      shared: bytes of shared memory of a program.
      bundles: scheduled bundles of the innermost loops for each time step and 128 channels.
      failure: why it did not compile, or may not be used.
    """

    program: str
    target: str
    seconds: float
    memory: float | None = None
    registers: int | None = None
    spilled: int | None = None
    shared: int | None = None
    bundles: float | None = None
    failure: str | None = None


def scan_arguments(d_state: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes of u, delta, A, B, C, D and the bias."""

    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    sequence = shape(BATCH, LENGTH, CHANNELS)
    matrix = shape(BATCH, LENGTH, GROUPS, d_state)
    per_channel = shape(CHANNELS)
    A = shape(CHANNELS, d_state)
    return sequence, sequence, A, matrix, matrix, per_channel, per_channel


def halves(scan: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """The forward pass, and the gradient in every argument."""

    def forward(*arrays: jax.Array) -> jax.Array:
        return scan(*arrays, None, delta_softplus=True, reverse=False)[0]

    def loss(*arrays: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(forward(*arrays).astype(jnp.float32)))

    return {"forward": forward, "gradient": jax.grad(loss, argnums=tuple(range(7)))}


def attempt(program: str, target: str, compile_it: Callable[[], dict[str, Any]]) -> Row:
    """A row of what a function finds; an exception becomes the row's failure."""
    began = time.perf_counter()
    try:
        found = compile_it()
    except Exception as error:  # whatever a compiler throws is the result
        found = {"failure": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    return Row(program, target, time.perf_counter() - began, **found)


def tpu_rows(target: str, dump: Path) -> list[Row]:
    """The TPU kernel's halves for one kind of TPU.

    Args:
      target: the kind.
      dump: folder to which libtpu writes schedules, as it was told before it was loaded.
    """
    rows = []
    for d_state in STATES:
        plan = Plan(BATCH, LENGTH, CHANNELS, GROUPS, d_state, True, False)
        for half, function in halves(pallas_tpu_scan).items():

            def compile_it(
                function: Any = function, half: str = half, plan: Plan = plan
            ) -> dict[str, Any]:
                chosen = parse_target(target)
                compiled = compile_for(chosen, function, *scan_arguments(plan.d_state))
                result = describe(compiled, chosen.chip, chosen.devices[:1])
                if not result.costs.kernel_calls:
                    return {"failure": "the compiled program calls no kernel"}
                schedule = read_schedule(dump, KERNELS[half])
                spills = sum(loop.spills for loop in schedule.loops if loop.innermost)
                return {
                    "memory": result.memory.temporaries,
                    "spilled": spills,
                    "bundles": bundles_per_step(schedule, steps=SUBLANES, tiles=plan.slots),
                    "failure": f"{spills} registers spilled in inner loops" if spills else None,
                }

            rows.append(attempt(f"pallas_tpu {half}, d_state {d_state}", target, compile_it))
    return rows


def gpu_rows(capability: int) -> list[Row]:
    """The kernels of the Pallas GPU implementation for one kind of GPU."""
    rows = []
    for d_state in STATES:
        for half, function in halves(pallas_gpu_scan).items():

            def compile_it(function: Any = function, d_state: int = d_state) -> dict[str, Any]:
                arguments = scan_arguments(d_state)
                return worst(pallas_resources(function, *arguments, capability=capability))

            program = f"pallas_gpu {half}, d_state {d_state}"
            rows.append(attempt(program, CAPABILITIES[capability], compile_it))
    return rows


def worst(kernels: tuple[GpuResources, ...]) -> dict[str, Any]:
    """The largest figures of all kernels of a program; a spill is a failure."""
    if not kernels:
        return {"failure": "the program calls no kernel"}
    spilled = max(kernel.spill_bytes for kernel in kernels)
    return {
        "registers": max(kernel.registers for kernel in kernels),
        "spilled": spilled,
        "shared": max(kernel.shared_bytes for kernel in kernels),
        "failure": f"{spilled} bytes spilled" if spilled else None,
    }


def step_row(network: str, target: str, batch: int, size: int) -> Row:
    """A whole training step on one device, by the command that users have for it."""

    def compile_it() -> dict[str, Any]:
        command = [sys.executable, "-m", "zzhnet_jax.cli", "train", "--dry-run", "--json"]
        command += ["--target", target, "--mesh.data", "1", "--model.name", network]
        command += ["--data.batch-size", str(batch), "--data.crop-size", str(size)]
        environment = {k: v for k, v in os.environ.items() if k != "LIBTPU_INIT_ARGS"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if not done.stdout:
            return {"failure": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}
        found = json.loads(done.stdout)
        failure = None if found["fits"] else "does not fit the device"
        return {"memory": found["memory_bytes"]["peak"], "failure": failure}

    return attempt(f"{network} step, batch {batch}, {size} x {size}", target, compile_it)


def missing() -> list[str]:
    """Packages that this needs and that are not installed."""
    modules = ("libtpu", "triton", "jax_triton", "jax_cuda12_plugin")
    return [module for module in modules if find_spec(module) is None]


def print_table(rows: list[Row]) -> None:
    table = Table(title=f"compiled ahead of time, jax {jax.__version__}")
    table.add_column("program")
    table.add_column("target")
    for heading in ("memory", "registers", "spilled", "shared", "bundles", "compile, s"):
        table.add_column(heading, justify="right")
    table.add_column("verdict", overflow="fold")
    for row in rows:
        table.add_row(
            row.program,
            row.target,
            "" if row.memory is None else quantity(row.memory, "B"),
            "" if row.registers is None else str(row.registers),
            "" if row.spilled is None else str(row.spilled),
            "" if row.shared is None else quantity(row.shared, "B"),
            "" if row.bundles is None else f"{row.bundles:.2f}",
            f"{row.seconds:.1f}",
            row.failure or "ok",
        )
    Console(width=120).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="what fits in about 3 minutes")
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    if absent := missing():
        print(f"error: not installed: {', '.join(absent)}; run `make aot`", file=sys.stderr)
        return 2
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIBTPU_INIT_ARGS"] = dump_flags(Path(folder))
        for target in ("v5e:2x2",) if options.quick else TPUS:
            rows += tpu_rows(target, Path(folder))
    for capability in (90,) if options.quick else CAPABILITIES:
        rows += gpu_rows(capability)
    if options.quick:
        rows.append(step_row("zzhnet_nano", "v5e:2x2", 8, 64))
    else:
        for target in ("v5e:2x2", "cuda:h100:1"):
            rows.append(step_row("mambabcd_tiny", target, 8, 256))
    print_table(rows)
    print(f"{sum(row.seconds for row in rows):.0f} s in all")
    if options.json:
        with open(options.json, "w") as file:
            json.dump([dataclasses.asdict(row) for row in rows], file, indent=2)
    return 1 if any(row.failure for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
