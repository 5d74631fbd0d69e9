"""What both ways of computing one chunk of a scan share: its operands, step sizes and sums.

Sums are written as folded additions: XLA's CPU backend hands plain reductions of such arrays to
library calls that take several times as long.
"""

from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from . import base

# A sum over channels is folded down to so many, few vector registers; the rest is added up one
# after the other.
_NARROW = 24

# log(1 + e) = e P(e) / Q(e) for e in [0, 1], within 2e-8 of it: a minimax fit, lowest power last.
_LOG_P = (0.12376428, 0.86719344, 0.99999998)
_LOG_Q = (0.03109454, 0.47405883, 1.36719149, 1.0)


class Options(NamedTuple):
    """What is fixed at trace time."""

    chunk: int
    delta_softplus: bool
    reverse: bool


class Operands(NamedTuple):
    """The arrays of a scan, or of one chunk of it.

    In a chunk everything is in the dtype of the arithmetic, and the channels of u and delta are
    split in groups. In the whole scan u and delta are as they were given: XLA would copy them if
    they had a group axis of size 1.
    """

    u: Float[Array, "b l d"] | Float[Array, "b t g p"]
    delta: Float[Array, "b l d"] | Float[Array, "b t g p"]
    A: Float[Array, "n g p"]
    B: Float[Array, "b l n g"]
    C: Float[Array, "b l n g"]
    D: Float[Array, "g p"] | None
    delta_bias: Float[Array, "g p"] | None


def step_size(x: Operands, options: Options) -> Float[Array, "b t g p"]:
    """The step sizes of a chunk."""
    raw = _raw_step(x)
    return softplus(raw) if options.delta_softplus else raw


def step_size_gradient(
    x: Operands, of_step: Float[Array, "b t g p"], options: Options
) -> Float[Array, "b t g p"]:
    """The gradient of delta, and of its bias at each step, from that of the step sizes."""
    return of_step * jax.nn.sigmoid(_raw_step(x)) if options.delta_softplus else of_step


def _raw_step(x: Operands) -> Float[Array, "b t g p"]:
    return x.delta if x.delta_bias is None else x.delta + x.delta_bias


def softplus(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """log(1 + exp(x)); in float32 three times as fast on CPUs as with log1p, as exact.

    It ends in a division, which XLA takes for dear enough not to repeat it for every state.
    """
    if x.dtype != jnp.float32:
        return base.softplus(x)
    e = jnp.exp(-jnp.abs(x))
    p, q = (reduce(lambda value, c: value * e + c, powers) for powers in (_LOG_P, _LOG_Q))
    return (jnp.maximum(x, 0) * q + e * p) / q


def fold_sum(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """Sum over an axis, by folding it in half until one is left."""
    size = x.shape[axis]
    if size == 1:
        return lax.squeeze(x, (axis,))
    half = size // 2
    low, high = (lax.slice_in_dim(x, k * half, (k + 1) * half, axis=axis) for k in (0, 1))
    total = fold_sum(low + high, axis)
    return total + lax.index_in_dim(x, size - 1, axis, keepdims=False) if size % 2 else total


def sum_channels(x: Float[Array, "... p"]) -> Float[Array, "..."]:
    """Sum over the channels of each group."""
    while x.shape[-1] > _NARROW and x.shape[-1] % 2 == 0:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return jnp.sum(x, axis=-1)


def sum_steps(x: Float[Array, "b t ..."]) -> Float[Array, "..."]:
    """Sum over batch and steps, as a product with ones."""
    rows = x.shape[0] * x.shape[1]
    ones = jnp.ones(rows, x.dtype)
    total = jnp.dot(ones, x.reshape(rows, -1), precision=lax.Precision.HIGHEST)
    return total.reshape(x.shape[2:])
