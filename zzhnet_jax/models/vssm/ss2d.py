"""SS2D: a scan along four routes through the image, and what surrounds it."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from zzhnet_jax.models.placement import constrain
from zzhnet_jax.models.vssm.config import OutputNorm as OutputNormKind
from zzhnet_jax.models.vssm.config import SS2DConfig
from zzhnet_jax.models.vssm.depthwise import DepthwiseConv
from zzhnet_jax.models.vssm.initializers import LinearInit
from zzhnet_jax.models.vssm.layers import ACTIVATIONS, Dropout, make_linear, make_norm
from zzhnet_jax.models.vssm.scans import SelectiveScan
from zzhnet_jax.models.vssm.ssd import HeadScan


class OutputNorm(nnx.Module):
    """What is applied to the merged scan, chosen by `SS2DConfig.output_norm`."""

    def __init__(
        self, kind: OutputNormKind, d: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        self.kind = kind
        normed, convolved = kind in ("layer", "layer_dwconv3"), kind in ("dwconv3", "layer_dwconv3")
        self.norm = make_norm("layer", d, dtype=dtype, rngs=rngs) if normed else None
        self.conv = (
            DepthwiseConv(d, 3, use_bias=False, dtype=dtype, rngs=rngs) if convolved else None
        )

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        """Applies it."""
        if self.kind == "softmax":
            return jax.nn.softmax(x.astype(jnp.float32), axis=(1, 2)).astype(x.dtype)
        if self.kind == "sigmoid":
            return jax.nn.sigmoid(x)
        x = x if self.norm is None else self.norm(x)
        return x if self.conv is None else self.conv(x)


class SS2D(nnx.Module):
    """The operators "selective" (VMamba's v0 .. v05) and "ssd" (its m0).

    in_proj -> [x, z] -> depthwise convolution -> act -> scan -> output norm -> output activation ->
    * gate(z) -> out_proj -> dropout.

    Args:
      d_model: width in and out.
      config: its fields.
      linear_init: initial values of the projections.
      dtype: compute type; the scan is float32 in any case.
      rngs: source of the initial weights.
    """

    def __init__(
        self,
        d_model: int,
        config: SS2DConfig,
        *,
        linear_init: LinearInit = "truncated_normal",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        d = config.d_inner(d_model)
        linear = partial(
            make_linear, use_bias=config.projection_bias, init=linear_init, dtype=dtype, rngs=rngs
        )
        self.in_proj = linear(d_model, d if config.gate == "none" else 2 * d)
        self.conv = (
            DepthwiseConv(d, config.d_conv, use_bias=config.conv_bias, dtype=dtype, rngs=rngs)
            if config.d_conv > 1
            else None
        )
        scan = HeadScan if config.operator == "ssd" else SelectiveScan
        self.scan = scan(d, config.rank(d_model), config, rngs=rngs)
        self.out_norm = OutputNorm(config.output_norm, d, dtype=dtype, rngs=rngs)
        self.out_proj = linear(d, d_model)
        self.dropout = Dropout(config.dropout)
        self.config = config

    def __call__(
        self, x: Float[Array, "b h w d_model"], *, key: jax.Array | None = None
    ) -> Float[Array, "b h w d_model"]:
        """Applies the operator."""
        act = ACTIVATIONS[self.config.activation]
        x = self.in_proj(x)
        z = None
        if self.config.gate != "none":
            x, z = jnp.split(x, 2, axis=-1)
            z = constrain(z, "batch rows columns inner")
        x = constrain(x, "batch rows columns inner")
        x = x if self.conv is None else self.conv(x)
        y = self.out_norm(self.scan(act(x)))
        if self.config.output_activation == "gelu":
            y = ACTIVATIONS["gelu"](y)
        if z is not None:
            y = y * (act(z) if self.config.gate == "activated" else z)
        return self.dropout(self.out_proj(y), key=key)
