"""Convolution, norm and resizing as ZZHNet's difference blocks, fusion and decoder use them."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from zzhnet_jax.models.vssm.layers import make_conv, make_norm
from zzhnet_jax.models.zzhnet.config import DecoderNorm

_GROUPS = 8
_CHANNELS_OF_A_GROUP = 4  # at least: one channel of a single pixel would be normalised to nothing


def norm_layer(kind: DecoderNorm, d: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
    """The norm named `kind` over `d` channels.

    "layer" is per pixel, "batch" per channel over the batch, "group" per sample over the pixels and
    groups of four channels or more: eight groups, or as many as divide the channels so.
    """
    if kind == "group":
        most = min(_GROUPS, max(d // _CHANNELS_OF_A_GROUP, 1))
        groups = next(g for g in range(most, 0, -1) if d % g == 0)
        return nnx.GroupNorm(d, groups, epsilon=1e-5, dtype=dtype, rngs=rngs)
    return make_norm(kind, d, dtype=dtype, rngs=rngs)


def resize(x: Float[Array, "b h w c"], height: int, width: int) -> Float[Array, "b height width c"]:
    """Bilinear interpolation between pixel centres."""
    shape = (x.shape[0], height, width, x.shape[-1])
    return jax.image.resize(x, shape, method="bilinear", antialias=False)


class ConvNorm(nnx.Module):
    """Convolution without bias, then norm, then ReLU unless `activate` is False."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        activate: bool = True,
        norm: DecoderNorm,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.conv = make_conv(
            d_in,
            d_out,
            kernel,
            stride=stride,
            padding=kernel // 2,
            use_bias=False,
            init=nnx.initializers.he_normal(),
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = norm_layer(norm, d_out, dtype=dtype, rngs=rngs)
        self.activate = activate

    def __call__(self, x: Float[Array, "b h w d_in"]) -> Float[Array, "b h2 w2 d_out"]:
        """Applies the layer; h2 and w2 are h and w over the stride."""
        x = self.norm(self.conv(x))
        return jax.nn.relu(x) if self.activate else x


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions with norms around an identity (He et al. 2016, the basic block)."""

    def __init__(self, d: int, *, norm: DecoderNorm, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.first = ConvNorm(d, d, norm=norm, dtype=dtype, rngs=rngs)
        self.second = ConvNorm(d, d, activate=False, norm=norm, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        """Applies the block."""
        return jax.nn.relu(x + self.second(self.first(x)))


class SubPixelUpsample(nnx.Module):
    """Doubles height and width: a linear map to four values a pixel, moved into a finer grid.

    The four start alike, so that the layer begins as nearest-neighbour enlargement and the grid
    does not show in what it learns (Aitken et al. 2017, "ICNR").
    """

    def __init__(self, d_in: int, d_out: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        draw = nnx.initializers.lecun_normal()

        def alike(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
            return jnp.tile(draw(key, (shape[0], shape[1] // 4), dtype), (1, 4))

        self.linear = nnx.Linear(d_in, 4 * d_out, kernel_init=alike, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w d_in"]) -> Float[Array, "b 2h 2w d_out"]:
        """Applies the layer."""
        return depth_to_space(self.linear(x))


def depth_to_space(x: Float[Array, "b h w c"], factor: int = 2) -> Float[Array, "b h2 w2 c2"]:
    """Moves channels into a `factor` times finer grid: c2 = c / factor^2 (sub-pixel upsampling)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, factor, factor, c // factor**2)
    x = jnp.transpose(x, (0, 1, 3, 2, 4, 5))
    return x.reshape(b, h * factor, w * factor, c // factor**2)
