"""Inside a program of the TPU kernels: one block of the problem, and moving data between layouts.

    vector layout   (8 steps, 128 channels): rows of u, delta and y as they lie in memory
    state layout    (slots, 128 channels): one time step, or one state, of every slot

A buffer of slots x ROW_PITCH rows turns one into the other: written at row slot * ROW_PITCH in the
vector layout, it is read with that pitch, from row t, in the state layout.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from .base import SOFTPLUS_THRESHOLD
from .pallas_tpu_plan import LANES, ROW_PITCH, SUBLANES, Plan

Ref = Any
Carry = TypeVar("Carry")

Vector = Float[Array, "8 128"]
States = Float[Array, "slots 128"]


@dataclass(frozen=True)
class Block:
    """A program's part of the problem.

    Attributes:
      plan: the whole problem.
      steps: time steps of the block.
      time: which block along time it is, counted from the start of the sequence.
      channel: which block along the channels it is.
    """

    plan: Plan
    steps: int
    time: Array
    channel: Array

    @property
    def row_groups(self) -> int:
        """Groups of 8 steps."""
        return self.steps // SUBLANES

    def first_row(self, group: Array) -> Array:
        """First row of the group of 8 steps that comes `group`-th in scan order."""
        group = self.row_groups - 1 - group if self.plan.reverse else group
        return pl.multiple_of(group * SUBLANES, SUBLANES)

    @property
    def last_row(self) -> int:
        """The row of a group that comes last in scan order."""
        return 0 if self.plan.reverse else SUBLANES - 1

    def lanes(self, slot: int) -> tuple[int, slice]:
        """The sequence of a slot, and its channels in the block."""
        sequence, tile = divmod(slot, self.plan.tiles)
        return sequence, slice(tile * LANES, (tile + 1) * LANES)

    def vector(self, ref: Ref, slot: int, group: Array) -> Vector:
        """Eight steps of a slot of u, delta or y, float32."""
        sequence, lanes = self.lanes(slot)
        return ref[sequence, pl.ds(self.first_row(group), SUBLANES), lanes].astype(jnp.float32)

    def valid_channels(self, slot: int) -> Bool[Array, "1 128"] | None:
        """Which lanes of a slot hold channels; None if all do."""
        plan = self.plan
        if plan.channels == plan.channel_blocks * plan.block_channels:
            return None
        _, lanes = self.lanes(slot)
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        return self.channel * plan.block_channels + lanes.start + lane < plan.channels

    def valid_steps(self, group: Array) -> Bool[Array, "8 1"] | None:
        """Which rows of a group are time steps of the sequence; None if all are."""
        if self.plan.length % self.steps == 0:
            return None
        row = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, 1), 0)
        return self.time * self.steps + self.first_row(group) + row < self.plan.length

    def clear(self, x: Vector, slot: int, group: Array) -> Vector:
        """`x` with zeros where the block hangs over the end of the sequence or the channels.

        Whatever lies there in memory, not a number included, must not reach a sum.
        """
        for valid in (self.valid_steps(group), self.valid_channels(slot)):
            x = x if valid is None else jnp.where(valid, x, 0.0)
        return x

    def step_size(self, delta: Vector, bias: Float[Array, "1 128"]) -> tuple[Vector, Vector]:
        """Delta + bias, and the step size made from it."""
        raw = delta + bias
        return raw, softplus(raw) if self.plan.delta_softplus else raw


@dataclass(frozen=True)
class Vectors:
    """A buffer for vectors of groups of 8 steps, written and read in both layouts."""

    ref: Ref
    slots: int

    def _base(self, group: Array | int) -> Array | int:
        return group * (self.slots * ROW_PITCH)

    def by_slot(self, slot: int, group: Array | int = 0) -> Vector:
        """Eight steps of one slot."""
        return self.ref[pl.ds(self._base(group) + slot * ROW_PITCH, SUBLANES)]

    def put_slot(self, x: Vector, slot: int, group: Array | int = 0) -> None:
        """Stores eight steps of one slot."""
        self.ref[pl.ds(self._base(group) + slot * ROW_PITCH, SUBLANES)] = x

    def _across(self, row: Array | int, group: Array | int) -> pl.Slice:
        return pl.ds(self._base(group) + row, self.slots, stride=ROW_PITCH)

    def by_step(self, row: Array | int, group: Array | int = 0) -> States:
        """One step of all slots."""
        return self.ref[self._across(row, group)]

    def put_step(self, x: States, row: Array | int, group: Array | int = 0) -> None:
        """Stores one step of all slots."""
        self.ref[self._across(row, group)] = x


def vectors_rows(slots: int, groups: int = 1) -> int:
    """Rows of a buffer for `Vectors`."""
    return groups * slots * ROW_PITCH


@dataclass(frozen=True)
class Matrices:
    """A buffer for B and C, each entry spread over the 128 lanes of the slots that use it."""

    ref: Ref
    plan: Plan

    def _vectors(self) -> Vectors:
        return Vectors(self.ref, self.plan.matrix_slots)

    def _index(self, at: Array | int, side: int, i: int) -> Array | int:
        return (at * 2 + side) * self.plan.set_states + i

    def spread(
        self, block: Block, ref: Ref, group: Array, first: int, at: Array | int, *, sides: int = 2
    ) -> list[Callable[[], None]]:
        """Parts of the work of spreading a set of states of 8 steps, one for each column.

        Args:
          block: the program's block.
          ref: B and C of the block.
          group: which 8 steps, in scan order.
          first: first state of the set.
          at: where in the buffer.
          sides: 1 for B alone, 2 for C too.
        """
        plan, valid = self.plan, block.valid_steps(group)
        rows = pl.ds(block.first_row(group), SUBLANES)
        values = []
        for sequence in range(plan.sequences):
            x = ref[sequence, 0, rows].astype(jnp.float32)
            values.append(x if valid is None else jnp.where(valid, x, 0.0))

        def part(side: int, i: int) -> None:
            for slot in range(plan.matrix_slots):
                sequence, tile = divmod(slot, plan.tiles)
                x = self._of_tile(values[sequence], tile, side, first + i)
                self._vectors().put_slot(x, slot, self._index(at, side, i))

        return [partial(part, side, i) for i in range(plan.set_states) for side in range(sides)]

    def _of_tile(self, values: Array, tile: int, side: int, state: int) -> Vector:
        """A state's entries for the channels of a tile."""
        lane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
        result = None
        for k, first, _ in self.plan.groups_of_tile(tile):
            column = self.plan.column(side, k, state)
            x = jnp.broadcast_to(values[:, column : column + 1], (SUBLANES, LANES))
            result = x if result is None else jnp.where(lane >= first, x, result)
        assert result is not None
        return result

    def by_step(self, side: int, i: int, row: Array | int, at: Array | int) -> States:
        """State i's entry of B (side 0) or C (side 1) in a step: of every slot, or one for all."""
        return self._vectors().by_step(row, self._index(at, side, i))


def matrices_rows(plan: Plan) -> int:
    """Rows of a buffer for `Matrices`: a set of 8 steps in use, and one being made ready."""
    return vectors_rows(plan.matrix_slots, 2 * 2 * plan.set_states)


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
    for n in range(plan.states):
        rows = pl.ds(n, plan.slots, stride=pitch)
        to[n] = exchange[rows] if n < plan.d_state else jnp.zeros((plan.slots, LANES))


def take_states(block: Block, states: Ref, exchange: Ref) -> list[Float[Array, "n 128"]]:
    """The inverse of `load_states`: (n, 128) of each slot."""
    plan, pitch = block.plan, states_pitch(block.plan)
    for n in range(plan.d_state):
        exchange[pl.ds(n, plan.slots, stride=pitch)] = states[n]
    return [exchange[slot * pitch : slot * pitch + plan.d_state] for slot in range(plan.slots)]


def exchange_rows(plan: Plan) -> int:
    """Rows of the buffer that `load_states` and `take_states` use."""
    return plan.slots * states_pitch(plan)


def states_pitch(plan: Plan) -> int:
    """Rows from slot to slot in the buffer of `load_states`: odd, see ROW_PITCH."""
    return plan.d_state | 1


def sweep(
    block: Block,
    step: Callable[[Array | int, Carry], Carry],
    carry: Carry,
    *,
    backward: bool = False,
    parts: Sequence[Callable[[], None]] = (),
) -> Carry:
    """Runs the 8 steps of a group, and `parts`, work that is independent of them.

    Unrolled, and the parts traced evenly between the steps, where the scheduler then finds them
    side by side; or, for an interpreter, as a loop that is quick to compile.

    Args:
      block: the program's block.
      step: takes a row and the carry, and gives the next carry.
      carry: the first carry.
      backward: from the last step in scan order to the first.
      parts: functions to call once each.
    """
    falling = block.plan.reverse != backward
    if not block.plan.unrolled:
        for part in parts:
            part()
        return jax.lax.fori_loop(
            0, SUBLANES, lambda i, x: step(SUBLANES - 1 - i if falling else i, x), carry
        )
    for i in range(SUBLANES):
        carry = step(SUBLANES - 1 - i if falling else i, carry)
        for part in parts[i * len(parts) // SUBLANES : (i + 1) * len(parts) // SUBLANES]:
            part()
    return carry


def softplus(x: Vector) -> Vector:
    """As `base.softplus`; only the values count, the backward kernel has its own derivative."""
    below = jnp.log1p(jnp.exp(jnp.minimum(x, SOFTPLUS_THRESHOLD)))
    return jnp.where(x > SOFTPLUS_THRESHOLD, x, below)
