"""Buffers of the TPU kernels: they hold vectors and states, and move data between the layouts.

    vector layout   (steps, 128 channels): rows of u, delta and y as they lie in memory
    state layout    (slots, 128 channels): one time step, or one state, of every slot

A buffer of slots x ROW_PITCH rows turns one into the other: written at row slot * ROW_PITCH in the
vector layout, it is read with that pitch, from row t, in the state layout.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from .pallas_tpu_block import Block, Ref, States, Vector, repeat
from .pallas_tpu_plan import LANES, ROW_PITCH, SUBLANES, Plan

_EIGHT, _LOG2_OF_EIGHT = np.int32(SUBLANES), np.int32(3)

Set = Any  # of states: a list of States, or where loops are not unrolled, an array of them


@dataclass(frozen=True)
class Vectors:
    """A buffer for vectors of groups of 8 steps, written and read in both layouts."""

    ref: Ref
    slots: int

    def _base(self, group: Array | int) -> Array | int:
        return group * (self.slots * ROW_PITCH)

    def by_slot(self, slot: int, start: Array | int, count: int) -> Vector:
        """Some steps of one slot; `start` and `count` are multiples of 8."""
        if isinstance(start, int):
            first: Array | int = start // SUBLANES
        else:  # a quotient takes six instructions, one after another, for the sake of its sign
            first = jax.lax.shift_right_logical(start, _LOG2_OF_EIGHT)
        parts = [
            self.ref[pl.ds(self._base(first + i) + slot * ROW_PITCH, SUBLANES)]
            for i in range(count // SUBLANES)
        ]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def put_slot(self, x: Vector, slot: int, start: Array | int) -> None:
        """Stores some steps of one slot."""
        # Not a shift: addresses known earlier let Mosaic prepare more than the registers hold.
        first = start // SUBLANES if isinstance(start, int) else jax.lax.div(start, _EIGHT)
        for i in range(x.shape[0] // SUBLANES):
            rows = pl.ds(self._base(first + i) + slot * ROW_PITCH, SUBLANES)
            self.ref[rows] = x[i * SUBLANES : (i + 1) * SUBLANES]

    def by_step(self, row: Array | int, group: Array | int) -> States:
        """One step of all slots."""
        return self.ref[pl.ds(self._base(group) + row, self.slots, stride=ROW_PITCH)]

    def put_step(self, x: States, row: Array | int, group: Array | int) -> None:
        """Stores one step of all slots."""
        self.ref[pl.ds(self._base(group) + row, self.slots, stride=ROW_PITCH)] = x


def vectors_rows(slots: int, groups: int = 1) -> int:
    """Rows of a buffer for `Vectors`."""
    return groups * slots * ROW_PITCH


@dataclass(frozen=True)
class Matrices:
    """A buffer for a set of states of B and C, each entry spread over the channels that use it."""

    ref: Ref
    plan: Plan

    def _vectors(self) -> Vectors:
        return Vectors(self.ref, self.plan.matrix_slots)

    def _place(self, side: int, i: int | Array, group: int | Array) -> Any:
        """B and C of a state follow each other, the groups of a state too."""
        return (side * self.plan.set_states + i) * (self.plan.chunk // SUBLANES) + group

    def spread(self, block: Block, ref: Ref, first: int, start: Array, count: int) -> None:
        """Fills in some time steps of a set.

        Args:
          block: the program's block.
          ref: B and C of the block.
          first: first state of the set.
          start: first of these steps.
          count: how many; a permutation of lanes is set up once for all of them.
        """
        plan = self.plan
        tiles = 1 if plan.matrix_slots == 1 else plan.tiles
        for sequence in range(plan.sequences):
            values = ref[sequence, 0, block.rows(start, count)].astype(jnp.float32)

            def one_state(
                i: int | Array, _: None, sequence: int = sequence, x: Array = values
            ) -> None:
                for side, of_groups in enumerate(self._wide(x, first, i)):
                    row = self._place(side, i, 0) * SUBLANES + start
                    for tile in range(tiles):
                        wide = self._of_tile(of_groups, tile)
                        self._vectors().put_slot(wide, sequence * tiles + tile, row)

            repeat(block, plan.set_states, one_state, None)

    def _wide(self, values: Array, first: int, i: int | Array) -> tuple[list[Vector], list[Vector]]:
        """Entries of B and of C for a state in all lanes, one vector for each group.

        Pieces are added up by a product with ones, exactly: each row holds those of one entry. The
        unit for products is idle else; the one that moves lanes would be the bottleneck.
        """
        plan, count = self.plan, values.shape[0]
        entries = [
            plan.entry(side, group, first, i)
            for side in (0, 1)
            for group in range(plan.block_groups)
        ]
        if plan.pieces == 1:
            columns = [
                values[:, row * LANES + place : row * LANES + place + 1] for row, place in entries
            ]
            wide = [jnp.broadcast_to(x, (count, LANES)) for x in columns]
        else:
            lane = jax.lax.broadcasted_iota(jnp.int32, (count, LANES), 1)
            place_of = jax.lax.div(lane, np.int32(plan.pieces))
            rows = [
                jnp.where(place_of == place, values[:, row * LANES : (row + 1) * LANES], 0.0)
                for row, place in entries
            ]
            ones = jnp.ones((LANES, LANES), jnp.bfloat16)
            left = jnp.concatenate(rows).astype(jnp.bfloat16)
            # Named: jax_default_matmul_precision may ask for what bfloat16 cannot have.
            products = jnp.dot(
                left,
                ones,
                precision=jax.lax.Precision.DEFAULT,
                preferred_element_type=jnp.float32,
            )
            wide = [products[j * count : (j + 1) * count] for j in range(len(entries))]
        return wide[: plan.block_groups], wide[plan.block_groups :]

    def _of_tile(self, of_groups: list[Vector], tile: int) -> Vector:
        """A state's entries for the channels of a tile."""
        lane = jax.lax.broadcasted_iota(jnp.int32, of_groups[0].shape, 1)
        groups = self.plan.groups_of_tile(tile)
        result = of_groups[groups[0][0]]
        for k, first, _ in groups[1:]:
            result = jnp.where(lane >= first, of_groups[k], result)
        return result

    def by_step(self, side: int, i: int | Array, row: int | Array, group: Array) -> States:
        """State i's entry of B (side 0) or C (side 1) in a step: of every slot, or one for all."""
        return self._vectors().by_step(row, self._place(side, i, group))


def matrices_rows(plan: Plan) -> int:
    """Rows of a buffer for `Matrices` of a chunk."""
    return vectors_rows(plan.matrix_slots, plan.chunk // SUBLANES * 2 * plan.set_states)


def load_states(
    block: Block, part: Callable[[int, slice], Array], exchange: Ref, to: Ref, factor: float = 1.0
) -> None:
    """Fills `to` (states, slots, 128) from arrays with the channels last.

    Args:
      block: the program's block.
      part: gives (n, 128) of a sequence and the lanes of a tile.
      exchange: buffer of `exchange_rows`.
      to: where the states go.
      factor: what they are multiplied with.
    """
    plan, pitch = block.plan, states_pitch(block.plan)
    for slot in range(plan.slots):
        x, valid = part(*block.lanes(slot)), block.valid_channels(slot)
        x = x if valid is None else jnp.where(valid, x, 0.0)
        exchange[slot * pitch : slot * pitch + plan.d_state] = x * factor

    def one(n: int | Array, _: None) -> None:
        to[n] = exchange[pl.ds(n, plan.slots, stride=pitch)]

    repeat(block, plan.d_state, one, None)
    for n in range(plan.d_state, plan.states):
        to[n] = jnp.zeros((plan.slots, LANES))


def take_states(block: Block, states: Ref, exchange: Ref) -> list[Float[Array, "n 128"]]:
    """The inverse of `load_states`: (n, 128) of each slot."""
    plan, pitch = block.plan, states_pitch(block.plan)

    def one(n: int | Array, _: None) -> None:
        exchange[pl.ds(n, plan.slots, stride=pitch)] = states[n]

    repeat(block, plan.d_state, one, None)
    return [exchange[slot * pitch : slot * pitch + plan.d_state] for slot in range(plan.slots)]


def load_set(block: Block, ref: Ref, first: int) -> Set:
    """A set of states, from state `first` on, to be indexed by 0, 1, ..."""
    count = block.plan.set_states
    if block.plan.unrolled:
        return [ref[first + i] for i in range(count)]
    return ref[pl.ds(first, count)]


def store_set(values: Set, ref: Ref, first: int) -> None:
    """Stores what `load_set` loaded."""
    if not isinstance(values, list):
        ref[pl.ds(first, values.shape[0])] = values
        return
    for i, x in enumerate(values):
        ref[first + i] = x


def replace(values: Set, i: int | Array, x: States) -> Set:
    """The set with one state replaced."""
    if not isinstance(values, list):
        return values.at[i].set(x)
    return [x if j == i else old for j, old in enumerate(values)]


def exchange_rows(plan: Plan) -> int:
    """Rows of the buffer that `load_states` and `take_states` use."""
    return plan.slots * states_pitch(plan)


def states_pitch(plan: Plan) -> int:
    """Rows from slot to slot in the buffer of `load_states`: odd, see ROW_PITCH."""
    return plan.d_state | 1
