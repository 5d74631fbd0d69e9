"""The fused two-dimensional scan as a differentiable function, and where it can be used."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .frame import Frame, arrange, join_routes
from .fused_tpu import forward
from .fused_tpu_vjp import backward


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused_scan(frame: Frame, *arrays: Any) -> Float[Array, "b h w d"]:
    """The scan of an image along four routes, summed; see `selective_scan_2d`.

    Args:
      frame: sizes and options.
      arrays: u, delta, A, B, C, D and delta_bias; the last two may be None.
    """
    (y,) = forward(frame, arrange(frame, *arrays), keep_starts=False)
    return y.reshape(arrays[0].shape)


def _fused_forward(frame: Frame, *arrays: Any) -> tuple[Array, tuple[Any, ...]]:
    y, starts = forward(frame, arrange(frame, *arrays), keep_starts=True)
    return y.reshape(arrays[0].shape), (arrays, starts)


def _fused_backward(frame: Frame, residuals: tuple[Any, ...], y_gradient: Array) -> tuple[Any, ...]:
    arrays, starts = residuals
    inputs = arrange(frame, *arrays)
    gradients = backward(frame, inputs, starts, y_gradient.reshape(inputs.u.shape))
    n = frame.states
    image = (frame.batch, frame.height, frame.width)
    weights = jnp.sum(gradients.weights, 0)
    matrices = gradients.matrices.reshape(*image, 4, 2 * n)
    direct = jnp.broadcast_to(jnp.sum(gradients.direct, 0), (4, frame.channels))
    given = (
        gradients.u.reshape(*image, -1),
        join_routes(frame, gradients.delta),
        weights[:, :n].swapaxes(1, 2),
        matrices[..., :n],
        matrices[..., n:],
        direct,
        weights[:, n],
    )
    return tuple(
        None if array is None else x.astype(array.dtype)
        for x, array in zip(given, arrays, strict=True)
    )


fused_scan.defvjp(_fused_forward, _fused_backward)
