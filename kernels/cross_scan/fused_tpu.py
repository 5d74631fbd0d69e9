"""The fused two-dimensional scan on TPU: four routes over an image that stays in VMEM.

    grid         (image, tile of channels, route); routes one after another, the image fetched once
    in VMEM      one tile of channels of the whole image, and the step sizes of one route
    parallel     channels on lanes, eight neighbouring lines (rows or columns) on sublanes
    sequential   the pixels of a line

A line of a route maps the state before it to the state after it: state -> decay state + end. The
first pass over a route finds both for all lines, eight at a time. A short loop then passes the
state from line to line, and the second pass, knowing where each line starts, computes the outputs
and adds them to those of the other routes. So the image is read where it lies, whichever way the
route goes, and nothing of its size is written but the result.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from ..matmul import matmul
from ..selective_scan.base import output
from ..selective_scan.pallas_tpu_math import softplus
from .frame import ROUTES, SPARE_VMEM, Frame, arrange, compiler_params, input_blocks
from .patterns import add_up
from .walks import (
    LINES,
    Ref,
    Walk,
    chain_lines,
    convert,
    for_each_block,
    groups_together,
    lines_of,
    masked,
    walk_ahead,
    zeros,
)

MAX_STATES = 16  # as many states of a group of lines as the registers hold


def step_sizes(
    delta: Float[Array, "b h w 4 d"] | Float[Array, "b h w 4 r"],
    dt_proj: Float[Array, "4 r d"] | None,
) -> list[Float[Array, "b h w 4 d"]]:
    """Step sizes of all routes in image layout, before bias and softplus.

    One product with a block-diagonal matrix: it multiplies zeros, but a batched product would have
    to move the routes to the front and the result back.
    """
    if dt_proj is None:
        return [delta]
    together = delta.reshape(*delta.shape[:3], -1)
    diagonal = jnp.eye(ROUTES, dtype=dt_proj.dtype)[:, None, :, None] * dt_proj[:, :, None, :]
    raised = matmul(together, diagonal.reshape(together.shape[-1], -1))
    return [raised.reshape(*delta.shape[:4], -1)]


def kept_shape(frame: Frame) -> tuple[int, ...]:
    """Shape of the states that are kept: those before each line of each route."""
    return frame.starts_shape


def forward(frame: Frame, *arrays: Array) -> list[Array]:
    """Runs the forward kernel.

    Args:
      frame: sizes of the scan.
      arrays: u, delta, A, B, C, D and delta_bias of `selective_scan_2d`.

    Returns:
      y in u's dtype, and the states before each line of each route, float32, of `kept_shape`: less
      than a hundredth of what is read where lines have 50 pixels.
    """
    inputs = arrange(frame, *arrays)
    narrow = [x.dtype != jnp.float32 for x in (inputs.u, inputs.delta, inputs.u)]
    scratch = [frame.per_pixel(), frame.per_line()]
    scratch += [frame.per_pixel() for is_narrow in narrow if is_narrow]
    y, starts = pl.pallas_call(
        partial(_kernel, frame, narrow),
        grid=frame.grid,
        in_specs=list(input_blocks(frame)),
        out_specs=[frame.image(), frame.starts()],
        out_shape=[
            output(inputs.u.shape, inputs.u.dtype, like=inputs.u),
            output(frame.starts_shape, jnp.float32, like=inputs.u),
        ],
        scratch_shapes=scratch,
        compiler_params=compiler_params(forward_vmem(frame, sum(narrow)), channels_parallel=True),
        interpret=frame.interpret,
        name="selective_scan_2d",
    )(*inputs)
    return [y.reshape(arrays[0].shape), starts]


def forward_vmem(frame: Frame, narrow: int = 0) -> int:
    """Bytes of VMEM of the forward kernel, where `narrow` images are not float32.

    Two buffers for each of u, delta, y, for B and C and for the kept states, and the scratch.
    """
    images = 2 * 3 + 1 + narrow
    return (
        images * frame.image_bytes + 2 * frame.matrices_bytes + 3 * frame.lines_bytes + SPARE_VMEM
    )


class RouteRefs(NamedTuple):
    """Memory that the passes over a route share: float32 matrices with a row per pixel.

    Attributes:
      u: input.
      delta: step sizes of this route, before bias and softplus.
      matrices: B and C of all routes.
      weights: A of this route, and its bias.
      steps: step sizes of this route, after bias and softplus; written by the first pass.
    """

    u: Ref
    delta: Ref
    matrices: Ref
    weights: Ref
    steps: Ref

    def rates(self) -> list[Float[Array, "1 c"]]:
        """The rows of A."""
        return [self.weights[m : m + 1, :] for m in range(self.weights.shape[0] - 1)]

    def bias(self) -> Float[Array, "1 c"]:
        """The bias of the step sizes."""
        return self.weights[self.weights.shape[0] - 1 :, :]

    def B(self, tile: Any, route: int) -> list[Float[Array, "8 1"]]:
        """One column per state, to be broadcast over the channels."""
        return self._columns(tile, 2 * route)

    def C(self, tile: Any, route: int) -> list[Float[Array, "8 1"]]:
        """As `B`."""
        return self._columns(tile, 2 * route + 1)

    def _columns(self, tile: Any, index: int) -> list[Float[Array, "8 1"]]:
        n = self.weights.shape[0] - 1
        values = self.matrices[tile, :]
        return [values[:, m : m + 1] for m in range(index * n, (index + 1) * n)]


def find_steps(frame: Frame, image: RouteRefs, tile: Any) -> Float[Array, "8 c"]:
    """Step sizes of a tile, which are also kept in `image.steps`."""
    step = image.delta[tile, :] + image.bias()
    if frame.delta_softplus:
        step = softplus(step)
    image.steps[tile, :] = step
    return step


def _kernel(frame: Frame, narrow: Sequence[bool], *refs: Ref) -> None:
    """Adds one route of one image to y."""
    u, delta, matrices, weights, direct, y, starts, steps, decay, *wide = refs
    wide_u, wide_delta, wide_y = (wide.pop(0) if is_narrow else None for is_narrow in narrow)
    route = pl.program_id(2)
    total = y if wide_y is None else wide_y
    image = RouteRefs(
        u=u if wide_u is None else wide_u,
        delta=delta if wide_delta is None else wide_delta,
        matrices=matrices,
        weights=weights,
        steps=steps,
    )

    if wide_delta is not None:
        convert(delta, wide_delta)

    @pl.when(route == 0)
    def _() -> None:
        if wide_u is not None:
            convert(u, wide_u)
        scale_rows(image.u, direct[...], total)

    for k, walk in enumerate(frame.walks()):

        @pl.when(route == k)
        def _(k: int = k, walk: Walk = walk) -> None:
            _summarize(frame, walk, k, image, decay, starts)
            chain_lines(walk, decay, starts)
            _add_outputs(frame, walk, k, image, starts, total)

    if wide_y is not None:

        @pl.when(route == ROUTES - 1)
        def _() -> None:
            convert(wide_y, y)


def scale_rows(source: Ref, factor: Float[Array, "1 c"], target: Ref) -> None:
    """Writes factor * source to target."""

    def body(i: Array, carry: None) -> None:
        rows = lines_of(i)
        target[rows, :] = factor * source[rows, :]

    lax.fori_loop(0, target.shape[0] // LINES, body, None)


def _summarize(frame: Frame, walk: Walk, k: int, image: RouteRefs, decay: Ref, ends: Ref) -> None:
    """First pass: what each line does to the state before it, as decay and end."""
    states = range(frame.states)
    rates = image.rates()

    def visit(groups: list[Array | int]) -> None:
        def body(s: Array, carry: list[tuple[Array, list[Array]]]) -> list[Any]:
            t = walk.step(s)
            after = []
            for group, (time, state) in zip(groups, carry, strict=True):
                tile = walk.tile(group, t)
                step = find_steps(frame, image, tile)
                driven = step * image.u[tile, :]
                B = image.B(tile, k)
                state = [jnp.exp(step * rates[m]) * state[m] + driven * B[m] for m in states]
                after.append((time + step, state))
            return after

        nothing = zeros(frame.tile)
        carry = [(nothing, [nothing for _ in states]) for _ in groups]
        carry = lax.fori_loop(0, walk.steps, body, carry)
        for group, (time, state) in zip(groups, carry, strict=True):
            for m in states:
                decay[m, lines_of(group), :] = jnp.exp(time * rates[m])
                ends[m, lines_of(group), :] = state[m]

    for_each_block(walk, groups_together(walk.groups, frame.states), visit)


def _add_outputs(
    frame: Frame, walk: Walk, k: int, image: RouteRefs, starts: Ref, total: Ref
) -> None:
    """Second pass: the outputs of each line, from its start."""
    states = range(frame.states)
    rates = image.rates()

    def visit(groups: list[Array | int]) -> None:
        def read(s: Array) -> list[Any]:
            tiles = [walk.tile(group, walk.step(s)) for group in groups]
            return [[image.B(tile, k), image.C(tile, k)] for tile in tiles]

        def body(s: Array, carry: list[list[Array]], matrices: list[Any]) -> list[list[Array]]:
            t = walk.step(s)
            after = []
            for group, state, (B, C) in zip(groups, carry, matrices, strict=True):
                tile = walk.tile(group, t)
                step = image.steps[tile, :]
                driven = step * image.u[tile, :]
                state = [jnp.exp(step * rates[m]) * state[m] + driven * B[m] for m in states]
                y = add_up([C[m] * state[m] for m in states])
                total[tile, :] += masked(y, walk.inside(group) if walk.overlapping else None)
                after.append(state)
            return after

        start = [[starts[m, lines_of(group), :] for m in states] for group in groups]
        walk_ahead(walk, frame.tile, read, body, start)

    for_each_block(walk, groups_together(walk.groups, frame.states), visit)
