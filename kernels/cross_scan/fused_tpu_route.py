"""The gradient of one route of the fused two-dimensional scan on TPU.

With y' the gradient of y, and l_t the gradient that reaches the state at pixel t from its own
output and from everything after it,

    l_t = C_t y'_t + q_{t+1},    q_t = decay_t l_t

is a recurrence like the states', run the other way. So the same three parts serve it: a first pass
finds what each line does to the q behind it, a loop passes q from line to line, and the second
pass, a block of lines at a time, recomputes the states of the block from their starts, then walks
back over them and writes the gradients.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..selective_scan.pallas_tpu_math import logistic
from .frame import (
    Frame,
)
from .fused_tpu import RouteRefs, find_steps
from .walks import (
    LINES,
    Ref,
    Walk,
    for_each_block,
    groups_together,
    lines_of,
    masked,
    sum_channels,
    sum_lines,
    walk_ahead,
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


class RoutePart(NamedTuple):
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


def summarize(part: RoutePart, decay: Ref, ends: Ref) -> None:
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


def add_gradients(
    part: RoutePart, starts: Ref, passed: Ref, history: Ref, totals: Gradients
) -> None:
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


def _recompute_states(
    part: RoutePart, groups: list[Array | int], starts: Ref, history: Ref
) -> None:
    """Writes the state before each step of a block of lines to `history`."""
    frame, walk, k, image, _, _ = part
    states = range(frame.states)
    rates = image.rates()

    def read(s: Array) -> list[Any]:
        return [image.B(walk.tile(group, walk.step(s)), k) for group in groups]

    def body(s: Array, carry: list[list[Array]], matrices: list[Any]) -> list[list[Array]]:
        after = []
        for i, (group, state, B) in enumerate(zip(groups, carry, matrices, strict=True)):
            tile = walk.tile(group, walk.step(s))
            step = image.steps[tile, :]
            driven = step * image.u[tile, :]
            for m in states:
                history[s, i * frame.states + m] = state[m]
            after.append([jnp.exp(step * rates[m]) * state[m] + driven * B[m] for m in states])
        return after

    start = [[starts[m, lines_of(group), :] for m in states] for group in groups]
    walk_ahead(walk, frame.tile, read, body, start)


def _tile_gradient(
    part: RoutePart,
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
        of_delta *= logistic(image.delta[tile, :] + image.bias())

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
