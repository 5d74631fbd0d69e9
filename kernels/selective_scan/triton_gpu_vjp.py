"""Gradient of the Triton scan: the adjoint recurrence, tile by tile like the states.

    adjoint_ends   each tile from nothing after it: what it passes on to the state before it
    combine        what enters each tile from later ones
    gradients      each tile: its states again, the adjoints, and every gradient

Gradients of B and C are partial sums a block of channels, the others a tile, and added by XLA: the
same bits every time.

Memory traffic in bytes a value of u, float32: 28, and 16 n / BD for the partial sums of B and C,
28 n / T for what stands between tiles.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from .base import Tile, output
from .pallas_gpu_forward import prepare
from .triton_gpu_forward import Runner, combine, run_on_gpu, sizes


def backward(
    u: Float[Array, "b l d"],
    delta: Float[Array, "b l d"],
    A: Float[Array, "d n"],
    B: Float[Array, "b l g n"],
    C: Float[Array, "b l g n"],
    D: Float[Array, "d"] | None,
    delta_bias: Float[Array, "d"] | None,
    initial_state: Float[Array, "b d n"] | None,
    kept: Float[Array, "b t n d"],
    y_gradient: Float[Array, "b l d"],
    state_gradient: Float[Array, "b d n"],
    *,
    delta_softplus: bool,
    reverse: bool,
    tile: Tile | None = None,
    interpret: Runner | bool = False,
) -> tuple[Array | None, ...]:
    """The gradient of each operand, None for those that are None; see `selective_scan`."""
    from . import triton_kernels_vjp as kernels

    run = interpret if callable(interpret) else run_on_gpu
    x, _ = prepare(u, delta, A, B, C, D, delta_bias, initial_state)
    size = sizes(x, tile, delta_softplus=delta_softplus, reverse=reverse)
    of_channel, of_state = (size.b, size.tiles, size.d), (size.b, size.tiles, size.n, size.d)
    of_matrix = (size.b, size.groups * size.blocks, size.n, size.length)

    launch = size.over_tiles(kernels.adjoint_ends, *size.results(u, of_state, of_channel))
    passed, steps = run(launch, x.delta, x.A, x.C, x.delta_bias, y_gradient)
    after = state_gradient.astype(jnp.float32).swapaxes(1, 2)
    entering, of_start = combine(size, run, x.A, after, passed, steps, backward=True)
    types = (
        *(output(u.shape, given.dtype, like=u) for given in (u, delta)),
        *size.results(u, of_state, of_matrix, of_matrix, of_channel, of_channel),
    )
    inputs = (*x, kept, entering, y_gradient)
    launch = size.over_tiles(kernels.gradients, *types, warps=8)  # 4 would spill
    of_u, of_delta, of_A, of_B, of_C, of_D, of_bias = run(launch, *inputs)

    def summed(parts: Array) -> Float[Array, "b l g n"]:
        parts = parts.reshape(size.b, size.groups, size.blocks, size.n, size.length)
        return jnp.moveaxis(parts.sum(2), -1, 1)

    def as_given(value: Any, operand: Array | None) -> Array | None:
        return None if operand is None else value.astype(operand.dtype)

    return (
        of_u,
        of_delta,
        as_given(of_A.sum((0, 1)).T, A),
        as_given(summed(of_B), B),
        as_given(summed(of_C), C),
        as_given(of_D.sum((0, 1)), D),
        as_given(of_bias.sum((0, 1)), delta_bias),
        as_given(of_start.swapaxes(1, 2), initial_state),
    )
