"""One sequence over several devices: the length is split over a mesh axis, inside `shard_map`.

    on each device   the last state from a zero state, and exp(A sum of steps), the decay across
                     the device's part: together the map from the state before to the state after
    all devices      exchange these pairs, (b, d, n) twice, whatever the length
    on each device   composes the maps of the parts before its own; from the state that gives, the
                     scan proper

The implementation is called twice and needs to know nothing of it. The gradient is that of the
parts, transposed: its exchange is as small, and devices keep what two scans of their own part keep.
"""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .base import Scan, compose, state_dtype, step_size


def sequence_sharded_scan(
    scan: Scan,
    axis_name: str,
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
    """Runs `scan` on a device's part of sequences whose length is split over `axis_name`.

    Args:
      scan: any implementation.
      axis_name: a mesh axis of the surrounding `shard_map`; parts lie along it in order of time.
      u: this device's part; delta, B and C likewise.
      delta: see u.
      A: the same on all devices, like D and delta_bias.
      B: see u.
      C: see u.
      D: see A.
      delta_bias: see A.
      initial_state: state before the whole sequence, the same on all devices.
      delta_softplus: as in `selective_scan`.
      reverse: as in `selective_scan`.

    Returns:
      y of this device's part, and the state after the whole sequence, the same on all devices.
    """
    dtype = state_dtype(u, delta, A, B, C, D, delta_bias, initial_state)
    run = partial(scan, u, delta, A, B, C, delta_softplus=delta_softplus, reverse=reverse)
    _, last = run(None, delta_bias, None)
    step = step_size(delta, delta_bias, delta_softplus=delta_softplus, dtype=dtype)
    decay = jnp.exp(jnp.sum(step, axis=1)[..., None] * A.astype(dtype))

    start = jnp.zeros_like(last) if initial_state is None else initial_state.astype(dtype)
    before, after = _exchange(axis_name, decay, last, start, reverse=reverse)
    y, _ = run(D, delta_bias, before)
    return y, after


def _exchange(
    axis_name: str,
    decay: Float[Array, "b d n"],
    drive: Float[Array, "b d n"],
    start: Float[Array, "b d n"],
    *,
    reverse: bool,
) -> tuple[Float[Array, "b d n"], Float[Array, "b d n"]]:
    """The state before this device's part, and the state after all parts.

    Args:
      axis_name: axis that the parts lie along.
      decay: of this device's map from the state before its part to the state after it.
      drive: of that map.
      start: state before all parts.
      reverse: the last part comes first.
    """
    maps = lax.all_gather((decay, drive), axis_name)
    decays, drives = lax.associative_scan(compose, maps, reverse=reverse)
    states = decays * start + drives  # after each part
    here, parts = lax.axis_index(axis_name), lax.axis_size(axis_name)
    earlier = here + 1 if reverse else here - 1
    is_first = here == (parts - 1 if reverse else 0)
    before = jnp.where(is_first, start, states[jnp.clip(earlier, 0, parts - 1)])
    # Every device has it; the sum lets `shard_map` know that it is the same on all.
    own = jnp.where(is_first, states[0 if reverse else -1], jnp.zeros_like(start))
    return before, lax.psum(own, axis_name)
