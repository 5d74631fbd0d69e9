"""The gradient of the fused two-dimensional scan on TPU.

    grid         (image, tile of channels, route), all of an image's steps one after another
    kept         the state before each line, from the forward kernel; all else is recomputed

Gradients of u, B and C are summed over the routes in VMEM, those of B and C over the tiles of
channels as well.
"""

from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from ..selective_scan.base import output
from .frame import (
    LANES,
    ROUTES,
    SPARE_VMEM,
    Frame,
    arrange,
    compiler_params,
    input_blocks,
    join_routes,
)
from .fused_tpu import RouteRefs
from .fused_tpu_route import Gradients, RoutePart, add_gradients, summarize
from .walks import (
    LINES,
    Ref,
    Walk,
    chain_lines,
    convert,
    fill_with_zeros,
    groups_together,
    lines_of,
    masked,
    sum_lines,
    zeros,
)


def backward(frame: Frame, *arrays: Array) -> list[Array]:
    """Runs the backward kernel.

    Args:
      frame: sizes of the scan.
      arrays: those of the forward kernel, the states that it kept, and the gradient of y.

    Returns:
      Gradients of u and delta, in their shapes and dtypes; of B beside C, (b, h, w, 4, 2 n); of A,
      transposed, and below it the bias, (b, 4, n + 1, d); and of D, alike for all routes,
      (b, 1, d).
    """
    *given, starts, y_gradient = arrays
    image = given[0].shape
    inputs = arrange(frame, *given)
    b, channels, u = frame.batch, frame.channels, inputs.u
    shapes = Gradients(
        u=output(u.shape, u.dtype, like=u),
        delta=output(inputs.delta.shape, inputs.delta.dtype, like=u),
        matrices=output(inputs.matrices.shape, jnp.float32, like=u),
        weights=output((b, ROUTES, frame.states + 1, channels), jnp.float32, like=u),
        direct=output((b, 1, channels), jnp.float32, like=u),
    )
    blocks = Gradients(
        u=frame.image(),
        delta=frame.image_per_route(),
        matrices=frame.matrices(),
        weights=pl.BlockSpec(
            (None, None, frame.states + 1, frame.tile), lambda b, c, k: (b, k, 0, c)
        ),
        direct=pl.BlockSpec((None, 1, frame.tile), lambda b, c, k: (b, 0, c)),
    )
    # u, y's gradient and u's gradient; delta and its gradient.
    narrow = [inputs.u.dtype != jnp.float32] * 3 + [inputs.delta.dtype != jnp.float32] * 2
    scratch = [frame.per_pixel(), frame.per_line(), frame.per_line()]
    scratch.append(pltpu.VMEM((*_history_shape(frame), LINES, frame.tile), jnp.float32))
    scratch += [frame.per_pixel() for is_narrow in narrow if is_narrow]
    results = pl.pallas_call(
        partial(_kernel, frame, narrow),
        grid=frame.grid,
        in_specs=[*input_blocks(frame), frame.starts(), frame.image()],
        out_specs=list(blocks),
        out_shape=list(shapes),
        scratch_shapes=scratch,
        compiler_params=compiler_params(backward_vmem(frame, sum(narrow)), channels_parallel=False),
        interpret=frame.interpret,
        name="selective_scan_2d_gradient",
    )(*inputs, starts, y_gradient.reshape(inputs.u.shape))
    of = Gradients(*results)
    matrices = of.matrices.reshape(*image[:3], ROUTES, -1)
    return [of.u.reshape(image), join_routes(frame, of.delta), matrices, of.weights, of.direct]


def backward_vmem(frame: Frame, narrow: int = 0) -> int:
    """Bytes of VMEM of the backward kernel, where `narrow` images are not float32.

    Two buffers for each of u, delta and y's gradient, the gradients of u and delta, for B, C and
    their gradients, and for the kept states; and the scratch.
    """
    images = 2 * 5 + 1 + narrow
    steps, chains = _history_shape(frame)
    return (
        images * frame.image_bytes
        + 4 * frame.matrices_bytes
        + 4 * frame.lines_bytes
        + steps * chains * LINES * LANES * 4
        + SPARE_VMEM
    )


def _history_shape(frame: Frame) -> tuple[int, int]:
    """Steps of a line, and states of a block of lines: what the second pass remembers."""
    walks = frame.walks()
    together = max(groups_together(walk.groups, frame.states) for walk in walks)
    return max(walk.steps for walk in walks), together * frame.states


def _kernel(frame: Frame, narrow: Sequence[bool], *refs: Ref) -> None:
    """Adds the gradients of one route of one image."""
    u, delta, matrices, weights, direct, starts, y_gradient, *rest = refs
    into = Gradients(*rest[:5])
    steps, decay, passed, history, *wide = rest[5:]
    wide_u, wide_y, wide_of_u, wide_delta, wide_of_delta = (
        wide.pop(0) if is_narrow else None for is_narrow in narrow
    )
    image = RouteRefs(
        u=u if wide_u is None else wide_u,
        delta=delta if wide_delta is None else wide_delta,
        matrices=matrices,
        weights=weights,
        steps=steps,
    )
    of_y = y_gradient if wide_y is None else wide_y
    totals = into._replace(
        u=into.u if wide_of_u is None else wide_of_u,
        delta=into.delta if wide_of_delta is None else wide_of_delta,
    )
    tile_index, route = pl.program_id(1), pl.program_id(2)
    if wide_delta is not None:
        convert(delta, wide_delta)
    into.weights[...] = jnp.zeros_like(into.weights)

    @pl.when(route == 0)
    def _() -> None:
        if wide_u is not None and wide_y is not None:
            convert(u, wide_u)
            convert(y_gradient, wide_y)
        _direct_path(frame, image.u, direct, of_y, totals)

    @pl.when((route == 0) & (tile_index == 0))
    def _() -> None:
        fill_with_zeros(into.matrices)

    for k, walk in enumerate(frame.walks()):

        @pl.when(route == k)
        def _(k: int = k, walk: Walk = walk) -> None:
            part = RoutePart(frame, walk, k, image, of_y, _channels_inside(frame, tile_index))
            summarize(part, decay, passed)
            chain_lines(walk.turned(), decay, passed)
            add_gradients(part, starts, passed, history, totals)

    if wide_of_delta is not None:
        convert(wide_of_delta, into.delta)
    if wide_of_u is not None:

        @pl.when(route == ROUTES - 1)
        def _() -> None:
            convert(wide_of_u, into.u)


def _channels_inside(frame: Frame, tile_index: Array) -> Array | None:
    if frame.channels % frame.tile == 0:
        return None
    channel = tile_index * frame.tile + lax.broadcasted_iota(jnp.int32, (1, frame.tile), 1)
    return channel < frame.channels


def _direct_path(frame: Frame, u: Ref, direct: Ref, of_y: Ref, totals: Gradients) -> None:
    """Gradients of y = D u: starts the sum of u's, and gives D's."""
    weight = direct[...]
    pixels = frame.height * frame.width

    def body(i: Array, total: Array) -> Array:
        rows = lines_of(i)
        totals.u[rows, :] = weight * of_y[rows, :]
        row = i * LINES + lax.broadcasted_iota(jnp.int32, (LINES, 1), 0)
        return total + masked(u[rows, :] * of_y[rows, :], row < pixels)

    total = lax.fori_loop(0, frame.rows // LINES, body, zeros(frame.tile))
    totals.direct[...] = sum_lines(total)
