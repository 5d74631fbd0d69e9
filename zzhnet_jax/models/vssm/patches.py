"""From an image to tokens, and from a stage's tokens to the next one's: patch layers."""

from functools import partial
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from zzhnet_jax.models.vssm.config import NormKind
from zzhnet_jax.models.vssm.layers import ACTIVATIONS, make_conv, make_linear, make_norm


class PatchEmbed(nnx.Module):
    """Image to tokens, one for `patch_size` x `patch_size` pixels.

    Args:
      in_chans: bands.
      d_model: width of a token.
      version: 1 is one convolution with stride `patch_size`; 2 is two 3x3 convolutions of stride 2
        (for patch_size 4; in general of stride patch_size / 2 and side stride + 1) to d_model / 2
        and d_model, with norm and exact GELU between.
      patch_size: side of a patch.
      norm: kind of the norms; None leaves them out.
      dtype: compute type.
      rngs: source of the initial weights.
    """

    def __init__(
        self,
        in_chans: int,
        d_model: int,
        *,
        version: Literal[1, 2] = 2,
        patch_size: int = 4,
        norm: NormKind | None = "layer",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        conv = partial(make_conv, dtype=dtype, rngs=rngs)
        if version == 1:
            widths: list[int] = [d_model]
            self.convs = nnx.List([conv(in_chans, d_model, patch_size, stride=patch_size)])
        else:
            stride = patch_size // 2
            widths = [d_model // 2, d_model]
            half = partial(conv, kernel_size=stride + 1, stride=stride, padding=1)
            self.convs = nnx.List([half(in_chans, widths[0]), half(*widths)])
        self.norms = nnx.List(
            [] if norm is None else [make_norm(norm, o, dtype=dtype, rngs=rngs) for o in widths]
        )

    def __call__(self, x: Float[Array, "b h w in_chans"]) -> Float[Array, "b h2 w2 d_model"]:
        """Applies the layer: h and w shrink by patch_size (version 1 rounds down, 2 up)."""
        return self.maps(x)[-1]

    def maps(self, x: Float[Array, "b h w in_chans"]) -> list[Float[Array, "b _ _ _"]]:
        """What each convolution gives after its norm; the last is the layer's output."""
        maps: list[Array] = []
        for i, conv in enumerate(self.convs):
            x = conv(ACTIVATIONS["gelu"](x) if i else x)
            x = self.norms[i](x) if self.norms else x
            maps.append(x)
        return maps


class PatchMerging(nnx.Module):
    """Downsampling version 1: the four pixels of a 2x2 patch side by side, norm, linear.

    Odd sizes are padded with zeros at the end.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        norm: NormKind = "layer",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.norm = make_norm(norm, 4 * d_in, dtype=dtype, rngs=rngs)
        self.reduction = make_linear(4 * d_in, d_out, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w d_in"]) -> Float[Array, "b h2 w2 d_out"]:
        """Applies the layer; h2 and w2 are h / 2 and w / 2 rounded up."""
        x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
        corners = [x[:, i::2, j::2] for j in range(2) for i in range(2)]
        return self.reduction(self.norm(jnp.concatenate(corners, axis=-1)))


class ConvDownsample(nnx.Module):
    """Downsampling by a convolution of stride 2, then norm.

    Version 2 is 2x2 without padding (an odd last row is dropped), version 3 is 3x3 with padding 1.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        version: Literal[2, 3] = 3,
        norm: NormKind = "layer",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.conv = make_conv(
            d_in, d_out, version, stride=2, padding=version - 2, dtype=dtype, rngs=rngs
        )
        self.norm = make_norm(norm, d_out, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w d_in"]) -> Float[Array, "b h2 w2 d_out"]:
        """Applies the layer."""
        return self.norm(self.conv(x))


def Downsample(
    d_in: int,
    d_out: int,
    *,
    version: Literal[1, 2, 3] = 3,
    norm: NormKind = "layer",
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> PatchMerging | ConvDownsample:
    """The layer of that version: PatchMerging (1) or ConvDownsample (2, 3)."""
    if version == 1:
        return PatchMerging(d_in, d_out, norm=norm, dtype=dtype, rngs=rngs)
    return ConvDownsample(d_in, d_out, version=version, norm=norm, dtype=dtype, rngs=rngs)
