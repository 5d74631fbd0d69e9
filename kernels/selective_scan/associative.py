"""Parallel scan over the whole length with `lax.associative_scan`.

Every decay and every state, (b, l, d, n) each, is held at once, and several times over for the
gradient. This is the plain form that other implementations are measured against.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .base import compose, state_dtype, step_size


def associative_scan(
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
    """The scan as a parallel prefix; see `selective_scan` for the arguments."""
    (b, _, d), n, groups = u.shape, A.shape[1], B.shape[2]
    dtype = state_dtype(u, delta, A, B, C, D, delta_bias, initial_state)
    first, last = (-1, 0) if reverse else (0, -1)
    u, B, C = (x.astype(dtype) for x in (u, B, C))
    step = step_size(delta, delta_bias, delta_softplus=delta_softplus, dtype=dtype)

    def grouped(x: Float[Array, "... d"]) -> Float[Array, "... g p"]:
        return x.reshape(*x.shape[:-1], groups, -1)

    decay = jnp.exp(grouped(step)[..., None] * A.astype(dtype).reshape(groups, -1, n))
    drive = grouped(step * u)[..., None] * B[:, :, :, None, :]
    if initial_state is not None:
        carried = decay[:, first] * initial_state.astype(dtype).reshape(b, groups, -1, n)
        drive = drive.at[:, first].add(carried)
    _, states = jax.lax.associative_scan(compose, (decay, drive), reverse=reverse, axis=1)
    y = jnp.einsum("blgpn,blgn->blgp", states, C, precision=jax.lax.Precision.HIGHEST)
    y = y.reshape(u.shape)
    if D is not None:
        y = y + D.astype(dtype) * u
    return y, states[:, last].reshape(b, d, n)
