"""Sizes of a fused scan; for TPUs also its blocks, and its arguments arranged for them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from .patterns import ScanPattern, routes_of
from .walks import Walk, round_up, rows_in_memory, walk_over

LANES = 128
ROUTES = 4
SPARE_VMEM = 2**20  # for what the compiler keeps there itself
SMALLEST_VMEM = 2**24  # TPU v4's


class Frame(NamedTuple):
    """Sizes of a fused scan, and how its arrays are cut in blocks.

    The kernels see an image as a matrix with a row per pixel (l = h * w); on TPUs they run over a
    grid of images, tiles of channels and routes.

    Attributes:
      batch: images.
      height: rows of an image.
      width: columns of an image.
      channels: channels of an image.
      states: d_state.
      pattern: which routes; not "cascade".
      delta_softplus: as in `selective_scan`.
      interpret: compile (False), or run in Pallas' interpreter (True, or its parameters).
    """

    batch: int
    height: int
    width: int
    channels: int
    states: int
    pattern: ScanPattern
    delta_softplus: bool
    interpret: Any = False

    @property
    def rows(self) -> int:
        """Rows of a block, the matrix of an image's pixels."""
        return rows_in_memory(self.height, self.width)

    @property
    def tile(self) -> int:
        """Channels of a block."""
        return min(LANES, self.channels)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Images, tiles of channels, routes."""
        return self.batch, pl.cdiv(self.channels, self.tile), ROUTES

    @property
    def lines(self) -> int:
        """Room for one row per line, whichever way the route goes."""
        return round_up(max(self.height, self.width))

    @property
    def routes_on_lanes(self) -> bool:
        """Whether blocks of one route can be cut from a matrix with 4 d columns.

        That is how a matrix product gives the step sizes. Where d is no multiple of 128, the route
        is made the first axis.
        """
        return self.channels % LANES == 0

    @property
    def routes_shape(self) -> tuple[int, ...]:
        """Shape of an image per route as the kernels take it; see `split_routes`."""
        pixels = self.height * self.width
        if self.routes_on_lanes:
            return self.batch, pixels, ROUTES * self.channels
        return ROUTES, self.batch, pixels, self.channels

    @property
    def starts_shape(self) -> tuple[int, ...]:
        """Shape of the states before each line of each route."""
        return self.batch, ROUTES, self.states, self.lines, self.channels

    def walks(self) -> list[Walk]:
        """The walks of the four routes."""
        return [
            walk_over(self.height, self.width, by_column=route.columns, backward=route.backward)
            for route in routes_of(self.pattern)
        ]

    def image(self) -> pl.BlockSpec:
        """Block of an array (b, l, d)."""
        return pl.BlockSpec((None, self.rows, self.tile), lambda b, c, k: (b, 0, c))

    def image_per_route(self) -> pl.BlockSpec:
        """Block of an array of `routes_shape`."""
        shape = (None, self.rows, self.tile)
        if self.routes_on_lanes:
            tiles = self.channels // self.tile
            return pl.BlockSpec(shape, lambda b, c, k: (b, 0, k * tiles + c))
        return pl.BlockSpec((None, *shape), lambda b, c, k: (k, b, 0, c))

    def matrices(self) -> pl.BlockSpec:
        """Block of an array (b, l, 8 n)."""
        shape = (None, self.rows, 2 * ROUTES * self.states)
        return pl.BlockSpec(shape, lambda b, c, k: (b, 0, 0))

    def weights(self) -> pl.BlockSpec:
        """Block of an array (4, n + 1, d)."""
        return pl.BlockSpec((None, self.states + 1, self.tile), lambda b, c, k: (k, 0, c))

    def direct(self) -> pl.BlockSpec:
        """Block of an array (1, d)."""
        return pl.BlockSpec((1, self.tile), lambda b, c, k: (0, c))

    def starts(self) -> pl.BlockSpec:
        """Block of an array of `starts_shape`."""
        shape = (None, None, self.states, self.lines, self.tile)
        return pl.BlockSpec(shape, lambda b, c, k: (b, k, 0, 0, c))

    def per_line(self) -> Any:
        """Scratch with one row per line and state."""
        return pltpu.VMEM((self.states, self.lines, self.tile), jnp.float32)

    def per_pixel(self) -> Any:
        """Scratch with one row per pixel."""
        return pltpu.VMEM((self.rows, self.tile), jnp.float32)

    @property
    def image_bytes(self) -> int:
        """VMEM of a float32 matrix with a row per pixel."""
        return self.rows * LANES * 4

    @property
    def matrices_bytes(self) -> int:
        """VMEM of B and C."""
        return self.rows * round_up_to(2 * ROUTES * self.states, LANES) * 4

    @property
    def lines_bytes(self) -> int:
        """VMEM of an array with one row per line and state."""
        return self.states * self.lines * LANES * 4


def frame_of(
    u: Array | jax.ShapeDtypeStruct,
    states: int,
    pattern: ScanPattern,
    *,
    delta_softplus: bool = True,
    interpret: Any = False,
) -> Frame:
    """The frame of a scan of an image u, (b, h, w, d)."""
    b, h, w, d = u.shape
    return Frame(b, h, w, d, states, pattern, delta_softplus, interpret)


def round_up_to(size: int, multiple: int) -> int:
    """The next multiple."""
    return pl.cdiv(size, multiple) * multiple


def split_routes(frame: Frame, x: Float[Array, "b h w 4 d"]) -> Array:
    """Per-route images as the kernels read them; see `Frame.routes_on_lanes`."""
    if not frame.routes_on_lanes:
        x = jnp.moveaxis(x, 3, 0)
    return x.reshape(frame.routes_shape)


def join_routes(frame: Frame, x: Array) -> Float[Array, "b h w 4 d"]:
    """Inverse of `split_routes`."""
    image = (frame.batch, frame.height, frame.width)
    if frame.routes_on_lanes:
        return x.reshape(*image, ROUTES, frame.channels)
    return jnp.moveaxis(x.reshape(ROUTES, *image, frame.channels), 0, 3)


class Inputs(NamedTuple):
    """What both kernels read.

    Attributes:
      u: image, (b, l, d).
      delta: step sizes, as `split_routes` gives them.
      matrices: B and C of all routes, (b, l, 8 n): 2 n values of each route, B first.
      weights: A, transposed, and below it the bias of the step sizes, (4, n + 1, d).
      direct: the sum of D over the routes, (1, d).
    """

    u: Any
    delta: Any
    matrices: Any
    weights: Any
    direct: Any


def input_blocks(frame: Frame) -> Inputs:
    """The blocks of the inputs."""
    return Inputs(
        u=frame.image(),
        delta=frame.image_per_route(),
        matrices=frame.matrices(),
        weights=frame.weights(),
        direct=frame.direct(),
    )


def arrange(
    frame: Frame,
    u: Float[Array, "b h w d"],
    delta: Float[Array, "b h w 4 d"],
    A: Float[Array, "4 d n"],
    B: Float[Array, "b h w 4 n"],
    C: Float[Array, "b h w 4 n"],
    D: Float[Array, "4 d"],
    delta_bias: Float[Array, "4 d"],
) -> Inputs:
    """The arguments of a scan as the kernels take them; all but u and delta are float32."""
    pixels = (frame.batch, frame.height * frame.width, -1)
    return Inputs(
        u=u.reshape(pixels),
        delta=split_routes(frame, delta),
        matrices=jnp.concatenate([B, C], -1).reshape(pixels),
        weights=jnp.concatenate([A.swapaxes(1, 2), delta_bias[:, None]], 1),
        direct=jnp.sum(D, 0, keepdims=True),
    )


def vmem_capacity() -> int:
    """VMEM of the TPU here or in the mesh that is set; of the smallest if neither is known."""
    try:
        return int(pltpu.get_tpu_info().vmem_capacity_bytes)
    except ValueError:
        return SMALLEST_VMEM


def compiler_params(vmem: int, *, channels_parallel: bool) -> Any:
    """Mosaic's parameters: which axes of the grid are parallel, and how much VMEM is needed."""
    parallel, arbitrary = pltpu.PARALLEL, pltpu.ARBITRARY
    return pltpu.CompilerParams(
        dimension_semantics=(parallel, parallel if channels_parallel else arbitrary, arbitrary),
        vmem_limit_bytes=vmem,
    )
