"""Compiles the scan kernels, and a whole training step, for accelerators that are not here.

  make aot                      everything: 5 kinds of TPU, 3 of GPU, a training step on two of them
  make aot AOT_ARGS=--quick     the kernels on one kind each

Prints one table and ends with exit code 1 if something does not compile, spills registers or does
not fit. Memory is that of one device: for kernels the temporaries of the gradient, which holds the
forward kernel as well; for a step everything. Bundles are those of a TPU kernel's innermost loops,
for each time step and 128 channels.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from zzhnet_jax.aot.gpu_resources import CAPABILITIES
from zzhnet_jax.aot.report import quantity
from zzhnet_jax.comparison.ahead_of_time import TPU_TARGETS, compile_ahead
from zzhnet_jax.comparison.cases import make_case
from zzhnet_jax.kernels.selective_scan.shapes import ScanShape

ROOT = Path(__file__).resolve().parents[1]
# A length that no block divides, at the d_state of vision networks and of language models.
SCANS = tuple(ScanShape(f"d_state {n}", 2, 1000, 768, 4, n) for n in (1, 16))
STEP_TARGETS = ("v5e:2x2", "cuda:h100:1")


@dataclasses.dataclass(frozen=True)
class Row:
    """One program on one target.

    Attributes:
      program: what was compiled.
      target: for what.
      seconds: how long that took; for kernels, all of one gradient together.
      memory: bytes of one device.
      registers: of a thread.
      spilled: bytes of a thread (GPU), or registers in inner loops (TPU), that went to memory.
      shared: bytes of shared memory of a program.
      bundles: issued for each time step and 128 channels.
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


def kernel_rows(name: str, **targets: Any) -> Iterator[Row]:
    """All kernels of an implementation on one target; whatever a compiler throws is a row too."""
    ((target,),) = targets.values()
    for scan in SCANS:
        began = time.perf_counter()
        try:
            found = compile_ahead(make_case(scan), [name], gradients=True, **targets)
        except Exception as error:
            found = [{"reason": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}]
        found = found or [{"reason": "no kernel was found in the program"}]
        seconds = time.perf_counter() - began
        unlike = {json.dumps(kernel): kernel for kernel in found}  # the gradient calls some twice
        for kernel in unlike.values():
            spilled = kernel.get("spilled bytes", kernel.get("spills"))
            failure = kernel.get("reason") or (f"{spilled} spilled" if spilled else None)
            yield Row(
                f"{name} {kernel.get('kernel', '').removeprefix('selective_scan_')}, {scan.name}",
                kernel.get("target", str(target)),
                seconds,
                memory=kernel["temp MB"] * 1e6 if "temp MB" in kernel else None,
                registers=kernel.get("registers"),
                spilled=spilled,
                shared=kernel.get("shared bytes"),
                bundles=kernel.get("bundles a step"),
                failure=failure,
            )


def step_row(network: str, target: str, batch: int, size: int) -> Row:
    """A whole training step on one device, by the command that users have for it."""
    command = [sys.executable, "-m", "zzhnet_jax.cli", "train", "--dry-run", "--json"]
    command += ["--target", target, "--mesh.data", "1", "--model.name", network]
    command += ["--data.batch-size", str(batch), "--data.crop-size", str(size)]
    environment = {k: v for k, v in os.environ.items() if k != "LIBTPU_INIT_ARGS"}
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    seconds = time.perf_counter() - began
    program = f"{network} step, batch {batch}, {size} x {size}"
    if not done.stdout:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return Row(program, target, seconds, failure=last[:200])
    found = json.loads(done.stdout)
    failure = None if found["fits"] else "does not fit the device"
    return Row(program, target, seconds, found["memory_bytes"]["peak"], failure=failure)


def all_rows(*, quick: bool) -> Iterator[Row]:
    """Everything, or what fits in about 3 minutes."""
    for target in ("v5e:2x2",) if quick else TPU_TARGETS:
        yield from kernel_rows("pallas_tpu", tpus=(target,))
    for name in ("pallas_gpu", "triton"):
        for capability in (90,) if quick else CAPABILITIES:
            yield from kernel_rows(name, capabilities=(capability,))
    for target in () if quick else STEP_TARGETS:
        yield step_row("mambabcd_tiny", target, 8, 256)


def print_table(rows: list[Row]) -> None:
    table = Table(title=f"compiled ahead of time, jax {jax.__version__}")
    table.add_column("program", no_wrap=True)
    table.add_column("target")
    for heading in ("memory", "registers", "spilled", "shared", "bundles", "compile, s"):
        table.add_column(heading, justify="right")
    table.add_column("verdict", overflow="fold")

    def text(value: Any, show: Callable[[Any], str] = str) -> str:
        return "" if value is None else show(value)

    for row in rows:
        table.add_row(
            row.program,
            row.target,
            text(row.memory, lambda size: quantity(size, "B")),
            text(row.registers),
            text(row.spilled),
            text(row.shared, lambda size: quantity(size, "B")),
            text(row.bundles, lambda count: f"{count:.2f}"),
            f"{row.seconds:.1f}",
            row.failure or "ok",
        )
    Console(width=140).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="what fits in about 3 minutes")
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    modules = ("libtpu", "triton", "jax_triton", "jax_cuda12_plugin")
    if absent := [module for module in modules if find_spec(module) is None]:
        print(f"error: not installed: {', '.join(absent)}; run `make aot`", file=sys.stderr)
        return 2
    began, rows = time.perf_counter(), []
    for row in all_rows(quick=options.quick):
        rows.append(row)
        print(f"{row.program} on {row.target}: {row.failure or 'ok'}", file=sys.stderr, flush=True)
    print_table(rows)
    print(f"{time.perf_counter() - began:.0f} s in all")
    if options.json:
        with open(options.json, "w") as file:
            json.dump([dataclasses.asdict(row) for row in rows], file, indent=2)
    return 1 if any(row.failure for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
