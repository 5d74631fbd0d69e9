"""How a fused kernel walks over an image that lies in VMEM.

    pixels   the image as a matrix: row i * width + j holds the channels of pixel (i, j)
    a line   one row of the image, or one column: its pixels are visited one after another
    a group  eight neighbouring lines, visited side by side, one on each sublane

A tile, the pixels of a group at one step, is a strided read of eight rows of that matrix. So a
route along columns reads the same memory as one along rows, and nothing is ever transposed.

Where the number of lines is no multiple of 8, the last group has lines that do not exist. Rows
beyond the image stand for missing rows: they hold anything, and nobody reads what becomes of them.
For a missing column stands the start of the next row: what is written there must be masked.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

LINES = 8  # of a group: the sublanes of a register
_CONVERTED = 16  # rows that `convert` takes at once: a tile of two-byte values
_AHEAD = 16  # columns spread a step ahead, one register each
_CHAINS = 8  # independent recurrences side by side, to fill the arithmetic pipeline

Ref = Any  # a reference to memory inside of a kernel; Pallas has no public name for its type


class Walk(NamedTuple):
    """One route over an image in VMEM.

    Attributes:
      lines: lines of the image.
      steps: pixels of a line.
      line_stride: from a pixel to the one beside it in the next line, in rows of the matrix.
      step_stride: from a pixel to the next of its line, in rows of the matrix.
      backward: start with the last pixel of the last line.
    """

    lines: int
    steps: int
    line_stride: int
    step_stride: int
    backward: bool

    @property
    def groups(self) -> int:
        """Groups of lines; the last may reach beyond the image."""
        return pl.cdiv(self.lines, LINES)

    @property
    def ragged(self) -> bool:
        """Whether the last group has lines that do not exist."""
        return self.lines % LINES != 0

    @property
    def overlapping(self) -> bool:
        """Whether those lines are pixels of others."""
        return self.ragged and self.line_stride == 1

    def turned(self) -> "Walk":
        """The same route from its end to its start, as the adjoint takes it."""
        return self._replace(backward=not self.backward)

    def step(self, s: Array) -> Array:
        """Position in the line of the s-th pixel visited."""
        return self.steps - 1 - s if self.backward else s

    def tile(self, group: Array | int, t: Array) -> Any:
        """Rows of the matrix with the pixels at position t of a group's lines."""
        start = group * (LINES * self.line_stride) + t * self.step_stride
        if self.line_stride == 1 and self.step_stride % LINES == 0:
            return pl.ds(pl.multiple_of(start, LINES), LINES)
        return pl.ds(start, LINES, stride=self.line_stride)

    def inside(self, group: Array | int) -> Array | None:
        """Mask (8, 1) of a group's lines that exist; None if all lines of every group do."""
        if not self.ragged:
            return None
        line = group * LINES + lax.broadcasted_iota(jnp.int32, (LINES, 1), 0)
        return line < self.lines


def walk_over(height: int, width: int, *, by_column: bool, backward: bool) -> Walk:
    """The walk along the columns or the rows of an image."""
    if by_column:
        return Walk(width, height, 1, width, backward)
    return Walk(height, width, width, 1, backward)


def rows_in_memory(height: int, width: int) -> int:
    """Rows of a matrix that has room for every tile of an image."""
    beyond = LINES if width % LINES else 0
    needed = max(round_up(height) * width, height * width + beyond)
    return pl.cdiv(needed, _CONVERTED) * _CONVERTED


def round_up(size: int) -> int:
    """The next multiple of 8."""
    return pl.cdiv(size, LINES) * LINES


def lines_of(group: Array | int) -> Any:
    """A group's rows in an array with one row per line."""
    start = group * LINES
    return pl.ds(start if isinstance(start, int) else pl.multiple_of(start, LINES), LINES)


def groups_together(groups: int, states: int) -> int:
    """How many groups to walk over at once: a divisor of `groups`, at most 8 chains in all."""
    most = max(1, _CHAINS // states)
    return max(size for size in range(1, most + 1) if groups % size == 0)


def for_each_block(walk: Walk, together: int, visit: Callable[[list[Array | int]], None]) -> None:
    """Calls `visit` with the indices of the groups of each block of `together` groups."""
    blocks = walk.groups // together
    if blocks == 1:
        visit(list(range(together)))
        return

    def body(block: Array, carry: None) -> None:
        visit([block * together + g for g in range(together)])

    lax.fori_loop(0, blocks, body, None)


def walk_ahead(
    walk: Walk,
    channels: int,
    read: Callable[[Array], Any],
    body: Callable[[Array, Any, Any], Any],
    carry: Any,
) -> Any:
    """Calls `body(step, carry, columns)` for every step of a line, reading columns one step ahead.

    To spread columns over the channels takes the unit that moves lanes as long as a step that
    holds little else. Those of the next step are on their way while one is computed, unless they
    are so many that registers would spill.

    Args:
      walk: the route.
      channels: of a tile.
      read: the columns of a step, arrays (8, 1).
      body: gives the next carry; its columns are (8, channels), or (8, 1) if they are many.
      carry: what the first step is given.

    Returns:
      The carry of the last step.
    """
    columns = read(jnp.int32(0))
    if len(jax.tree.leaves(columns)) > _AHEAD:
        return lax.fori_loop(0, walk.steps, lambda s, carry: body(s, carry, read(s)), carry)

    def spread(columns: Any) -> Any:
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (LINES, channels)), columns)

    def turn(s: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        following = spread(read(jnp.minimum(s + 1, walk.steps - 1)))
        return body(s, *carry), following

    return lax.fori_loop(0, walk.steps, turn, (carry, spread(columns)))[0]


def chain_lines(walk: Walk, decay: Ref, state: Ref) -> None:
    """Passes the state from line to line.

    Args:
      walk: the order of the lines.
      decay: (n, lines, channels), by how much each line shrinks the state.
      state: (n, lines, channels), what each line leaves of a start from zero; becomes the state
        that each line starts from.
    """
    states, _, channels = state.shape

    def body(i: Array, before: list[Array]) -> list[Array]:
        line = walk.lines - 1 - i if walk.backward else i
        after = []
        for m in range(states):
            row = (m, pl.ds(line, 1), slice(None))
            after.append(decay[row] * before[m] + state[row])
            state[row] = before[m]
        return after

    lax.fori_loop(0, walk.lines, body, [jnp.zeros((1, channels), jnp.float32)] * states)


def convert(source: Ref, target: Ref) -> None:
    """Copies a matrix to one of another dtype."""

    def body(i: Array, carry: None) -> None:
        rows = pl.ds(pl.multiple_of(i * _CONVERTED, _CONVERTED), _CONVERTED)
        target[rows, :] = source[rows, :].astype(target.dtype)

    lax.fori_loop(0, source.shape[0] // _CONVERTED, body, None)


def fill_with_zeros(target: Ref) -> None:
    """Writes zeros to a float32 matrix."""

    def body(i: Array, carry: None) -> None:
        target[lines_of(i), :] = jnp.zeros((LINES, target.shape[1]), jnp.float32)

    lax.fori_loop(0, target.shape[0] // LINES, body, None)


def zeros(channels: int) -> Float[Array, "8 c"]:
    """A tile of zeros."""
    return jnp.zeros((LINES, channels), jnp.float32)


def sum_lines(x: Float[Array, "8 c"]) -> Float[Array, "1 c"]:
    """Sum of a tile over its lines."""
    return jnp.sum(x, axis=0, keepdims=True)


def sum_channels(x: Float[Array, "8 c"]) -> Float[Array, "8 1"]:
    """Sum of a tile over its channels."""
    return jnp.sum(x, axis=1, keepdims=True)


def masked(x: Array, mask: Array | None) -> Array:
    """What the mask lets through; 0 elsewhere, whatever `x` is there."""
    return x if mask is None else jnp.where(mask, x, 0.0)
