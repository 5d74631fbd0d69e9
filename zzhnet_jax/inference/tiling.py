"""Cuts an image into overlapping tiles of one size and blends per-tile results back.

Tiles form a grid, so a tile's weight is a product of one weight per axis. Along each axis the
weights of the tiles over a pixel are made to sum to one, hence blending needs no second pass: every
tile is added with its weight as soon as it is known.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from zzhnet_jax.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Axis:
    """Tiles along one axis of an image.

    Attributes:
      starts: first pixel of each tile, increasing; the last tile ends at the image's edge.
      weights: float32 (tiles, tile).
    """

    starts: tuple[int, ...]
    weights: np.ndarray

    @classmethod
    def plan(cls, length: int, tile: int, overlap: int) -> "Axis":
        """Covers `length` pixels by tiles that share at least `overlap` pixels with the next."""
        last = max(length - tile, 0)
        count = -(-last // (tile - overlap)) + 1
        starts = tuple(min(i * (tile - overlap), last) for i in range(count))
        window = _window(tile, overlap)
        total = np.zeros(max(length, tile))
        for start in starts:
            total[start : start + tile] += window
        weights = np.stack([window / total[start : start + tile] for start in starts])
        return cls(starts, weights.astype(np.float32))


def _window(tile: int, overlap: int) -> np.ndarray:
    """One inside; towards both ends a sine-squared ramp, which adds up to one with its mirror."""
    distance = np.minimum(np.arange(tile), np.arange(tile)[::-1]) + 0.5
    return np.sin(np.pi / 2 * np.minimum(distance / max(overlap, 0.5), 1)) ** 2


def check_tile(tile_size: int, overlap: int) -> None:
    """Raises `ConfigError` unless tile_size >= 1 and 0 <= overlap < tile_size."""
    if tile_size < 1:
        raise ConfigError("tile_size", tile_size, "at least 1")
    if not 0 <= overlap < tile_size:
        raise ConfigError("overlap", overlap, f"at least 0 and below tile_size = {tile_size}")


def fit_tile(shapes: Iterable[Sequence[int]], tile_size: int, overlap: int) -> tuple[int, int]:
    """Lowers a tile size to that of the images, so that none smaller than a tile is padded to one.

    Args:
      shapes: (height, width, ...) of every image.
      tile_size: side of the tiles of larger images.
      overlap: of these tiles.

    Returns:
      tile_size and overlap as they were if any image exceeds a tile, else the longest side and 0.

    Raises:
      ConfigError: sizes that make no tiling.
    """
    check_tile(tile_size, overlap)
    longest = max(max(shape[:2]) for shape in shapes)
    return (tile_size, overlap) if longest > tile_size else (max(longest, 1), 0)


class Tiling:
    """The tiles of an image, numbered row by row.

    Attributes:
      shape: height and width of the image.
      tile_size: height and width of a tile; a smaller image is one tile, padded by reflection.
    """

    def __init__(self, shape: tuple[int, int], tile_size: int, overlap: int) -> None:
        """Plans the tiles.

        Args:
          shape: height and width of the image, at least 1.
          tile_size: at least 1.
          overlap: least number of pixels shared by neighbours, at least 0 and below tile_size.

        Raises:
          ConfigError: sizes that make no tiling.
        """
        check_tile(tile_size, overlap)
        self.shape, self.tile_size = shape, tile_size
        self._rows, self._columns = (Axis.plan(length, tile_size, overlap) for length in shape)

    def __len__(self) -> int:
        return len(self._rows.starts) * len(self._columns.starts)

    def _corner(self, index: int) -> tuple[int, int, int, int]:
        row, column = divmod(index, len(self._columns.starts))
        return row, column, self._rows.starts[row], self._columns.starts[column]

    def cut(self, image: np.ndarray, index: int) -> np.ndarray:
        """The tile (tile_size, tile_size, c) of an image (h, w, c)."""
        _, _, top, left = self._corner(index)
        tile = image[top : top + self.tile_size, left : left + self.tile_size]
        missing = [(0, self.tile_size - length) for length in tile.shape[:2]]
        return np.pad(tile, [*missing, (0, 0)], mode="reflect") if any(map(any, missing)) else tile

    def add(self, canvas: np.ndarray, values: np.ndarray, index: int) -> None:
        """Adds a tile's values, weighted, to a float32 canvas (h, w) that began as zeros.

        After every tile was added once, the canvas holds the blend.
        """
        row, column, top, left = self._corner(index)
        window = canvas[top : top + self.tile_size, left : left + self.tile_size]
        height, width = window.shape
        weight = np.outer(self._rows.weights[row, :height], self._columns.weights[column, :width])
        window += weight * values[:height, :width]
