"""Inside a program of the TPU kernels: one block of the problem, its loops and its step sizes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from .pallas_tpu_math import softplus
from .pallas_tpu_plan import LANES, SUBLANES, Plan

Ref = Any
Carry = TypeVar("Carry")

Vector = Float[Array, "t 128"]
States = Float[Array, "slots 128"]


@dataclass(frozen=True)
class Block:
    """The chunk that a program is working on.

    Attributes:
      plan: the whole problem.
      chunk: which chunk of the sequence it is.
      channel: which block along the channels it is.
      offset: where the chunk begins in the program's blocks of u, delta and y.
    """

    plan: Plan
    chunk: Array
    channel: Array
    offset: Array | int = 0

    @property
    def groups(self) -> int:
        """Groups of 8 steps."""
        return self.plan.chunk // SUBLANES

    def rows(self, start: Array, count: int) -> Any:
        """Rows of the program's blocks, from row `start` of the chunk on."""
        return pl.ds(pl.multiple_of(self.offset + start, SUBLANES), count)

    def lanes(self, slot: int) -> tuple[int, slice]:
        """The sequence of a slot, and its channels in the block."""
        sequence, tile = divmod(slot, self.plan.tiles)
        return sequence, slice(tile * LANES, (tile + 1) * LANES)

    def vector(self, ref: Ref, slot: int, start: Array, count: int) -> Vector:
        """Steps `start` to `start + count` of a slot of u, delta or y, float32."""
        sequence, lanes = self.lanes(slot)
        return ref[sequence, self.rows(start, count), lanes].astype(jnp.float32)

    def valid_channels(self, slot: int) -> Bool[Array, "1 128"] | None:
        """Which lanes of a slot hold channels; None if all do."""
        plan = self.plan
        if plan.channels == plan.channel_blocks * plan.block_channels:
            return None
        _, lanes = self.lanes(slot)
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        return self.channel * plan.block_channels + lanes.start + lane < plan.channels

    def valid_steps(self, start: Array, count: int) -> Bool[Array, "t 1"] | None:
        """Which of some rows are time steps of the sequence; None if all are."""
        if self.plan.length % self.plan.chunk == 0:
            return None
        row = jax.lax.broadcasted_iota(jnp.int32, (count, 1), 0)
        return self.chunk * self.plan.chunk + start + row < self.plan.length

    def clear(self, x: Vector, slot: int, start: Array) -> Vector:
        """`x` with zeros where the block hangs over the end of the sequence or the channels.

        Whatever lies there in memory, not a number included, must not reach a sum.
        """
        for valid in (self.valid_steps(start, x.shape[0]), self.valid_channels(slot)):
            x = x if valid is None else jnp.where(valid, x, 0.0)
        return x

    def in_pieces(self, work: Callable[[Array, int], None]) -> None:
        """Calls `work(start, count)` for pieces of the chunk in the vector layout."""
        count = self.plan.piece
        jax.lax.fori_loop(0, self.plan.chunk // count, lambda i, _: work(i * count, count), None)

    def in_scan_order(self, work: Callable[[Array], None], *, backward: bool = False) -> None:
        """Calls `work(group)` for the groups of 8 steps in scan order, or against it."""
        self.in_order(self.groups, work, backward=backward)

    def in_order(
        self, count: int, work: Callable[[Array], None], *, backward: bool = False
    ) -> None:
        """Calls `work(i)` for parts in scan order, or against it."""
        falling, last = self.plan.reverse != backward, count - 1
        jax.lax.fori_loop(0, count, lambda i, _: work(last - i if falling else i), None)


def repeat(block: Block, count: int, body: Callable[[Any, Carry], Carry], carry: Carry) -> Carry:
    """A loop over states or steps, unrolled for the TPU; interpreters compile it faster rolled."""
    if not block.plan.unrolled and count > 1:
        return jax.lax.fori_loop(0, count, body, carry)
    for i in range(count):
        carry = body(i, carry)
    return carry


def sweep(
    block: Block,
    step: Callable[[int | Array, Carry], Carry],
    carry: Carry,
    *,
    backward: bool = False,
    count: int = SUBLANES,
) -> Carry:
    """Runs some steps of a group: `step` takes a row and the carry, and gives the next carry.

    They run in scan order, or if `backward`, against it.
    """
    falling = block.plan.reverse != backward
    last = count - 1
    return repeat(block, count, lambda i, x: step(last - i if falling else i, x), carry)


def step_size(block: Block, delta: Vector, bias: Float[Array, "1 128"]) -> tuple[Vector, Vector]:
    """What the softplus is applied to, and the step size."""
    raw = delta + bias
    return raw, softplus(raw) if block.plan.delta_softplus else raw
