"""Which devices exchange data with one another, in the three ways that XLA writes it."""

import math
import re

import numpy as np

_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_COUNTED = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:,?\s*device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    r"\s*\{([^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{(.*?)\}\}")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def first_group(attributes: str, devices: int) -> tuple[int, ...]:
    """The first group of devices of a collective; all groups have its size.

    Args:
      attributes: text that follows the operands.
      devices: devices of the program, who are one group where the text names none.
    """
    if found := _LISTED.search(attributes):
        return tuple(_numbers(found[1]))
    if found := _COUNTED.search(attributes):
        ids = _reordered(found[2], found[3]).reshape(_numbers(found[1]))
        return tuple(ids.reshape(-1, ids.shape[-1])[0].tolist())
    if found := _MESH.search(attributes):
        return _mesh_group(*found.groups())
    return tuple(range(devices))


def permuted_pairs(attributes: str) -> tuple[int, ...]:
    """Devices of the farthest pair (source, target) of a collective-permute."""
    found = _PAIRS.search(attributes)
    pairs = re.findall(r"\{(\d+),(\d+)", (found[0] if found else ""))
    moved = [(int(source), int(target)) for source, target in pairs if source != target]
    return max(moved, key=lambda pair: abs(pair[0] - pair[1]), default=())


def _reordered(sizes: str, order: str | None) -> np.ndarray:
    dims = _numbers(sizes)
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids.transpose(_numbers(order)) if order else ids


def _mesh_group(mesh: str, sizes: str | None, order: str | None, axes: str) -> tuple[int, ...]:
    shape = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh)}
    wanted = re.findall(r"'([^']*)'", axes)
    dims = list(shape.values())
    ids = _reordered(sizes, order) if sizes else np.arange(math.prod(dims))
    ids = ids.reshape(dims)
    inner = [list(shape).index(name) for name in wanted]
    outer = [axis for axis in range(len(dims)) if axis not in inner]
    count = math.prod(dims[axis] for axis in inner)
    return tuple(ids.transpose([*outer, *inner]).reshape(-1, count)[0].tolist())
