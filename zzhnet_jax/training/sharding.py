"""The device mesh, and which part of which array each device holds.

The mesh always has the four axes of `AXES`; on one device all of them have size 1, and the same
program runs. Calls for this that change between versions of JAX stand here alone.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from zzhnet_jax.errors import ConfigError

from .config import MeshConfig

AXES = ("data", "fsdp", "tensor", "spatial")
BATCH_AXES = ("data", "fsdp")

# Below this many elements, gathering an array costs more than keeping it whole everywhere.
_SMALLEST_SPLIT = 2**10


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


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raises `ConfigError` unless a global batch can be dealt out evenly."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % parts:
        raise ConfigError(
            "data.batch_size", batch_size, f"a multiple of mesh.data x mesh.fsdp = {parts}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis split over all devices that share out the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """Shardings of parameters, their averages and the optimizer's, from shapes alone: all agree.

    A large array is split over `fsdp` along the longest axis that divides evenly; others are whole
    on every device.
    """

    def split(leaf: Any) -> NamedSharding:
        parts = mesh.shape["fsdp"]
        axes = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0]
        if parts == 1 or not axes or math.prod(leaf.shape) < _SMALLEST_SPLIT:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))

    return jax.tree.map(split, tree)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a global batch, as arrays over the mesh."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
