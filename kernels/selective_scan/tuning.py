"""Autotuner: times block sizes on the device in hand and remembers the best (see `tiling.py`)."""

import itertools
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .api import IMPLEMENTATIONS, selective_scan
from .base import Tile
from .shapes import ScanShape
from .tiling import PATH_VARIABLE, record_tile, tile_key

_log = logging.getLogger("zzhnet_jax")


class _Sizes(NamedTuple):
    """Block sizes worth timing, along each axis."""

    steps: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024)
    channels: tuple[int | None, ...] = (None, 32, 128, 256, 512)
    warps: tuple[int | None, ...] = (None,)


# Steps that are unrolled, in registers, are few.
_SIZES = {"pallas_gpu": _Sizes((4, 8), (32, 64, 128), (1, 2, 4))}


def tune_tile(
    implementation: str,
    shape: ScanShape,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    candidates: Sequence[Tile] | None = None,
    repeats: int = 5,
    path: str | os.PathLike[str] | None = None,
) -> Tile | None:
    """Times a scan and its gradient with each candidate, and records the fastest.

    A candidate that the compiler refuses, or that does not fit the device, is left out. The own
    choice of the implementation is timed too; if nothing beats it, no entry is kept.

    Args:
      implementation: a name in `available_implementations()`, one that has blocks.
      shape: size of the scan.
      dtype: of u, delta, B and C; the parameters are float32.
      candidates: block sizes to time; None times powers of two that fit the shape.
      repeats: runs of each; the fastest counts.
      path: the JSON file; None takes it from ZZHNET_TILES.

    Returns:
      The best block sizes, or None if the implementation's own choice is the best.

    Raises:
      UnavailableError: the implementation cannot run here, or not at this shape.
      ValueError: it has no blocks, or there is no path.
    """
    where = path or os.environ.get(PATH_VARIABLE)
    if not where:
        raise ValueError(
            f"path = {path!r}: give one, or set {PATH_VARIABLE} to a file for the tiles"
        )
    operands = _draw(shape, dtype)
    key = tile_key(implementation, operands)
    item = IMPLEMENTATIONS.get(implementation)
    if item is not None and not item.tiled:
        raise ValueError(f"implementation {implementation!r} has no blocks to size")
    record_tile(Path(where), key, None)  # what an entry says must not time as the own choice
    best, shortest = None, _seconds(_gradient(implementation, None), operands, repeats)
    for tile in candidate_tiles(implementation, shape) if candidates is None else candidates:
        try:
            seconds = _seconds(_gradient(implementation, tile), operands, repeats)
        except Exception as error:  # compilers refuse in many ways
            _log.info("%s: %s does not run: %s", key, tile, str(error).splitlines()[0])
            continue
        _log.info("%s: %s takes %.3g s", key, tile, seconds)
        if seconds < shortest:
            best, shortest = tile, seconds
    record_tile(Path(where), key, best)
    return best


def candidate_tiles(implementation: str, shape: ScanShape) -> list[Tile]:
    """Block sizes worth timing, those of the next power of two above the operands the largest."""
    steps, channels, warps = _SIZES.get(implementation, _Sizes())
    steps = tuple(x for x in steps if x < 2 * shape.length)
    channels = tuple(x for x in channels if x is None or x < 2 * shape.channels)
    return list(map(Tile, *zip(*itertools.product(steps, channels, warps), strict=True)))


def _draw(shape: ScanShape, dtype: jax.typing.DTypeLike) -> tuple[Array, ...]:
    """Operands of a scan whose decays are those of a trained network: a bit below one."""
    b, length, d, groups, n = shape[1:]
    draw = np.random.default_rng(0).standard_normal
    sequence, matrix = (b, length, d), (b, length, groups, n)
    u, delta, B, C = (jnp.asarray(draw(s), dtype) for s in (sequence, sequence, matrix, matrix))
    A = -jnp.exp(jnp.asarray(draw((d, n)), jnp.float32))
    D, delta_bias = (jnp.asarray(draw(d), jnp.float32) for _ in range(2))
    return u, delta, A, B, C, D, delta_bias


def _gradient(implementation: str, tile: Tile | None) -> Callable[..., Any]:
    def loss(*operands: Array) -> Array:
        *others, delta_bias = operands
        y = selective_scan(
            *others,
            delta_bias=delta_bias,
            delta_softplus=True,
            implementation=implementation,
            tile=tile,
        )
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    return jax.jit(jax.value_and_grad(loss, argnums=tuple(range(7))))


def _seconds(run: Callable[..., Any], operands: tuple[Array, ...], repeats: int) -> float:
    """Shortest time of several runs, compilation left out."""
    jax.block_until_ready(run(*operands))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(*operands))
        times.append(time.perf_counter() - start)
    return min(times)
