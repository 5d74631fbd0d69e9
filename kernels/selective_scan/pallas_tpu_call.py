"""What both TPU kernels take: operands in the layouts of `pallas_tpu_plan`, and their blocks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from .base import Tile
from .pallas_tpu_plan import LANES, Plan, straddles
from .partition import varying_alike


class Packed(NamedTuple):
    """The operands of a scan as the kernels read them; see `pallas_tpu_plan`."""

    u: Float[Array, "b l d"]
    delta: Float[Array, "b l d"]
    A: Float[Array, "n d"]
    matrices: Float[Array, "b group_blocks padded_l lanes"]
    D: Float[Array, "1 d"]
    delta_bias: Float[Array, "1 d"]
    initial_state: Float[Array, "b n d"]


class Specs(NamedTuple):
    """Blocks of the arrays; `sequence` is one of u, delta, y, `channels` one of D, delta_bias."""

    sequence: pl.BlockSpec
    A: pl.BlockSpec
    matrices: pl.BlockSpec
    channels: pl.BlockSpec
    state: pl.BlockSpec
    kept: pl.BlockSpec


@dataclass(frozen=True)
class Layout:
    """A plan, and how many channels a group has without and with padding.

    Groups that straddle tiles in a way that no block can follow are padded by XLA, at the price of
    a copy, to whole tiles.
    """

    plan: Plan
    given: int
    padded: int

    def widen(self, x: Array, axis: int = -1) -> Array:
        """Pads an axis of channels."""
        if self.given == self.padded:
            return x
        x = jnp.moveaxis(x, axis, -1)
        grouped = x.reshape(*x.shape[:-1], -1, self.given)
        spare = self.padded - self.given
        grouped = jnp.pad(grouped, [(0, 0)] * (grouped.ndim - 1) + [(0, spare)])
        return jnp.moveaxis(grouped.reshape(*x.shape[:-1], -1), -1, axis)

    def narrow(self, x: Array) -> Array:
        """Undoes `widen` on the last axis."""
        if self.given == self.padded:
            return x
        grouped = x.reshape(*x.shape[:-1], -1, self.padded)[..., : self.given]
        return grouped.reshape(*x.shape[:-1], -1)

    def specs(self, steps: int, *, flipped: bool) -> Specs:
        """Blocks of `steps` time steps on a grid (sequences, channels, time).

        `flipped`: the grid's last axis runs from the last block of the sequence to the first.
        """
        plan = self.plan
        blocks = -(-plan.length // steps)
        share = plan.channel_blocks // plan.group_blocks  # channel blocks with the same B and C

        def when(t: Array) -> Array:
            return blocks - 1 - t if flipped else t

        def shared(c: Array) -> Array:
            return jax.lax.div(c, np.int32(share))

        def spec(shape: tuple[int, ...], index: Callable[..., tuple]) -> pl.BlockSpec:
            return pl.BlockSpec(shape, index)

        s, d, n = plan.sequences, plan.block_channels, plan.d_state
        return Specs(
            sequence=spec((s, steps, d), lambda b, c, t: (b, when(t), c)),
            A=spec((n, d), lambda b, c, t: (0, c)),
            matrices=spec(
                (s, 1, steps, plan.matrix_lanes),
                lambda b, c, t: (b, jax.lax.div(c, np.int32(share)), when(t), 0),
            ),
            channels=spec((1, d), lambda b, c, t: (0, c)),
            state=spec((s, n, d), lambda b, c, t: (b, 0, c)),
            kept=spec((s, steps // plan.chunk, n, d), lambda b, c, t: (b, when(t), 0, c)),
        )


def prepare(
    operands: tuple[Array | None, ...],
    *,
    delta_softplus: bool,
    reverse: bool,
    tile: Tile | None,
    interpreted: bool,
) -> tuple[Layout, Packed]:
    """The plan for the eight operands of a scan, and the operands packed for it."""
    u, delta, A, B, C, D, delta_bias, initial_state = varying_alike(*_filled(operands))
    layout = lay_out(
        *(u.shape, A.shape[1], B.shape[2]),
        delta_softplus=delta_softplus, reverse=reverse, tile=tile, interpreted=interpreted,
    )  # fmt: skip
    B, C = (x.astype(jnp.result_type(B, C)) for x in (B, C))
    f32 = jnp.float32
    return layout, Packed(
        u=layout.widen(accepted(u)),
        delta=layout.widen(accepted(delta)),
        A=layout.widen(A.astype(f32).T),
        matrices=layout.plan.pack_matrices(accepted(B), accepted(C)),
        D=layout.widen(D.astype(f32)[None]),
        delta_bias=layout.widen(delta_bias.astype(f32)[None]),
        initial_state=layout.widen(jnp.swapaxes(initial_state.astype(f32), 1, 2)),
    )


def lay_out(
    shape: tuple[int, ...],
    d_state: int,
    groups: int,
    *,
    delta_softplus: bool = True,
    reverse: bool = False,
    tile: Tile | None = None,
    interpreted: bool = False,
) -> Layout:
    """The layout for u of a shape (b, l, d)."""
    batch, length, channels = shape
    given = padded = channels // groups
    if straddles(channels, groups, tile):
        padded = -(-given // LANES) * LANES
    plan = Plan(
        *(batch, length, padded * groups, groups, d_state),
        delta_softplus=delta_softplus, reverse=reverse, tile=tile, unrolled=not interpreted,
    )  # fmt: skip
    return Layout(plan, given, padded)


def accepted(x: Array) -> Array:
    """`x` in a dtype that Mosaic takes: it has no float16."""
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


def _filled(operands: Sequence[Any]) -> tuple[Array, ...]:
    """The operands, zeros for those that are None."""
    u, delta, A, B, C, D, delta_bias, initial_state = operands
    zeros = jnp.zeros(A.shape[0], jnp.float32)
    return (
        *(u, delta, A, B, C),
        zeros if D is None else D,
        zeros if delta_bias is None else delta_bias,
        jnp.zeros((u.shape[0], *A.shape), jnp.float32) if initial_state is None else initial_state,
    )
