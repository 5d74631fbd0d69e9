"""One chunk of a scan step by step, as a CPU likes it: the state stays in the first-level cache.

    a step    u, step, B, C of it      rows, read where they lie
              h = exp(step A) h + ...  one fused loop over contiguous channels, (b, n, g, p)
              y = C . h                another, written where it belongs

Only the state goes from one step to the next. Doing more steps at once would write decays and
drives to memory and read them again, which takes longer than the arithmetic.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .base import zeros
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

    def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        state, y = carry
        t = _position(i, options.chunk, reverse=options.reverse)
        state = _next_state(x, step, state, t)
        return state, _put(y, fold_sum(state * _row(x.C, t)[..., None], 1), t)

    y = zeros(x.u.shape, x.u.dtype, like=state)
    state, y = lax.fori_loop(0, options.chunk, body, (state, y))
    return y, state


@partial(jax.jit, static_argnames="options")
def gradient(
    x: Operands,
    start: Float[Array, "b n g p"],
    y_gradient: Float[Array, "b t g p"],
    carried: Float[Array, "b n g p"],
    options: Options,
) -> tuple[Float[Array, "b n g p"], Operands]:
    """See `chunked_wide.gradient`, whose names these are."""
    step = step_size(x, options)
    driven = step * x.u
    before, of_C = _states(x, step, start, y_gradient, options)

    def body(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        passed_on, of_driven, of_decay, of_A, of_B = carry
        t = _position(i, options.chunk, reverse=not options.reverse)
        step_t = _row(step, t)[:, None]
        reaching = passed_on + _row(x.C, t)[..., None] * _row(y_gradient, t)[:, None]
        passed_on = jnp.exp(step_t * x.A) * reaching
        of_exponent = passed_on * _row(before, t)
        of_driven = _put(of_driven, fold_sum(reaching * _row(x.B, t)[..., None], 1), t)
        of_decay = _put(of_decay, fold_sum(of_exponent * x.A, 1), t)
        of_A = of_A + fold_sum(of_exponent * step_t, 0)
        of_B = _put(of_B, sum_channels(reaching * _row(driven, t)[:, None]), t)
        return passed_on, of_driven, of_decay, of_A, of_B

    empty = (zeros(a.shape, a.dtype, like=carried) for a in (step, step, x.A, x.B))
    passed_on, of_driven, of_decay, of_A, of_B = lax.fori_loop(
        0, options.chunk, body, (carried, *empty)
    )
    of_delta = step_size_gradient(x, x.u * of_driven + of_decay, options)
    of_u = step * of_driven
    return passed_on, Operands(
        u=of_u if x.D is None else of_u + x.D * y_gradient,
        delta=of_delta,
        A=of_A,
        B=of_B,
        C=of_C,
        D=None if x.D is None else sum_steps(x.u * y_gradient),
        delta_bias=None if x.delta_bias is None else sum_steps(of_delta),
    )


def _states(
    x: Operands,
    step: Float[Array, "b t g p"],
    start: Float[Array, "b n g p"],
    y_gradient: Float[Array, "b t g p"],
    options: Options,
) -> tuple[Float[Array, "b t n g p"], Float[Array, "b t n g"]]:
    """The state before each step, and the gradient of C."""

    def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        state, before, of_C = carry
        t = _position(i, options.chunk, reverse=options.reverse)
        before = _put(before, state, t)
        state = _next_state(x, step, state, t)
        return state, before, _put(of_C, sum_channels(state * _row(y_gradient, t)[:, None]), t)

    before = zeros((*step.shape[:2], *x.A.shape), step.dtype, like=start)
    of_C = zeros(x.C.shape, x.C.dtype, like=start)
    _, before, of_C = lax.fori_loop(0, options.chunk, body, (start, before, of_C))
    return before, of_C


def _next_state(
    x: Operands, step: Float[Array, "b t g p"], state: Float[Array, "b n g p"], t: Array
) -> Float[Array, "b n g p"]:
    step_t = _row(step, t)
    drive = (step_t * _row(x.u, t))[:, None] * _row(x.B, t)[..., None]
    return jnp.exp(step_t[:, None] * x.A) * state + drive


def _position(i: Array, steps: int, *, reverse: bool) -> Array:
    return steps - 1 - i if reverse else i


def _row(x: Float[Array, "b t ..."], t: Array) -> Float[Array, "b ..."]:
    return lax.dynamic_index_in_dim(x, t, 1, keepdims=False, allow_negative_indices=False)


def _put(x: Float[Array, "b t ..."], row: Float[Array, "b ..."], t: Array) -> Array:
    return lax.dynamic_update_index_in_dim(x, row, t, 1, allow_negative_indices=False)
