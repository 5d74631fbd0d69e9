"""Routes through an image as index maps: an image becomes four sequences, and four an image.

A route goes row by row or column by column, forward or backward; `ROUTES` says which four make up
each pattern.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..selective_scan import ShapeError
from ..selective_scan.base import as_array

ScanPattern = Literal["cross", "unidirectional", "bidirectional", "cascade"]


class Route(NamedTuple):
    """One way through an image."""

    columns: bool
    backward: bool


_ROWS, _COLUMNS = Route(columns=False, backward=False), Route(columns=True, backward=False)
_ROWS_BACK, _COLUMNS_BACK = Route(columns=False, backward=True), Route(columns=True, backward=True)

ROUTES: dict[str, tuple[Route, Route, Route, Route]] = {
    "cross": (_ROWS, _COLUMNS, _ROWS_BACK, _COLUMNS_BACK),
    "unidirectional": (_ROWS, _ROWS, _ROWS, _ROWS),
    "bidirectional": (_ROWS, _ROWS, _ROWS_BACK, _ROWS_BACK),
    "cascade": (_ROWS, _ROWS_BACK, _COLUMNS, _COLUMNS_BACK),
}


def routes_of(pattern: ScanPattern) -> tuple[Route, Route, Route, Route]:
    """The four routes of a pattern.

    Raises:
      ValueError: there is no such pattern.
    """
    if pattern not in ROUTES:
        raise ValueError(f"pattern = {pattern!r}: it must be one of {', '.join(ROUTES)}")
    return ROUTES[pattern]


def cross_scan(
    x: Float[Array, "b h w c"], pattern: ScanPattern = "cross"
) -> Float[Array, "b 4 h*w c"]:
    """Reads an image along the four routes of a pattern.

    - cross: rows, columns, rows backward, columns backward.
    - unidirectional: rows, four times.
    - bidirectional: rows, rows, rows backward, rows backward.
    - cascade: rows, each row backward, columns, each column backward. Its rows and columns are
      sequences of their own, so each is turned round in its place.

    Args:
      x: image, of any dtype.
      pattern: which routes.

    Returns:
      Four sequences in x's dtype. Pixel (i, j) stands at i * w + j in rows and at j * h + i in
      columns, counted from the end where the route goes backward.

    Raises:
      ShapeError: x has not four axes.
      ValueError: there is no such pattern.

    Source: Liu et al., "VMamba: Visual State Space Model", 2024, and its public code.
    """
    routes = routes_of(pattern)
    x = as_array(x)
    if x.ndim != 4:
        raise ShapeError(f"x has shape {x.shape}: expected (b, h, w, c)")

    def read(route: Route) -> Float[Array, "b h*w c"]:
        if not route.backward:
            return flatten(x, columns=route.columns)
        if pattern == "cascade":
            return flatten(jnp.flip(x, 1 if route.columns else 2), columns=route.columns)
        return flatten(x, columns=route.columns)[:, ::-1]

    return jnp.stack([read(route) for route in routes], axis=1)


def cross_merge(
    y: Float[Array, "b 4 h*w c"], *, height: int, width: int, pattern: ScanPattern = "cross"
) -> Float[Array, "b h w c"]:
    """Undoes the routes of `cross_scan` and sums the four images.

    In the cascade pattern backward rows and columns are summed as they stand, not turned round
    again: VMamba defines it so.

    Args:
      y: four sequences.
      height: rows of the image.
      width: columns of the image.
      pattern: the pattern they were read with.

    Returns:
      The sum, in y's dtype.

    Raises:
      ShapeError: y has not the shape (b, 4, height * width, c).
      ValueError: there is no such pattern.
    """
    routes = routes_of(pattern)
    y = as_array(y)
    if y.ndim != 4 or y.shape[1:3] != (4, height * width):
        raise ShapeError(f"y has shape {y.shape}: expected (b, 4, {height * width}, c)")

    def place(k: int, route: Route) -> Float[Array, "b h w c"]:
        turned = route.backward and pattern != "cascade"
        sequence = y[:, k, ::-1] if turned else y[:, k]
        return unflatten(sequence, height, width, columns=route.columns)

    return add_up([place(k, route) for k, route in enumerate(routes)])


def flatten(x: Float[Array, "b h w *c"], *, columns: bool) -> Float[Array, "b h*w *c"]:
    """Row-major or column-major sequence of an image."""
    if columns:
        x = jnp.swapaxes(x, 1, 2)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def unflatten(
    x: Float[Array, "b h*w *c"], height: int, width: int, *, columns: bool
) -> Float[Array, "b h w *c"]:
    """Inverse of `flatten`."""
    if columns:
        return jnp.swapaxes(x.reshape(x.shape[0], width, height, *x.shape[2:]), 1, 2)
    return x.reshape(x.shape[0], height, width, *x.shape[2:])


def add_up(images: list[Float[Array, "..."]]) -> Float[Array, "..."]:
    """Sum of the images, as a chain of additions."""
    return jax.tree.reduce(jnp.add, images)
