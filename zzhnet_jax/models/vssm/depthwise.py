"""Depthwise convolution, by whichever formulation is fast on the platform.

XLA's CPU backend runs a grouped convolution some 60 times slower than the k * k shifted
multiply-adds that it consists of (52 ms against 0.8 ms for 2 x 64 x 64 x 192 and k = 3, two cores),
so the CPU gets those; other backends have a tuned kernel.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from zzhnet_jax.kernels.platforms import by_platform
from zzhnet_jax.models.vssm.initializers import torch_uniform


@jax.custom_vjp
def depthwise_conv(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k c"]
) -> Float[Array, "b h w c"]:
    """Convolves every channel with its own k x k kernel (odd k), zero padding, stride 1."""
    return by_platform(x, kernel, cpu=_shifted, default=_grouped)


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return depthwise_conv(x, kernel), (x, kernel)


def _backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    return by_platform(*saved, cotangent, cpu=_shifted_vjp, default=_grouped_vjp)


depthwise_conv.defvjp(_forward, _backward)


def _grouped(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None, :],
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def _grouped_vjp(x: Array, kernel: Array, cotangent: Array) -> tuple[Array, Array]:
    return jax.vjp(_grouped, x, kernel)[1](cotangent)


def _shifts(x: Array, k: int) -> list[Array]:
    """The k * k zero-padded translates of x, in the order of a kernel's taps."""
    height, width = x.shape[1:3]
    p = k // 2
    padded = jnp.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
    return [padded[:, i : i + height, j : j + width] for i in range(k) for j in range(k)]


def _shifted(x: Array, kernel: Array) -> Array:
    k = kernel.shape[0]
    taps = kernel.reshape(k * k, -1)
    return sum(shift * tap for shift, tap in zip(_shifts(x, k), taps, strict=True))


def _shifted_vjp(x: Array, kernel: Array, cotangent: Array) -> tuple[Array, Array]:
    """Of x, the same convolution with the kernel turned round; of a tap, a sum over pixels.

    All taps are summed in one variadic reduction, so that x is read once instead of once a tap;
    first along the rows, which stay in cache (23 ms down to 5 ms for the shape above).
    """
    k = kernel.shape[0]
    wide = cotangent.astype(jnp.float32)
    products = tuple(shift.astype(jnp.float32) * wide for shift in _shifts(x, k))
    zeros = (jnp.float32(0),) * len(products)
    rows = lax.reduce(products, zeros, lambda a, b: tuple(map(jnp.add, a, b)), (2,))
    taps = jnp.stack([jnp.sum(row, (0, 1)) for row in lax.optimization_barrier(rows)])
    return _shifted(cotangent, kernel[::-1, ::-1]), taps.reshape(kernel.shape).astype(kernel.dtype)


class DepthwiseConv(nnx.Module):
    """A k x k depthwise convolution layer with zero padding and stride 1.

    Args:
      d: channels.
      kernel_size: odd k.
      use_bias: adds a bias.
      dtype: compute type.
      rngs: source of the initial weights.
    """

    def __init__(
        self,
        d: int,
        kernel_size: int = 3,
        *,
        use_bias: bool = True,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        init = torch_uniform(fan_in=kernel_size * kernel_size)
        self.kernel = nnx.Param(init(rngs.params(), (kernel_size, kernel_size, d), jnp.float32))
        self.bias = nnx.Param(init(rngs.params(), (d,), jnp.float32)) if use_bias else None
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Applies the layer."""
        y = depthwise_conv(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)
