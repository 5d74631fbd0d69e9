"""How the TPU kernels of the selective scan cut a problem up, and how its operands are laid out.

    u, delta, y    (b, l, d) as they come; a program reads (sequences, steps, 128 tiles) of them
    A, states      (..., n, d): channels last
    B and C        side by side, (b, group blocks, l, 128 lanes or more), see `Plan.entry`

A slot is one tile of 128 channels of one sequence. A program has up to 8 of them, as many as a
register has sublanes: that is what lets one instruction advance 8 x 128 channels by one time step.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .base import Tile

LANES = 128
SUBLANES = 8  # rows of a register, and time steps that one iteration of a loop handles
# Rows from one slot to the next in a buffer that is read across slots. Mosaic splits a read whose
# pitch is a multiple of 8 in several, as all its rows would lie in the same part of the memory.
ROW_PITCH = SUBLANES + 1
PIECES = 3  # bfloat16 that sum to a float32
MAX_STATES = 64
MAX_COLUMNS = 512  # of B and C in a block: 4 groups of 64 states
_SET_STATES = 16  # states held in registers at once
# Blocks must fit the 16 MB of VMEM that a kernel may use on every TPU since v4. The backward kernel
# holds a set of states of a whole chunk, 4 KB each and step, and 80 KB a step besides. Chunks of
# several states that are longer are made ready in a loop, and there registers spill.
_LONGEST_CHUNK = ((1, 128), (16, 32))  # by states of a set
_LONGEST_PART = ((1, 8), (4, 4), (16, 2))  # by states of a set
_FORWARD_STEPS = 256


@dataclass(frozen=True)
class Plan:
    """Everything static about one call; sizes of a block are derived from it.

    Attributes:
      batch: sequences.
      length: time steps.
      channels: channels; groups that straddle tiles of 128 fit in one block, see `straddles`.
      groups: groups of channels that share B and C.
      d_state: states of each channel.
      delta_softplus: as in `selective_scan`.
      reverse: as in `selective_scan`.
      tile: block sizes, or None for the best.
      unrolled: whether loops over steps and states are; interpreters compile faster if not.
    """

    batch: int
    length: int
    channels: int
    groups: int
    d_state: int
    delta_softplus: bool
    reverse: bool
    tile: Tile | None = None
    unrolled: bool = True

    @cached_property
    def _channel_split(self) -> tuple[int, int]:
        """Tiles of a block, and groups that it spans."""
        most = most_slots(self.tile)
        tiles = -(-self.channels // LANES)
        if self.groups == 1:
            return -(-tiles // -(-tiles // most)), 1
        if tiles <= most:
            return tiles, self.groups
        group_tiles = self.channels // self.groups // LANES
        if group_tiles > most:
            return next(x for x in range(most, 0, -1) if group_tiles % x == 0), 1
        return most // group_tiles * group_tiles, most // group_tiles

    @property
    def tiles(self) -> int:
        """Tiles of 128 channels in a block."""
        return self._channel_split[0]

    @property
    def block_groups(self) -> int:
        """Groups that a block of channels spans."""
        return self._channel_split[1]

    @property
    def group_blocks(self) -> int:
        """Blocks that B and C are cut in along their groups."""
        return -(-self.groups // self.block_groups)

    @property
    def block_channels(self) -> int:
        """Channels of a block."""
        return self.tiles * LANES

    @property
    def channel_blocks(self) -> int:
        """Blocks along the channels."""
        return -(-self.channels // self.block_channels)

    @cached_property
    def sequences(self) -> int:
        """Sequences in a block: narrow networks fill their slots from the batch."""
        most = max(1, most_slots(self.tile) // self.tiles)
        return next(x for x in range(min(self.batch, most), 0, -1) if self.batch % x == 0)

    @property
    def slots(self) -> int:
        """Tiles in a block, over sequences and channels."""
        return self.sequences * self.tiles

    @property
    def matrix_slots(self) -> int:
        """Slots with a B and C of their own: one if all share them."""
        return 1 if self.sequences == 1 and self.block_groups == 1 else self.slots

    @property
    def state_sets(self) -> int:
        """Sets of states, handled one after another."""
        return -(-self.d_state // _SET_STATES)

    @property
    def set_states(self) -> int:
        """States of a set."""
        return -(-self.d_state // self.state_sets)

    @property
    def states(self) -> int:
        """States of all sets; those beyond d_state stay zero."""
        return self.set_states * self.state_sets

    @property
    def columns(self) -> int:
        """Columns of B and C of a block."""
        return 2 * self.block_groups * self.states

    @cached_property
    def chunk(self) -> int:
        """Time steps between kept states, and of a block of the backward kernel."""
        return chunk_steps(self.length, self.d_state, self.tile)

    @cached_property
    def steps(self) -> int:
        """Time steps of a block of the forward kernel: many chunks, as a block has its own cost."""
        most = _FORWARD_STEPS if self.tile is None else self.tile.steps
        chunks = kept_states(self.length, self.d_state, self.tile)
        count = min(chunks, max(1, most // self.chunk))
        return self.chunk * next(x for x in range(count, 0, -1) if chunks % x == 0)

    @property
    def piece(self) -> int:
        """Time steps that are made ready at once: enough to hide latencies."""
        return next(x for x in (32, 16, 8) if self.chunk % x == 0)

    @property
    def part(self) -> int:
        """Time steps that the backward kernel unrolls: fewer of more states, or registers spill."""
        return next(steps for states, steps in _LONGEST_PART if self.set_states <= states)

    @property
    def kept(self) -> int:
        """States kept of each sequence."""
        return kept_states(self.length, self.d_state, self.tile)

    def groups_of_tile(self, tile: int) -> list[tuple[int, int, int]]:
        """The groups that a tile of a block overlaps, each with its first and last lane + 1."""
        if self.block_groups == 1:
            return [(0, 0, LANES)]
        size = self.channels // self.groups
        lanes = (
            (g * size - tile * LANES, (g + 1) * size - tile * LANES) for g in range(self.groups)
        )
        of_block = list(enumerate(lanes))[: self.block_groups]
        return [
            (g, max(0, lo), min(LANES, hi)) for g, (lo, hi) in of_block if hi > 0 and lo < LANES
        ]

    def column(self, side: int, group: int, state: Any) -> Any:
        """Where B (side 0) or C (side 1) of a block has a group's state."""
        return (side * self.block_groups + group) * self.states + state

    @property
    def padded_length(self) -> int:
        """Time steps of all chunks."""
        return self.kept * self.chunk

    @property
    def pieces(self) -> int:
        """What an entry of B and C is cut into: bfloat16 that sum to it, or nothing."""
        return 1 if self.set_states == 1 else PIECES

    @property
    def _group_lanes(self) -> int:
        """Lanes that hold B and C of a set of states of a group."""
        return 2 * self.set_states * self.pieces

    @property
    def _row_groups(self) -> int:
        """Groups of a block whose B and C share 128 lanes."""
        return min(self.block_groups, LANES // self._group_lanes)

    @property
    def _set_rows(self) -> int:
        """How often 128 lanes hold B and C of a set of states of a block."""
        return -(-self.block_groups // self._row_groups)

    @property
    def matrix_lanes(self) -> int:
        """Lanes that hold B and C of a block."""
        return self.state_sets * self._set_rows * LANES

    def entry(self, side: int, group: int, first: int, i: Any) -> tuple[int, Any]:
        """Where B (side 0) or C (side 1) of a block has a group's state `first` + i.

        Returns:
          Which 128 lanes, and the place there: `pieces` lanes from lane `pieces` x place on.
        """
        row, place = divmod(group, self._row_groups)
        row += first // self.set_states * self._set_rows
        return row, (2 * place + side) * self.set_states + i

    def pack_matrices(
        self, B: Float[Array, "b l g n"], C: Float[Array, "b l g n"]
    ) -> Float[Array, "b group_blocks padded_l lanes"]:
        """B and C as `entry` says, filled up with zeros, those after the last step included."""
        x = jnp.stack([B, C], 2)
        x = x[..., None] if self.pieces == 1 else _pieces(x)
        groups = (self.group_blocks, self.block_groups)
        more = (self.padded_length, 2, math.prod(groups), self.states)
        x = jnp.pad(
            x,
            [(0, n - old) for n, old in zip((self.batch, *more), x.shape[:-1], strict=True)]
            + [(0, 0)],
        )
        sets = (self.state_sets, self.set_states)
        x = x.reshape(self.batch, self.padded_length, 2, *groups, *sets, self.pieces)
        x = x.transpose(0, 3, 1, 5, 4, 2, 6, 7)  # sets, groups, sides, states, pieces
        spare = self._set_rows * self._row_groups - self.block_groups
        x = jnp.pad(x, [(0, 0)] * 4 + [(0, spare)] + [(0, 0)] * 3)
        rows = (self.batch, self.group_blocks, self.padded_length, self.state_sets * self._set_rows)
        x = x.reshape(*rows, self._row_groups * self._group_lanes)
        x = jnp.pad(x, [(0, 0)] * 4 + [(0, LANES - x.shape[-1])])
        return x.reshape(*rows[:-1], self.matrix_lanes)

    def unpack_matrices(
        self, gradient: Float[Array, "b channel_blocks padded_l columns"]
    ) -> tuple[Float[Array, "b l g n"], Float[Array, "b l g n"]]:
        """Gradients of B and C from what each block of channels contributed."""
        gradient = gradient[:, :, : self.length]
        by_group = (self.batch, self.group_blocks, -1, self.length, 2, self.block_groups)
        total = gradient.reshape(*by_group, self.states).sum(2).transpose(3, 0, 2, 1, 4, 5)
        total = total.reshape(2, self.batch, self.length, -1, self.states)
        total = total[:, :, :, : self.groups, : self.d_state]
        return total[0], total[1]


def chunk_steps(length: int, d_state: int, tile: Tile | None) -> int:
    """Time steps between kept states: a multiple of 8 that fits in VMEM."""
    of_set = -(-d_state // -(-d_state // _SET_STATES))
    most = next(steps for states, steps in _LONGEST_CHUNK if of_set <= states)
    return _dividing(length, most if tile is None else min(most, _round_up(tile.steps)))


def kept_states(length: int, d_state: int, tile: Tile | None) -> int:
    """States that the forward kernel keeps of a sequence; see `base.Kernel`."""
    return -(-length // chunk_steps(length, d_state, tile))


def most_slots(tile: Tile | None) -> int:
    """The most slots that a program may have."""
    if tile is None or tile.channels is None:
        return SUBLANES
    return min(SUBLANES, max(1, -(-tile.channels // LANES)))


def straddles(channels: int, groups: int, tile: Tile | None) -> bool:
    """Whether groups begin inside tiles of 128 channels, in more tiles than a block has."""
    tiles = -(-channels // LANES)
    return groups > 1 and tiles > most_slots(tile) and (channels // groups) % LANES != 0


def _pieces(x: Float[Array, "..."]) -> Float[Array, "... pieces"]:
    """Bfloat16 that sum to `x`: its first 8 bits, the first 8 of what is left, and the rest."""
    rest, pieces = x.astype(jnp.float32), []
    for _ in range(PIECES - 1):
        bits = jax.lax.bitcast_convert_type(rest, jnp.uint32) & jnp.uint32(0xFFFF0000)
        pieces.append(jax.lax.bitcast_convert_type(bits, jnp.float32))
        rest = rest - pieces[-1]
    return jnp.stack([*pieces, rest], -1).astype(jnp.bfloat16)


def _round_up(steps: int) -> int:
    return -(-max(steps, 1) // SUBLANES) * SUBLANES


def _dividing(length: int, most: int) -> int:
    """A multiple of 8 up to `most`; one that divides the length if any of at least half does."""
    if length <= most:
        return _round_up(length)
    candidates = range(most, most // 2, -SUBLANES)
    return next((steps for steps in candidates if length % steps == 0), most)
