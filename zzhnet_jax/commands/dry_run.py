"""`zzhnet train --dry-run`: the training step compiled, not run, and what it will take."""

import json
import re
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zzhnet_jax.aot.chips import chip_of
from zzhnet_jax.aot.compile import Description, describe, memory_errors
from zzhnet_jax.aot.report import cost_lines, quantity
from zzhnet_jax.aot.targets import parse_target
from zzhnet_jax.training.config import ExperimentConfig
from zzhnet_jax.training.program import Program
from zzhnet_jax.training.sharding import make_mesh
from zzhnet_jax.training.state import Build

_WIDTH = 100


@dataclass(frozen=True)
class ShardingRow:
    """Parameters that are alike but for the numbers in their paths.

    Attributes:
      pattern: their path in the training state, with * for numbers.
      shape: of each.
      axes: mesh axes that each of its axes is split over; "-" is whole.
      count: how many there are.
    """

    pattern: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    count: int


@dataclass(frozen=True)
class DryRun:
    """What a dry run found.

    Attributes:
      config: the experiment.
      mesh: devices it was compiled for.
      target: how the user named them; None for those that are here.
      parameters: how many the network has.
      rules: the table that says how arrays are split: kind, path or name of an axis, mesh axes.
      rows: how the parameters are split by it.
      description: what a step takes of each device.
      seconds: how long compilation took.
    """

    config: ExperimentConfig
    mesh: Mesh
    target: str | None
    parameters: int
    rules: tuple[tuple[str, str, str], ...]
    rows: tuple[ShardingRow, ...]
    description: Description
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Everything, for another program."""
        data = self.config.data
        return {
            "network": self.config.model.name,
            "parameters": self.parameters,
            "batch_size": data.batch_size,
            "crop_size": data.crop_size,
            "target": self.target,
            "device": self.mesh.devices.flat[0].device_kind,
            "mesh": dict(self.mesh.shape),
            "rules": [
                dict(zip(("kind", "name", "axes"), rule, strict=True)) for rule in self.rules
            ],
            "shardings": [vars(row) for row in self.rows],
            **self.description.to_json(),
            "compile_seconds": round(self.seconds, 1),
        }


def dry_run(config: ExperimentConfig, target: str | None, *, build: Build | None = None) -> DryRun:
    """Compiles an experiment's training step from shapes alone; reads no data, allocates nothing.

    Args:
      config: the experiment.
      target: accelerators as `parse_target` reads them; the devices that are here if None.
      build: makes the network; that of `config.model` if None.

    Raises:
      TargetError: no such target, or its compiler is not installed.
      ConfigError: the mesh cannot be formed, or the batch not split over it.
      OutOfMemoryError: the compiler found no way to fit it into the devices' memory.
    """
    chosen = None if target is None else parse_target(target)
    mesh = make_mesh(config.mesh, devices=jax.devices() if chosen is None else chosen.devices)
    program = Program(config, mesh, build)
    began = time.perf_counter()
    with memory_errors(target or "this machine"):
        compiled = program.lower().compile()
    seconds = time.perf_counter() - began
    devices = list(mesh.devices.flat)
    chip = chip_of(devices[0]) if chosen is None else chosen.chip
    return DryRun(
        config,
        mesh,
        target,
        program.parameters,
        tuple(program.rules.rows()),
        sharding_rows(program.maker.abstract.params),
        describe(compiled, chip, devices),
        seconds,
    )


def sharding_rows(params: Any) -> tuple[ShardingRow, ...]:
    """One row for all parameters of a shape and placement whose paths differ in numbers only."""
    found: Counter[tuple[str, tuple[int, ...], tuple[str, ...]]] = Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        spec = [*leaf.sharding.spec, *[None] * leaf.ndim][: leaf.ndim]
        axes = tuple(
            "-" if part is None else "+".join([part] if isinstance(part, str) else part)
            for part in spec
        )
        found[re.sub(r"(?<=\.)\d+(?=\.)", "*", name), tuple(leaf.shape), axes] += 1
    return tuple(ShardingRow(*key, count) for key, count in found.items())


def print_dry_run(result: DryRun) -> None:
    """Prints the mesh, the parameters' places and what a step takes."""
    console = Console(width=_WIDTH)
    data, mesh = result.config.data, result.mesh
    where = result.target or "this machine"
    axes = " x ".join(f"{name}={size}" for name, size in mesh.shape.items())
    console.print(
        f"{result.config.model.name}, {result.parameters:,} parameters; batch {data.batch_size} of"
        f" {data.crop_size} x {data.crop_size}\n{where}: {axes}, {mesh.size} x"
        f" {mesh.devices.flat[0].device_kind}; compiled in {result.seconds:.0f} s",
        highlight=False,
        soft_wrap=True,
    )
    if mesh.size > 1:
        console.print(_rules_table(result.rules))
    table = Table(title="parameters in the training state", title_justify="left")
    table.add_column("path", overflow="fold")
    for heading in ("shape", "split over"):
        table.add_column(heading)
    for heading in ("arrays", "a device"):
        table.add_column(heading, justify="right")
    for row in result.rows:
        table.add_row(
            row.pattern,
            " x ".join(map(str, row.shape)),
            ", ".join(row.axes) if set(row.axes) != {"-"} else "whole",
            str(row.count),
            quantity(row.count * _part_bytes(row, mesh), "B"),
        )
    console.print(table)
    for line in cost_lines(result.description):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _rules_table(rules: tuple[tuple[str, str, str], ...]) -> Table:
    table = Table(title="how arrays are split", title_justify="left")
    for heading in ("kind", "path ends in, or axis is called", "mesh axes of its axes"):
        table.add_column(heading, overflow="fold")
    for rule in rules:
        table.add_row(*map(escape, rule))
    return table


def _part_bytes(row: ShardingRow, mesh: Mesh) -> float:
    """What one device holds of one array of float32."""
    size = 4.0
    for length, axes in zip(row.shape, row.axes, strict=True):
        size *= length
        for axis in axes.split("+") if axes != "-" else ():
            size /= mesh.shape[axis]
    return size


def main(config: ExperimentConfig, *, target: str | None, as_json: bool) -> int:
    """Runs the dry run; returns 1 if the step does not fit the devices, else 0."""
    result = dry_run(config, target)
    if as_json:
        print(json.dumps(result.to_json(), indent=2))
    else:
        print_dry_run(result)
    return 1 if result.description.fits is False else 0
