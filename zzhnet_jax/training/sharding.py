"""The device mesh, and which part of which array each device holds.

The mesh always has the four axes of `AXES`; on one device all of them have size 1, and the same
program runs. Calls for this that change between versions of JAX stand here alone.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from zzhnet_jax.errors import ConfigError
from zzhnet_jax.models.placement import Placement

from .config import ExperimentConfig, MeshConfig
from .rules import ShardingRules

AXES = ("data", "fsdp", "tensor", "spatial")
BATCH_AXES = ("data", "fsdp")

# Below this many elements, gathering an array costs more than keeping it whole everywhere.
_SMALLEST_SPLIT = 2**10
# Of an image, on one device: a quarter of them reaches the first stage (see `models.placement`).
_FEWEST_ROWS = 16


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges devices in the mesh that the config asks for.

    Args:
      config: sizes of the axes; a -1 takes all devices that are left.
      devices: what to arrange; all that JAX sees if None. One process may leave some of its devices
        idle, several may not.

    Raises:
      ConfigError: there are too few devices, or a number that the axes do not divide.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    fixed = math.prod(size for size in sizes if size > 0)
    wanted = fixed * (len(devices) // fixed) if -1 in sizes else fixed
    whole = wanted == len(devices)
    if not (whole or (0 < wanted < len(devices) and jax.process_count() == 1 and -1 not in sizes)):
        shape = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ConfigError("mesh", shape, f"a mesh that the {len(devices)} visible devices can form")
    sizes = [wanted // fixed if size == -1 else size for size in sizes]
    return jax.make_mesh(
        tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:wanted]
    )


def batch_parts(mesh: Mesh) -> int:
    """In how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(config: ExperimentConfig, mesh: Mesh) -> None:
    """Raises `ConfigError` unless a global batch, and the rows of a crop, can be split evenly."""
    parts = batch_parts(mesh) * config.train.accumulation
    if config.data.batch_size % parts:
        steps = " x train.accumulation" if config.train.accumulation > 1 else ""
        raise ConfigError(
            "data.batch_size",
            config.data.batch_size,
            f"a multiple of mesh.data x mesh.fsdp{steps} = {parts}",
        )
    spatial = mesh.shape["spatial"]
    rows, rest = divmod(config.data.crop_size, spatial)
    if spatial > 1 and (rest or rows < _FEWEST_ROWS):
        raise ConfigError(
            "data.crop_size",
            config.data.crop_size,
            f"a multiple of mesh.spatial = {spatial}, and at least {_FEWEST_ROWS} times it",
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis split over all devices that share out the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def image_sharding(mesh: Mesh) -> NamedSharding:
    """Images and labels (b, h, w, ...): the batch split as ever, and rows over `spatial`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, "spatial"))


def placement(mesh: Mesh, rules: ShardingRules) -> Placement | None:
    """How activations lie on the mesh; None on a single device, where there is nothing to say."""
    return Placement(mesh, rules.activations) if mesh.size > 1 else None


def stored(
    path: str, shape: Sequence[int], mesh: Mesh, rules: ShardingRules, *, over: Sequence[str]
) -> NamedSharding:
    """How a parameter, or an array that goes with it, lies in the training state.

    The rule for its path comes first. Then every axis of `over` that the rule does not use splits
    it along the longest axis, of what one device has left, that divides evenly.

    Args:
      path: of the parameter.
      shape: of the array.
      mesh: the devices.
      rules: the network's.
      over: mesh axes that large arrays are split over in any case, as ("fsdp",).
    """
    parts = _ruled(path, shape, mesh, rules, without=())
    for axis in over:
        size = mesh.shape[axis]
        left = [n // math.prod(mesh.shape[a] for a in p) for n, p in zip(shape, parts, strict=True)]
        fitting = [i for i, n in enumerate(left) if n % size == 0]
        used = any(axis in part for part in parts)
        if size > 1 and not used and fitting and math.prod(shape) >= _SMALLEST_SPLIT:
            longest = max(fitting, key=lambda i: left[i])
            parts[longest] += (axis,)
    return NamedSharding(mesh, PartitionSpec(*(part or None for part in parts)))


def computed(path: str, shape: Sequence[int], mesh: Mesh, rules: ShardingRules) -> NamedSharding:
    """How a parameter lies while the network computes with it: gathered over `fsdp`."""
    parts = _ruled(path, shape, mesh, rules, without=("fsdp",))
    return NamedSharding(mesh, PartitionSpec(*(part or None for part in parts)))


def _ruled(
    path: str, shape: Sequence[int], mesh: Mesh, rules: ShardingRules, *, without: Sequence[str]
) -> list[tuple[str, ...]]:
    """Mesh axes of each axis by the rule for this path; what does not divide evenly stays whole."""
    rule = rules.of(path)
    axes = (*(rule.axes if rule else ()), *[None] * len(shape))[: len(shape)]
    return [
        (axis,)
        if axis and axis not in without and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0
        else ()
        for axis, size in zip(axes, shape, strict=True)
    ]


def keep_split(whole: NamedSharding, split: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    """A function that gathers an array, while its gradient is summed only where it is kept.

    Left to itself the gradient would be made whole on every device first.
    """

    @jax.custom_vjp
    def gather(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, whole)

    gather.defvjp(
        lambda x: (gather(x), None),
        lambda _, gradient: (jax.lax.with_sharding_constraint(gradient, split),),
    )
    return gather


@functools.cache
def process_share(mesh: Mesh) -> tuple[int, int]:
    """Which share of every batch this process reads, as index and number of equal shares.

    Processes whose devices hold the same rows of the batch, because `tensor` or `spatial` is split
    between them, read the same share.

    Raises:
      ConfigError: the rows of this process's devices are not one such share.
    """
    parts = batch_parts(mesh)
    held = batch_sharding(mesh).addressable_devices_indices_map((parts,)).values()
    rows = {row for index in held if index is not None for row in range(parts)[index[0]]}
    first, size = min(rows), len(rows)
    if max(rows) - first + 1 != size or parts % size or first % size:
        raise ConfigError(
            "mesh", dict(mesh.shape), "such that each process has one share of the batch"
        )
    return first // size, parts // size


def put_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh, *, host: tuple[float, float] = (0.0, 0.0)
) -> dict[str, jax.Array]:
    """This process's rows of a global batch, as arrays over the mesh.

    Args:
      batch: `pre`, `post`, `label`.
      mesh: the devices.
      host: what this process has to tell the others with this step: 1 if it was asked to stop, and
        the share of the time that it waited for data.
    """
    index, count = process_share(mesh)
    told = np.full((batch_parts(mesh) // count, len(host)), host, np.float32)
    arrays = {
        name: _put(array, image_sharding(mesh), index, count) for name, array in batch.items()
    }
    return arrays | {"host": _put(told, batch_sharding(mesh), index, count)}


def _put(array: np.ndarray, sharding: NamedSharding, index: int, count: int) -> jax.Array:
    rows = len(array)
    first = index * rows

    def part(where: Any) -> np.ndarray:
        start, stop, _ = where[0].indices(rows * count)
        return array[(slice(start - first, stop - first), *where[1:])]

    return jax.make_array_from_callback((rows * count, *array.shape[1:]), sharding, part)


def compile_gather(tree: Any, mesh: Mesh) -> Callable[[Any], Any]:
    """A function that gives arrays like these whole, as numpy; all processes must call it."""
    if mesh.size == 1:
        return jax.device_get
    gather = jax.jit(lambda x: x, out_shardings=replicated(mesh)).lower(tree).compile()
    return lambda tree: jax.device_get(gather(tree))
