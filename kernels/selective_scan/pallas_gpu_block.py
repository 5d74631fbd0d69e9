"""What the Pallas kernels for GPUs share: how the work is cut, and reading and writing rows of it.

    grid          (blocks of channels, segments of time, batch), all of them independent programs
    a program     walks its segment chunk by chunk; a chunk is `steps` time steps, unrolled
    registers     a thread holds its channels: the state, and the rows of one chunk

A block of channels lies in one group. Lengths and channels that do not divide are masked: a step of
size zero changes nothing, its decay is 1 and its drive 0.

Time below is counted in scan order; `Block.row` alone knows about `reverse`, and about the order in
which a route visits the pixels of an image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from .base import Tile, output, step_size

THREADS = 32  # of a warp
# A GPU of 100 to 150 multiprocessors needs some 15 warps on each to hide the time memory takes.
ENOUGH_WARPS = 2048


class Operands(NamedTuple):
    """The arrays of a scan (or references to them) as the kernels take them.

    u, delta, B and C are as they were given; A, D and delta_bias are float32, and A is transposed,
    so that channels are contiguous everywhere. Of an image, with `Plan.image`, time is l = h * w in
    memory order, and B and C have the routes for groups.
    """

    u: Float[Array, "b l d"]
    delta: Float[Array, "b l d"]
    A: Float[Array, "n d"]
    B: Float[Array, "b l g n"]
    C: Float[Array, "b l g n"]
    D: Float[Array, "d"]
    delta_bias: Float[Array, "d"]


class ImageRoute(NamedTuple):
    """A scan along one route through an image, whose operands stay in image layout.

    Attributes:
      group: the route's place in B and C.
      height: rows of the image.
      width: columns of the image.
      columns: walk down the columns, instead of along the rows.
    """

    group: int
    height: int
    width: int
    columns: bool


@dataclass(frozen=True)
class Plan:
    """How the work is cut; all of it is fixed at trace time.

    Attributes:
      length: time steps of the scan.
      d: channels of all groups.
      n: states of a channel.
      groups: groups that share B and C.
      steps: time steps of a chunk.
      channels: channels of a block, a power of two.
      chunks: chunks of a segment.
      segments: segments of the length.
      warps: warps of a program.
      delta_softplus: as in `selective_scan`.
      reverse: as in `selective_scan`.
      image: what is scanned if it is no sequence.
    """

    length: int
    d: int
    n: int
    groups: int
    steps: int
    channels: int
    chunks: int
    segments: int
    warps: int
    delta_softplus: bool
    reverse: bool
    image: ImageRoute | None = None

    @property
    def blocks(self) -> int:
        """Blocks of channels of a group."""
        return pl.cdiv(self.d // self.groups, self.channels)

    @property
    def total_chunks(self) -> int:
        """Chunks of the whole length; segments may reach past its end."""
        return pl.cdiv(self.length, self.steps)

    @property
    def states(self) -> int:
        """Rows that hold the states of a channel: a power of two."""
        return pl.next_power_of_2(self.n)


def make_plan(
    operands: Operands,
    tile: Tile | None,
    *,
    delta_softplus: bool,
    reverse: bool,
    backward: bool = False,
    image: ImageRoute | None = None,
) -> Plan:
    """Cuts the work so that there are enough programs to fill a GPU.

    Segments cost a second pass over the input, so there is only one where batch and channels
    suffice.

    Args:
      operands: the operands.
      tile: overrides the size of chunks and blocks.
      delta_softplus: as in `selective_scan`.
      reverse: as in `selective_scan`.
      backward: for the gradient, which has more in its registers.
      image: what is scanned if it is no sequence.
    """
    (b, length, d), n = operands.u.shape, operands.A.shape[0]
    groups = 1 if image else operands.B.shape[2]
    steps, channels, warps = tile or Tile(chunk_steps(n, backward=backward))
    warps = warps or 1
    channels = channels or min(THREADS * warps, pl.next_power_of_2(d // groups))
    in_flight = b * groups * pl.cdiv(d // groups, channels) * warps
    chunks = pl.cdiv(length, steps)
    wanted = ENOUGH_WARPS // in_flight
    segment = pl.cdiv(chunks, wanted) if wanted > 1 else chunks
    return Plan(
        *(length, d, n, groups, steps, channels, segment, pl.cdiv(chunks, segment), warps),
        delta_softplus=delta_softplus,
        reverse=reverse,
        image=image,
    )


def chunk_steps(n: int, *, backward: bool = False) -> int:
    """Time steps of a chunk: what the registers of a thread hold beside n states."""
    return 4 if backward and n > 32 else 8


class Block:
    """What one program sees of the arrays: its batch, group, channels and segment."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        block, self.segment, self.batch = (pl.program_id(axis) for axis in range(3))
        self.group, self.part = block // plan.blocks, block % plan.blocks
        first = self.part * plan.channels
        width = plan.d // plan.groups
        self.inside = first + lax.iota(jnp.int32, plan.channels) < width
        self.span = pl.ds(self.group * width + first, plan.channels)
        self.matrix = self.group if plan.image is None else jnp.int32(plan.image.group)

    def chunk_start(self, chunk: Array) -> Array:
        """Time of the first step of a chunk of this program's segment."""
        return (self.segment * self.plan.chunks + chunk) * self.plan.steps

    def row(self, time: Array) -> Array:
        """Place in the arrays of a step; inside them even where the step is past the end."""
        time = jnp.minimum(time, self.plan.length - 1)
        time = self.plan.length - 1 - time if self.plan.reverse else time
        image = self.plan.image
        if image is None or not image.columns:
            return time
        return time % image.height * image.width + time // image.height

    def load(self, ref: Any, *index: Any, when: Any = True) -> Float[Array, "c"]:
        """The block's channels of `ref[*index]` in float32; zero where there is nothing."""
        mask = self.inside & when
        return plgpu.load(ref.at[(*index, self.span)], mask=mask, other=0.0).astype(jnp.float32)

    def store(self, ref: Any, *index: Any, value: Float[Array, "c"], when: Any = True) -> None:
        """Writes the block's channels of `ref[*index]`."""
        value = value.astype(ref.dtype)
        plgpu.store(ref.at[(*index, self.span)], value, mask=self.inside & when)

    def load_states(self, ref: Any, *index: Any) -> Float[Array, "s c"]:
        """All states of the block's channels, with rows of zeros up to a power of two."""
        index = (*index, pl.ds(0, self.plan.states), self.span)
        return plgpu.load(ref.at[index], mask=self._state_mask(True), other=0.0)

    def store_states(
        self, ref: Any, *index: Any, value: Float[Array, "s c"], when: Any = True
    ) -> None:
        """Writes all states of the block's channels."""
        index = (*index, pl.ds(0, self.plan.states), self.span)
        plgpu.store(ref.at[index], value, mask=self._state_mask(when))

    def _state_mask(self, when: Any) -> Array:
        rows = lax.broadcasted_iota(jnp.int32, (self.plan.states, self.plan.channels), 0)
        return (rows < self.plan.n) & self.inside[None] & when

    def load_rows(self, ref: Any, start: Array) -> list[Float[Array, "c"]]:
        """A chunk of an array over time, one row a step; zeros past the end."""
        return [
            self.load(ref, self.batch, self.row(time), when=time < self.plan.length)
            for time in self.times(start)
        ]

    def store_rows(self, ref: Any, start: Array, rows: list[Float[Array, "c"]]) -> None:
        """Writes a chunk of an array over time; what is past the end is dropped."""
        for time, row in zip(self.times(start), rows, strict=True):
            inside = time < self.plan.length
            self.store(ref, self.batch, self.row(time), value=row, when=inside)

    def times(self, start: Array) -> list[Array]:
        """The steps of a chunk."""
        return [start + k for k in range(self.plan.steps)]

    def load_scalars(self, ref: Any, start: Array, n: Array) -> list[Float[Array, ""]]:
        """State n of the group's B or C at each step of a chunk; repeats the last past the end."""
        return [
            plgpu.load(ref.at[self.batch, self.row(time), self.matrix, n]).astype(jnp.float32)
            for time in self.times(start)
        ]

    def store_scalars(
        self, ref: Any, start: Array, n: Array, values: list[Float[Array, ""]]
    ) -> None:
        """Writes this program's partial sums for state n of the group's B or C."""
        for time, value in zip(self.times(start), values, strict=True):
            place = ref.at[self.batch, self.group, self.part, n, self.row(time)]
            plgpu.store(place, value, mask=time < self.plan.length)

    def within(self, rows: list[Float[Array, "c"]], start: Array) -> list[Float[Array, "c"]]:
        """Rows of a chunk, zero past the end."""
        times = self.times(start)
        return [
            jnp.where(time < self.plan.length, row, 0.0)
            for time, row in zip(times, rows, strict=True)
        ]

    def step_sizes(
        self, raw: list[Float[Array, "c"]], bias: Float[Array, "c"], start: Array
    ) -> list[Float[Array, "c"]]:
        """Step sizes of a chunk, zero past the end."""
        discretize = partial(
            step_size, delta_softplus=self.plan.delta_softplus, dtype=jnp.dtype(jnp.float32)
        )
        return self.within([discretize(delta, bias) for delta in raw], start)

    def for_each_state(self, body: Callable[[Array, Any], Any], carry: Any) -> Any:
        """Runs `body(n, carry)` for every state."""
        if self.plan.n == 1:
            return body(jnp.int32(0), carry)
        return lax.fori_loop(0, self.plan.n, body, carry)


def take_state(states: Float[Array, "s c"], n: Array) -> Float[Array, "c"]:
    """Row n, as a sum: Triton has no slices of values."""
    if states.shape[0] == 1:
        return states.reshape(states.shape[1])
    return jnp.sum(jnp.where(_is_row(states, n), states, 0.0), axis=0)


def put_state(states: Float[Array, "s c"], n: Array, row: Float[Array, "c"]) -> Array:
    """`states` with row n replaced."""
    if states.shape[0] == 1:
        return row[None]
    return jnp.where(_is_row(states, n), row[None], states)


def _is_row(states: Float[Array, "s c"], n: Array) -> Array:
    return lax.broadcasted_iota(jnp.int32, states.shape, 0) == n


def call(
    kernel: Callable[..., None],
    plan: Plan,
    inputs: Any,
    outputs: Any,
    *,
    into: dict[str, Array] | None = None,
    interpret: bool,
) -> Any:
    """Runs a kernel over the whole grid.

    Args:
      kernel: called as `kernel(plan, inputs, outputs)`, with references for arrays.
      plan: how the work is cut.
      inputs: a tuple of arrays, the first u.
      outputs: (shape, dtype) of each result, a dictionary.
      into: arrays in whose place results of that name are written; the kernel finds there what they
        hold.
      interpret: run in Python, on any machine.
    """
    leaves, names = jax.tree.leaves(inputs), sorted(outputs)
    like, into = leaves[0], into or {}
    places = {len(leaves) + i: names.index(name) for i, name in enumerate(sorted(into))}
    function = kernel.func if isinstance(kernel, partial) else kernel

    def run(inputs: Any, _: Any, outputs: Any) -> None:
        kernel(plan, inputs, outputs)

    return pl.pallas_call(
        run,
        out_shape={name: output(*what, like=like) for name, what in outputs.items()},
        grid=(plan.groups * plan.blocks, plan.segments, like.shape[0]),
        compiler_params=plgpu.CompilerParams(num_warps=plan.warps, num_stages=1),
        input_output_aliases=places,
        interpret=interpret,
        name=f"selective_scan{function.__name__}",
    )(inputs, into)
