"""One chunk of a scan with all its steps at once, but for the recurrence itself.

    step sizes, decay, drive of all steps      at once
    states                                     a parallel prefix, or on a CPU a loop
    outputs or gradients of all steps          at once

An accelerator keeps its cores busy so. On a CPU it pays for the gradient while the states are few:
each step then holds too little work for the dozen fused loops that it would take by itself.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..platforms import by_platform
from .base import compose
from .chunked_base import (
    Operands,
    Options,
    fold_sum,
    step_size,
    step_size_gradient,
    sum_channels,
    sum_steps,
)


@partial(jax.jit, static_argnames="options")
def outputs(
    x: Operands, state: Float[Array, "b n g p"], options: Options
) -> tuple[Float[Array, "b t g p"], Float[Array, "b n g p"]]:
    """The outputs without the direct path, and the state after the last step in scan order."""
    step = step_size(x, options)
    drive = (step * x.u)[:, :, None] * x.B[..., None]
    states = _recurrence(_decay(x, step), drive, state, reverse=options.reverse)
    return fold_sum(states * x.C[..., None], 2), _last(states, reverse=options.reverse)


@partial(jax.jit, static_argnames="options")
def gradient(
    x: Operands,
    start: Float[Array, "b n g p"],
    y_gradient: Float[Array, "b t g p"],
    carried: Float[Array, "b n g p"],
    options: Options,
) -> tuple[Float[Array, "b n g p"], Operands]:
    """Gradient of one chunk.

    With l_t the gradient reaching state t from everything after it and its own output,

        l_t = C_t y'_t + q_{t+1},    q_t = decay_t l_t

    q_t being what it passes on to state t - 1: a recurrence like the states', run the other way.

    Args:
      x: the chunk's operands.
      start: state before the chunk.
      y_gradient: gradient of its y.
      carried: gradient of the state after the chunk that comes from later chunks.
      options: those of the scan.

    Returns:
      Gradient of `start`, and of the operands.
    """
    reverse = options.reverse
    step = step_size(x, options)
    decay, driven = _decay(x, step), step * x.u
    states = _recurrence(decay, driven[:, :, None] * x.B[..., None], start, reverse=reverse)

    from_output = y_gradient[:, :, None] * x.C[..., None]
    passed_on = _recurrence(decay, decay * from_output, carried, reverse=not reverse)
    reaching = from_output + _previous(passed_on, carried, reverse=not reverse)
    of_exponent = passed_on * _previous(states, start, reverse=reverse)

    of_driven = fold_sum(reaching * x.B[..., None], 2)
    of_step = x.u * of_driven + fold_sum(of_exponent * x.A, 2)
    of_delta = step_size_gradient(x, of_step, options)
    of_u = step * of_driven
    return _last(passed_on, reverse=not reverse), Operands(
        u=of_u if x.D is None else of_u + x.D * y_gradient,
        delta=of_delta,
        A=sum_steps(of_exponent * step[:, :, None]),
        B=_sum_channels(reaching * driven[:, :, None]),
        C=_sum_channels(states * y_gradient[:, :, None]),
        D=None if x.D is None else sum_steps(x.u * y_gradient),
        delta_bias=None if x.delta_bias is None else sum_steps(of_delta),
    )


def _decay(x: Operands, step: Float[Array, "b t g p"]) -> Float[Array, "b t n g p"]:
    return jnp.exp(step[:, :, None] * x.A)


def _recurrence(
    decay: Float[Array, "b t n g p"],
    drive: Float[Array, "b t n g p"],
    state: Float[Array, "b n g p"],
    *,
    reverse: bool,
) -> Float[Array, "b t n g p"]:
    """Every state of h_t = decay_t h_{t-1} + drive_t, from the state before the first step."""
    return by_platform(
        decay,
        drive,
        state,
        cpu=partial(recurrence_by_step, reverse=reverse),
        default=partial(recurrence_by_prefix, reverse=reverse),
    )


def recurrence_by_step(
    decay: Float[Array, "b t n g p"],
    drive: Float[Array, "b t n g p"],
    state: Float[Array, "b n g p"],
    *,
    reverse: bool,
) -> Float[Array, "b t n g p"]:
    """The recurrence as a loop that turns the drives into the states in place."""
    steps = decay.shape[1]
    take = partial(lax.dynamic_index_in_dim, axis=1, keepdims=False, allow_negative_indices=False)

    def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        state, rows = carry
        t = steps - 1 - i if reverse else i
        state = take(decay, t) * state + take(rows, t)
        rows = lax.dynamic_update_index_in_dim(rows, state, t, 1, allow_negative_indices=False)
        return state, rows

    return lax.fori_loop(0, steps, body, (state, drive))[1]


@partial(jax.jit, static_argnames="reverse")
def recurrence_by_prefix(
    decay: Float[Array, "b t n g p"],
    drive: Float[Array, "b t n g p"],
    state: Float[Array, "b n g p"],
    *,
    reverse: bool,
) -> Float[Array, "b t n g p"]:
    """The recurrence as a parallel prefix, for machines with many cores."""
    decays, states = lax.associative_scan(compose, (decay, drive), reverse=reverse, axis=1)
    return decays * state[:, None] + states


def _previous(
    states: Float[Array, "b t n g p"], start: Float[Array, "b n g p"], *, reverse: bool
) -> Float[Array, "b t n g p"]:
    """The state before each step: the states one step later in scan order, `start` first."""
    start = start[:, None]
    parts = (states[:, 1:], start) if reverse else (start, states[:, :-1])
    return jnp.concatenate(parts, axis=1)


def _last(states: Float[Array, "b t n g p"], *, reverse: bool) -> Float[Array, "b n g p"]:
    return states[:, 0] if reverse else states[:, -1]


def _sum_channels(x: Float[Array, "b t n g p"]) -> Float[Array, "b t n g"]:
    return by_platform(x, cpu=sum_channels, default=partial(jnp.sum, axis=-1))
