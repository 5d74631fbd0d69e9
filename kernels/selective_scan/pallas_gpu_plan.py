"""How the Pallas kernels for GPUs cut their work.

    grid          (blocks of channels, segments of time, batch), all of them independent programs
    a program     walks its segment chunk by chunk; a chunk is `steps` time steps, unrolled
    registers     a thread holds its channels: the state, and the rows of the chunks under way

A block of channels lies in one group. Time is counted in scan order.
"""

from dataclasses import dataclass
from typing import NamedTuple

from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from .base import Tile

THREADS = 32  # of a warp
# As many warps, each with its chunks under way, keep the memory busy in a single pass.
FEWEST_WARPS = 448
# What a scan that is cut in segments has: more than one wave of them, to end at the same time.
ENOUGH_WARPS = 2048
_LONGEST_CHUNK = 8


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
      interpret: run in Python, on any machine.
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
    interpret: bool = False

    @property
    def blocks(self) -> int:
        """Blocks of channels of a group."""
        return pl.cdiv(self.d // self.groups, self.channels)

    @property
    def total_chunks(self) -> int:
        """Chunks of the whole length."""
        return pl.cdiv(self.length, self.steps)

    @property
    def ragged(self) -> bool:
        """Whether the last chunk reaches past the end."""
        return self.length % self.steps > 0

    @property
    def stride(self) -> int | None:
        """From the place of a step in memory to that of the next in a chunk; None if it varies."""
        if self.image is None or not self.image.columns:
            stride = 1
        elif self.image.height % self.steps == 0:
            stride = self.image.width
        else:
            return None
        return -stride if self.reverse else stride


def make_plan(
    operands: Operands,
    tile: Tile | None,
    *,
    delta_softplus: bool,
    reverse: bool,
    image: ImageRoute | None = None,
    interpret: bool = False,
) -> Plan:
    """Cuts the work so that there are enough programs to fill a GPU.

    Segments cost a second pass over the input, so there is only one where batch and channels
    suffice.

    Args:
      operands: the operands.
      tile: overrides the size of chunks and blocks.
      delta_softplus: as in `selective_scan`.
      reverse: as in `selective_scan`.
      image: what is scanned if it is no sequence.
      interpret: run in Python, on any machine.
    """
    (b, length, d), n = operands.u.shape, operands.A.shape[0]
    groups = 1 if image else operands.B.shape[2]
    steps, channels, warps = tile or Tile(chunk_steps(image.height if image else length))
    warps = warps or 1
    channels = channels or min(THREADS * warps, pl.next_power_of_2(d // groups))
    in_flight = b * groups * pl.cdiv(d // groups, channels) * warps
    chunks = pl.cdiv(length, steps)
    wanted = 1 if in_flight >= FEWEST_WARPS else max(1, ENOUGH_WARPS // in_flight)
    segment = pl.cdiv(chunks, wanted)
    return Plan(
        *(length, d, n, groups, steps, channels, segment, pl.cdiv(chunks, segment), warps),
        delta_softplus=delta_softplus,
        reverse=reverse,
        image=image,
        interpret=interpret,
    )


def chunk_steps(length: int) -> int:
    """Time steps of a chunk: what a thread's registers hold, and what divides the length if it can.

    Args:
      length: steps of the scan, or rows of an image.
    """
    fitting = (x for x in range(_LONGEST_CHUNK, _LONGEST_CHUNK // 2, -1) if length % x == 0)
    return next(fitting, _LONGEST_CHUNK)
