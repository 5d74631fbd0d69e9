"""Sequential scan, one `lax.scan` step a time step: the oracle for every other implementation.

It spells the recurrence out and takes no short cut; given float64 it computes in float64. Its
gradient keeps every state.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .base import state_dtype, step_size, zeros


def sequential_scan(
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
) -> tuple[Float[Array, "b l d"], Float[Array, "b d n"]]:
    """The scan by its definition; see `selective_scan` for the arguments."""
    dtype = state_dtype(u, delta, A, B, C, D, delta_bias, initial_state)
    if initial_state is None:
        initial_state = zeros((u.shape[0], *A.shape), dtype, like=u)

    def step(
        state: Float[Array, "b d n"], now: tuple[Array, Array, Array, Array]
    ) -> tuple[Float[Array, "b d n"], Float[Array, "b d"]]:
        u_t, delta_t, B_t, C_t = now
        return recurrence(
            state, u_t, delta_t, A, B_t, C_t, D, delta_bias, delta_softplus=delta_softplus
        )

    u, delta, B, C = (jnp.moveaxis(x, 1, 0) for x in (u, delta, B, C))
    state, y = jax.lax.scan(step, initial_state.astype(dtype), (u, delta, B, C), reverse=reverse)
    return jnp.moveaxis(y, 0, 1), state


def recurrence(
    state: Float[Array, "b d n"],
    u_t: Float[Array, "b d"],
    delta_t: Float[Array, "b d"],
    A: Float[Array, "d n"],
    B_t: Float[Array, "b g n"],
    C_t: Float[Array, "b g n"],
    D: Float[Array, "d"] | None,
    delta_bias: Float[Array, "d"] | None,
    *,
    delta_softplus: bool,
) -> tuple[Float[Array, "b d n"], Float[Array, "b d"]]:
    """One time step, in the state's dtype: h exp(delta A) + delta B u, and y = C . h + D u."""
    dtype = state.dtype
    channels_of_group = u_t.shape[1] // B_t.shape[1]

    def per_channel(x: Float[Array, "b g n"]) -> Float[Array, "b d n"]:
        return jnp.repeat(x.astype(dtype), channels_of_group, axis=1)

    u_t = u_t.astype(dtype)
    step = step_size(delta_t, delta_bias, delta_softplus=delta_softplus, dtype=dtype)
    decay = jnp.exp(step[..., None] * A.astype(dtype))
    state = decay * state + (step * u_t)[..., None] * per_channel(B_t)
    y = jnp.sum(state * per_channel(C_t), axis=-1)
    if D is not None:
        y = y + D.astype(dtype) * u_t
    return state, y
