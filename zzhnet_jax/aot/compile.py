"""Compiles a function for a target and says what it takes there."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from zzhnet_jax.errors import UserError

from .chips import Chip
from .hlo_text import parse_program
from .program_costs import COLLECTIVES, ProgramCosts, program_costs
from .roofline import Roofline, roofline
from .targets import Target

Compiled = Any


class OutOfMemoryError(UserError):
    """A compiler refused a program because it does not fit a device."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device that a program needs.

    Attributes:
      arguments: arrays given to it.
      outputs: arrays it returns, those that take the place of arguments left out.
      temporaries: arrays that live only while it runs, at their most.
      code: the program itself.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int

    @property
    def peak(self) -> int:
        """All of it."""
        return self.arguments + self.outputs + self.temporaries + self.code


@dataclass(frozen=True)
class Description:
    """What one run of a compiled program takes of each device.

    Attributes:
      memory: space.
      costs: operations, traffic and communication.
      chip: the device; None where its figures are not known.
      devices: how many run the program together.
    """

    memory: Memory
    costs: ProgramCosts
    chip: Chip | None
    devices: int

    @property
    def fits(self) -> bool | None:
        """Whether a device has room for it; None where its size is not known."""
        return None if self.chip is None else self.memory.peak <= self.chip.memory_bytes

    @property
    def roofline(self) -> Roofline | None:
        """The least time; None where the peaks are not known."""
        return None if self.chip is None else roofline(self.costs, self.chip)

    def to_json(self) -> dict[str, Any]:
        """All figures, per device and run."""
        times = self.roofline
        return {
            "devices": self.devices,
            "memory_bytes": {
                "arguments": self.memory.arguments,
                "outputs": self.memory.outputs,
                "temporaries": self.memory.temporaries,
                "code": self.memory.code,
                "peak": self.memory.peak,
                "available": None if self.chip is None else self.chip.memory_bytes,
            },
            "fits": self.fits,
            "flops": sum(self.costs.flops.values()),
            "flops_by_dtype": dict(self.costs.flops),
            "memory_traffic_bytes": self.costs.memory_bytes,
            "collective_bytes": {kind: self.costs.collective_bytes[kind] for kind in COLLECTIVES},
            "sent_bytes": sum(c.times * c.sent_bytes for c in self.costs.collectives),
            "unknown_loops": self.costs.unknown_loops,
            "kernel_calls": self.costs.kernel_calls,
            "roofline_seconds": None
            if times is None
            else {
                "compute": times.compute,
                "memory": times.memory,
                "communication": times.communication,
                "step": times.seconds,
                "limit": times.limit,
            },
        }


def compile_for(
    target: Target, function: Callable[..., Any], *arguments: Any, **options: Any
) -> Compiled:
    """Compiles a function ahead of time.

    Args:
      target: what for.
      function: anything that `jax.jit` takes.
      arguments: `jax.ShapeDtypeStruct`s; one without a sharding is whole on every device of the
        others' mesh, or on the first device where none has one.
      options: of `jax.jit`, such as `donate_argnums`.

    Returns:
      The compiled program, for `describe`; it cannot be run here.

    Raises:
      TargetError: the target's compiler is not installed.
    """
    alone = jax.make_mesh(
        (1,), ("device",), axis_types=(AxisType.Auto,), devices=target.devices[:1]
    )
    given = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(arguments)]
    meshes = (sharding.mesh for sharding in given if isinstance(sharding, NamedSharding))
    mesh = next((mesh for mesh in meshes if isinstance(mesh, Mesh)), alone)

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None) or NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    # Kernels for a device that is not there ask the mesh what it is.
    with jax.set_mesh(mesh):
        return jax.jit(function, **options).lower(*jax.tree.map(placed, arguments)).compile()


@contextmanager
def memory_errors(target: str) -> Iterator[None]:
    """Turns a compiler's complaint that a program is too large into one line.

    Args:
      target: what it is compiled for, for the message.

    Raises:
      OutOfMemoryError: the compiler complained.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text:
            raise
        used = re.search(r"[Uu]sed ([\d.]+\w*) of ([\d.]+\w*)", text)
        found = f"it needs {used[1]} of {used[2]}" if used else text.splitlines()[0]
        raise OutOfMemoryError(
            f"{target}: the program does not fit a device's memory ({found}); split it over more"
            " devices, take a smaller batch or crop, or recompute more (train.remat,"
            " train.accumulation)"
        ) from None


def describe(compiled: Compiled, chip: Chip | None, devices: Sequence[Any]) -> Description:
    """Reads what a compiled program takes of each device.

    Args:
      compiled: from `compile_for`, or any compiled JAX program.
      chip: what its devices are, if known.
      devices: those it was compiled for.
    """
    stats = compiled.memory_analysis()
    memory = Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )
    costs = program_costs(parse_program(compiled.as_text()))
    return Description(memory, costs, chip, len(devices))
