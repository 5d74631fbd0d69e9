"""The gradient of the fused two-dimensional scan on TPU.

    grid         (image, tile of channels, route), all of an image's steps one after another
    kept         the state before each line, from the forward kernel; all else is recomputed

With y' the gradient of y, and l_t the gradient that reaches the state at pixel t from its own
output and from everything after it,

    l_t = C_t y'_t + q_{t+1},    q_t = decay_t l_t

is a recurrence like the states', run the other way. So the same three parts serve it: a first pass
finds what each line does to the q behind it, a loop passes q from line to line, and the second
pass, a block of lines at a time, recomputes the states of the block from their starts, then walks
back over them and writes the gradients. Those of u, B and C are summed over the routes in VMEM,
those of B and C over the tiles of channels as well.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

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
from .fused_tpu import RouteRefs, find_steps
from .walks import (
    LINES,
    Ref,
    Walk,
    chain_lines,
    convert,
    fill_with_zeros,
    for_each_block,
    groups_together,
    lines_of,
    masked,
    sum_channels,
    sum_lines,
    zeros,
)


class Gradients(NamedTuple):
    """What the backward kernel gives.

    Attributes:
      u: (b, l, d) in u's dtype.
      delta: in the form and dtype of `Inputs.delta`.
      matrices: (b, l, 8 n), as `Inputs.matrices`.
      weights: (b, 4, n + 1, d), for each image that of `Inputs.weights`.
      direct: (b, 1, d), the gradient of every route's D from each image.
    """

    u: Any
    delta: Any
    matrices: Any
    weights: Any
    direct: Any


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
            part = _Part(frame, walk, k, image, of_y, _channels_inside(frame, tile_index))
            _summarize(part, decay, passed)
            chain_lines(walk.turned(), decay, passed)
            _add_gradients(part, starts, passed, history, totals)

    if wide_of_delta is not None:
        convert(wide_of_delta, into.delta)
    if wide_of_u is not None:

        @pl.when(route == ROUTES - 1)
        def _() -> None:
            convert(wide_of_u, into.u)


class _Part(NamedTuple):
    """What both passes over a route need.

    Attributes:
      frame: the sizes.
      walk: the route.
      k: its number.
      image: the inputs.
      of_y: the gradient of y.
      channels: mask (1, c) of the block's channels that exist; None if all do.
    """

    frame: Frame
    walk: Walk
    k: int
    image: RouteRefs
    of_y: Ref
    channels: Array | None


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


def _summarize(part: _Part, decay: Ref, ends: Ref) -> None:
    """First pass: what each line does to the q behind it, as decay and end."""
    frame, walk, k, image, of_y, _ = part
    states = range(frame.states)
    rates = image.rates()
    turned = walk.turned()

    def visit(groups: list[Array | int]) -> None:
        def body(s: Array, carry: list[tuple[Array, list[Array]]]) -> list[Any]:
            t = turned.step(s)
            after = []
            for group, (time, q) in zip(groups, carry, strict=True):
                tile = walk.tile(group, t)
                step = find_steps(frame, image, tile)
                y = of_y[tile, :]
                C = image.C(tile, k)
                q = [jnp.exp(step * rates[m]) * (q[m] + C[m] * y) for m in states]
                after.append((time + step, q))
            return after

        nothing = zeros(frame.tile)
        carry = [(nothing, [nothing for _ in states]) for _ in groups]
        carry = lax.fori_loop(0, walk.steps, body, carry)
        for group, (time, q) in zip(groups, carry, strict=True):
            for m in states:
                decay[m, lines_of(group), :] = jnp.exp(time * rates[m])
                ends[m, lines_of(group), :] = q[m]

    for_each_block(walk, groups_together(walk.groups, frame.states), visit)


def _add_gradients(part: _Part, starts: Ref, passed: Ref, history: Ref, totals: Gradients) -> None:
    """Second pass: the gradients of each block of lines, from its starts and the q behind it."""
    frame, walk = part.frame, part.walk
    states = range(frame.states)

    def visit(groups: list[Array | int]) -> None:
        _recompute_states(part, groups, starts, history)

        def body(s: Array, carry: tuple[list[list[Array]], list[Array]]) -> tuple[Any, Any]:
            qs, of_weights = carry
            before = walk.steps - 1 - s
            after = []
            for i, (group, q) in enumerate(zip(groups, qs, strict=True)):
                remembered = [history[before, i * frame.states + m] for m in states]
                tile = walk.tile(group, walk.step(before))
                q, parts = _tile_gradient(part, group, tile, q, remembered, totals)
                after.append(q)
                of_weights = [x + y for x, y in zip(of_weights, parts, strict=True)]
            return after, of_weights

        qs = [[passed[m, lines_of(group), :] for m in states] for group in groups]
        nothing = [zeros(frame.tile)] * (frame.states + 1)
        _, of_weights = lax.fori_loop(0, walk.steps, body, (qs, nothing))
        for row, x in enumerate(of_weights):
            totals.weights[row : row + 1, :] += sum_lines(x)

    for_each_block(walk, groups_together(walk.groups, frame.states), visit)


def _recompute_states(part: _Part, groups: list[Array | int], starts: Ref, history: Ref) -> None:
    """Writes the state before each step of a block of lines to `history`."""
    frame, walk, k, image, _, _ = part
    states = range(frame.states)
    rates = image.rates()

    def body(s: Array, carry: list[list[Array]]) -> list[list[Array]]:
        after = []
        for i, (group, state) in enumerate(zip(groups, carry, strict=True)):
            tile = walk.tile(group, walk.step(s))
            step = image.steps[tile, :]
            driven = step * image.u[tile, :]
            B = image.B(tile, k)
            for m in states:
                history[s, i * frame.states + m] = state[m]
            after.append([jnp.exp(step * rates[m]) * state[m] + driven * B[m] for m in states])
        return after

    start = [[starts[m, lines_of(group), :] for m in states] for group in groups]
    lax.fori_loop(0, walk.steps, body, start)


def _tile_gradient(
    part: _Part,
    group: Array | int,
    tile: Any,
    q: list[Float[Array, "8 c"]],
    remembered: list[Float[Array, "8 c"]],
    totals: Gradients,
) -> tuple[list[Float[Array, "8 c"]], list[Float[Array, "8 c"]]]:
    """Adds the gradients of one tile.

    Args:
      part: the route.
      group: the tile's group.
      tile: its rows.
      q: what the pixels after it pass on.
      remembered: the states before it.
      totals: where the gradients are summed.

    Returns:
      What it passes on, and the gradient of the weights, not yet summed over lines.
    """
    frame, walk, k, image, of_y, channels = part
    step, u, y = image.steps[tile, :], image.u[tile, :], of_y[tile, :]
    driven = step * u
    of_driven = of_step = jnp.zeros_like(step)
    passed_on, of_rates, of_B, of_C = [], [], [], []
    pairs = zip(image.rates(), image.B(tile, k), image.C(tile, k), strict=True)
    for m, (rate, B, C) in enumerate(pairs):
        decay = jnp.exp(step * rate)
        reaching = C * y + q[m]
        passed_on.append(decay * reaching)
        of_exponent = passed_on[m] * remembered[m]
        of_driven += reaching * B
        of_step += of_exponent * rate
        of_rates.append(of_exponent * step)
        of_B.append(sum_channels(masked(reaching * driven, channels)))
        of_C.append(sum_channels(masked((decay * remembered[m] + driven * B) * y, channels)))
    of_delta = of_step + u * of_driven
    if frame.delta_softplus:
        of_delta *= jax.nn.sigmoid(image.delta[tile, :] + image.bias())

    written = walk.inside(group) if walk.overlapping else None
    totals.u[tile, :] += masked(step * of_driven, written)
    of_matrices = _as_columns(of_B + of_C, 2 * frame.states * k, totals.matrices.shape[1])
    totals.matrices[tile, :] += masked(of_matrices, written)
    if written is None:
        totals.delta[tile, :] = of_delta
    else:
        totals.delta[tile, :] = jnp.where(written, of_delta, totals.delta[tile, :])
    return passed_on, [masked(x, walk.inside(group)) for x in (*of_rates, of_delta)]


def _as_columns(columns: list[Float[Array, "8 1"]], first: int, size: int) -> Array:
    """A tile (8, size) with the given columns from `first` on, and zeros elsewhere."""
    lane = lax.broadcasted_iota(jnp.int32, (LINES, size), 1)
    tile = jnp.zeros((LINES, size), jnp.float32)
    for i, column in enumerate(columns):
        tile = jnp.where(lane == first + i, column, tile)
    return tile
