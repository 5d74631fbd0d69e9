"""Forward half of the Triton scan, and how its kernels are called; `triton_gpu` has the picture."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from .base import Tile, output
from .pallas_gpu_forward import prepare
from .pallas_gpu_plan import Operands
from .partition import varying_alike


def heuristic_tile(n: int) -> Tile:
    """The tile for n states; with more than one, 64 steps or 4 warps need too many registers."""
    return Tile(64) if n == 1 else Tile(32, warps=8)


class Launch(NamedTuple):
    """One call of a Triton kernel.

    Attributes:
      kernel: the `triton.jit` function; its arguments are inputs, outputs, constants.
      outputs: types of the results.
      grid: numbers of programs.
      constants: the arguments that are fixed at compile time.
      warps: warps of a program.
    """

    kernel: Any
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    grid: tuple[int, int, int]
    constants: dict[str, Any]
    warps: int


# Something that runs a `Launch` on arrays.
Runner = Callable[..., tuple[Array, ...]]


def run_on_gpu(launch: Launch, *inputs: Array) -> tuple[Array, ...]:
    """Runs a kernel through jax-triton."""
    import jax_triton

    results = jax_triton.triton_call(
        *inputs,
        kernel=launch.kernel,
        out_shape=launch.outputs,
        grid=launch.grid,
        num_warps=launch.warps,
        num_stages=1,
        **launch.constants,
    )
    # jax-triton leaves out over which mesh axes a result varies.
    return varying_alike(inputs[0], *results)[1:]


class Sizes(NamedTuple):
    """Sizes of a scan and of its tiles; grids, constants and types of results follow from them."""

    b: int
    length: int
    d: int
    n: int
    groups: int
    tile: Tile
    flags: dict[str, bool]

    @property
    def tiles(self) -> int:
        """Tiles of the length."""
        return pl.cdiv(self.length, self.tile.steps)

    @property
    def blocks(self) -> int:
        """Blocks of channels of a group."""
        return pl.cdiv(self.d // self.groups, self.tile.channels or 1)

    def over_tiles(self, kernel: Any, *outputs: jax.ShapeDtypeStruct, warps: int = 4) -> Launch:
        """A call with a program a tile, of so many warps unless the tile says how many."""
        constants: dict[str, Any] = dict(L=self.length, D=self.d, N=self.n, G=self.groups)
        constants |= dict(T=self.tile.steps, BD=self.tile.channels) | self.flags
        grid = (self.tiles, self.groups * self.blocks, self.b)
        return Launch(kernel, outputs, grid, constants, self.tile.warps or warps)

    def over_channels(self, kernel: Any, *outputs: jax.ShapeDtypeStruct, backward: bool) -> Launch:
        """A call that combines tiles, with a program a block of channels and state."""
        block = min(32, pl.next_power_of_2(self.d))
        steps = min(32, pl.next_power_of_2(self.tiles))
        constants = dict(TILES=self.tiles, D=self.d, N=self.n, T=steps, BD=block, BACKWARD=backward)
        return Launch(kernel, outputs, (pl.cdiv(self.d, block), self.n, self.b), constants, 4)

    def results(self, like: Array, *shapes: tuple[int, ...]) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Types of float32 results."""
        return tuple(output(shape, jnp.float32, like=like) for shape in shapes)


def tile_steps(length: int, n: int, tile: Tile | None) -> int:
    """Time steps of a tile, a power of two."""
    return min((tile or heuristic_tile(n)).steps, pl.next_power_of_2(length))


def kept_states(length: int, d_state: int, tile: Tile | None) -> int:
    """States that are kept of a sequence; see `base.Kernel`."""
    return pl.cdiv(length, tile_steps(length, d_state, tile))


def sizes(operands: Operands, tile: Tile | None, *, delta_softplus: bool, reverse: bool) -> Sizes:
    """The sizes of a scan; 32 channels a tile unless given."""
    (b, length, d), n, groups = operands.u.shape, operands.A.shape[0], operands.B.shape[2]
    _, channels, warps = tile or heuristic_tile(n)
    channels = channels or min(32, pl.next_power_of_2(d // groups))
    tile = Tile(tile_steps(length, n, tile), channels, warps)
    flags = dict(SOFTPLUS=delta_softplus, REVERSE=reverse)
    return Sizes(b, length, d, n, groups, tile, flags)


def combine(
    size: Sizes,
    run: Runner,
    A: Float[Array, "n d"],
    start: Float[Array, "b n d"],
    state: Float[Array, "b t n d"],
    steps: Float[Array, "b t d"],
    *,
    backward: bool = False,
) -> tuple[Float[Array, "b t n d"], Float[Array, "b n d"]]:
    """What enters each tile and what leaves the last, from what each adds of itself."""
    from .triton_kernels import combine as kernel

    results = size.results(start, state.shape, start.shape)
    launch = size.over_channels(kernel, *results, backward=backward)
    starts, last = run(launch, state, steps, A, start)
    return starts, last


def forward(
    u: Float[Array, "b l d"],
    delta: Float[Array, "b l d"],
    A: Float[Array, "d n"],
    B: Float[Array, "b l g n"],
    C: Float[Array, "b l g n"],
    D: Float[Array, "d"] | None,
    delta_bias: Float[Array, "d"] | None,
    initial_state: Float[Array, "b d n"] | None,
    *,
    delta_softplus: bool,
    reverse: bool,
    tile: Tile | None = None,
    interpret: Runner | bool = False,
) -> tuple[Float[Array, "b l d"], Float[Array, "b d n"], Float[Array, "b t n d"]]:
    """y, the last state, and the state before every tile; see `selective_scan`.

    `interpret` may be a function that runs kernels in place of `run_on_gpu`.
    """
    from . import triton_kernels as kernels

    run = interpret if callable(interpret) else run_on_gpu
    x, start = prepare(u, delta, A, B, C, D, delta_bias, initial_state)
    size = sizes(x, tile, delta_softplus=delta_softplus, reverse=reverse)
    shapes = (size.b, size.tiles, size.n, size.d), (size.b, size.tiles, size.d)
    launch = size.over_tiles(kernels.ends, *size.results(u, *shapes))
    state, steps = run(launch, x.u, x.delta, x.A, x.B, x.delta_bias)
    starts, last = combine(size, run, x.A, start, state, steps)
    launch = size.over_tiles(kernels.outputs, output(u.shape, u.dtype, like=u))
    (y,) = run(launch, x.u, x.delta, x.A, x.B, x.C, x.D, x.delta_bias, starts)
    return y, last.swapaxes(1, 2), starts
