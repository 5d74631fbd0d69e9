"""Where the arrays inside a network live on a mesh of devices, by the names of their axes.

Networks name the axes of what they compute ("batch", "rows", "inner" ...) and know of no devices;
whoever runs them on a mesh says once which mesh axes each name is split over. Without a placement,
as on a single device, nothing here does anything.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Fewer rows a device are not worth an exchange with its neighbours; and where a device has one row,
# or makes one of two by a stride, XLA (jaxlib 0.10.2, 0.12) gets gradients of convolutions wrong.
_FEWEST = {"rows": 4}


@dataclass(frozen=True)
class Placement:
    """A mesh, and which of its axes the named axes of arrays are split over.

    Attributes:
      mesh: the devices.
      axes: name of an array's axis -> mesh axes; a name that is missing is not split.
    """

    mesh: Mesh
    axes: Mapping[str, Sequence[str]]

    def spec(self, names: str, shape: Sequence[int]) -> PartitionSpec:
        """How an array whose axes have these names (separated by spaces) is split.

        An axis that its mesh axes do not divide evenly, or into too little, stays whole.
        """
        parts = [self._part(name, size) for name, size in zip(names.split(), shape, strict=True)]
        return PartitionSpec(*parts)

    def _part(self, name: str, size: int) -> tuple[str, ...] | None:
        axes = tuple(axis for axis in self.axes.get(name, ()) if self.mesh.shape[axis] > 1)
        parts = math.prod(self.mesh.shape[axis] for axis in axes)
        fits = size % parts == 0 and size // parts >= _FEWEST.get(name, 1)
        return axes if axes and fits else None


_current: ContextVar[Placement | None] = ContextVar("placement", default=None)


@contextmanager
def placed(placement: Placement | None) -> Iterator[None]:
    """Networks that are traced inside are placed so."""
    token = _current.set(placement)
    try:
        yield
    finally:
        _current.reset(token)


def constrain(x: jax.Array, names: str) -> jax.Array:
    """`x` itself, placed by the names of its axes, for example "batch rows columns inner"."""
    placement = _current.get()
    if placement is None:
        return x
    sharding = NamedSharding(placement.mesh, placement.spec(names, x.shape))
    return jax.lax.with_sharding_constraint(x, sharding)


def locally(
    function: Callable[..., jax.Array],
    arguments: Sequence[jax.Array | None],
    names: Sequence[str],
    result: str,
) -> jax.Array:
    """Calls a function on every device's own part of the arguments, without any communication.

    For what neither needs the other parts nor is split well, or at all, by the compiler: a scan,
    which is independent for each sample and channel, and kernels written for one device.

    Args:
      function: takes arrays, gives one; a part of its result follows from the same part of them.
      arguments: its arguments; None is passed on.
      names: of the axes of each argument.
      result: names of the axes of the result, each of them an axis of the first argument too.
    """
    placement = _current.get()
    if placement is None:
        return function(*arguments)
    given = [(x, n) for x, n in zip(arguments, names, strict=True) if x is not None]
    specs = tuple(placement.spec(n, x.shape) for x, n in given)
    first = dict(zip(given[0][1].split(), specs[0], strict=True))

    def on_parts(*parts: jax.Array) -> Any:
        following = iter(parts)
        return function(*(None if x is None else next(following) for x in arguments))

    run = jax.shard_map(
        on_parts,
        mesh=placement.mesh,
        in_specs=specs,
        out_specs=PartitionSpec(*(first[name] for name in result.split())),
        check_vma=False,
    )
    return run(*(x for x, _ in given))
