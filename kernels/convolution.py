"""Convolution with a gradient that is fast on CPUs, in loops too.

XLA's CPU backend computes a convolution by Eigen only if its axes are in one certain order, and
puts them into that order only outside of loops. The gradients that JAX derives are not in it:
inside a loop, such as the one over the parts of a batch, they are compiled naively and take up to
40 times as long.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .matmul import matmul
from .platforms import by_platform

_AXES = ("NHWC", "HWIO", "NHWC")


def convolution(
    x: Float[Array, "b h w i"], kernel: Float[Array, "k k i o"], *, stride: int, padding: int
) -> Float[Array, "b h2 w2 o"]:
    """Convolves with a square kernel; h2 is (h + 2 padding - k) // stride + 1, w2 likewise.

    Args:
      x: images.
      kernel: weights, in x's dtype.
      stride: of both axes.
      padding: zeros on each of the four sides.

    Returns:
      Images in x's dtype.
    """
    if kernel.shape[:2] == (1, 1) and stride == 1 and padding == 0:
        return matmul(x, kernel[0, 0])  # on a CPU its gradients take a fifth of a convolution's
    return _convolution(x, kernel, stride, padding)


def _convolve(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    pads = ((padding, padding), (padding, padding))
    return lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=_AXES)


_convolution = jax.custom_vjp(_convolve, nondiff_argnums=(2, 3))


def _forward(
    x: Array, kernel: Array, stride: int, padding: int
) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(x, kernel, stride, padding), (x, kernel)


def _backward(
    stride: int, padding: int, saved: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    how: Any = dict(stride=stride, padding=padding)
    return by_platform(
        *saved, cotangent, cpu=partial(_in_order, **how), default=partial(_derived, **how)
    )


_convolution.defvjp(_forward, _backward)


def _derived(
    x: Array, kernel: Array, cotangent: Array, *, stride: int, padding: int
) -> tuple[Array, Array]:
    """JAX's own gradients, which the backends of accelerators know as such."""
    convolve = partial(_convolve, stride=stride, padding=padding)
    return jax.vjp(convolve, x, kernel)[1](cotangent)


def _in_order(
    x: Array, kernel: Array, cotangent: Array, *, stride: int, padding: int
) -> tuple[Array, Array]:
    """The same in the order that Eigen takes, which XLA itself gives them outside of loops.

    Of x: the cotangent, its pixels `stride` apart, with the kernel turned round. Of the kernel: x
    with the cotangent as a kernel of that size, images as channels.
    """
    k = kernel.shape[0]
    # What the strides of the forward convolution covered of each axis.
    spans = [stride * (side - 1) + 1 for side in cotangent.shape[1:3]]
    sides = list(zip(x.shape[1:3], spans, strict=True))
    of_x = lax.conv_general_dilated(
        cotangent,
        jnp.swapaxes(kernel[::-1, ::-1], 2, 3),
        (1, 1),
        [(k - 1 - padding, side + padding - span) for side, span in sides],
        lhs_dilation=(stride, stride),
        dimension_numbers=_AXES,
    )
    of_kernel = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        cotangent.transpose(1, 2, 0, 3),
        (1, 1),
        [(padding, span + k - 1 - side - padding) for side, span in sides],
        rhs_dilation=(stride, stride),
        dimension_numbers=_AXES,
    )
    return of_x, of_kernel.transpose(1, 2, 0, 3)
