"""Attentional feature fusion: per pixel and channel, how much of each of two features to take."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from zzhnet_jax.models.zzhnet.config import DecoderNorm
from zzhnet_jax.models.zzhnet.layers import ConvNorm

_REDUCTION = 4


class _ChannelAttention(nnx.Module):
    """A bottleneck of two pointwise convolutions with norms."""

    def __init__(self, d: int, *, norm: DecoderNorm, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        inner = max(d // _REDUCTION, 4)
        kwargs: dict[str, Any] = dict(kernel=1, norm=norm, dtype=dtype, rngs=rngs)
        self.reduce = ConvNorm(d, inner, **kwargs)
        self.expand = ConvNorm(inner, d, activate=False, **kwargs)

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        return self.expand(self.reduce(x))


class AFF(nnx.Module):
    """Attentional feature fusion (Dai et al. 2021, equation 3).

    With s = x + y and m = sigmoid(local(s) + global(mean of s)), the output is m x + (1 - m) y.
    """

    def __init__(self, d: int, *, norm: DecoderNorm, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.local_attention = _ChannelAttention(d, norm=norm, dtype=dtype, rngs=rngs)
        self.global_attention = _ChannelAttention(d, norm=norm, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w d"], y: Float[Array, "b h w d"]
    ) -> Float[Array, "b h w d"]:
        """Mixes x and y."""
        total = x + y
        context = jnp.mean(total, axis=(1, 2), keepdims=True)
        mix = jax.nn.sigmoid(self.local_attention(total) + self.global_attention(context))
        return mix * x + (1 - mix) * y
