"""The xv variants of SS2D: one projection gives the scan's input and all of its parameters."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from zzhnet_jax.kernels.cross_scan import selective_scan_2d
from zzhnet_jax.models.vssm.config import SS2DConfig
from zzhnet_jax.models.vssm.depthwise import DepthwiseConv
from zzhnet_jax.models.vssm.initializers import LinearInit
from zzhnet_jax.models.vssm.layers import ACTIVATIONS, Dropout, make_linear
from zzhnet_jax.models.vssm.scans import (
    ROUTES,
    initial_A_log,
    initial_dt_bias,
    initial_dt_proj,
    scan_image,
)
from zzhnet_jax.models.vssm.ss2d import OutputNorm


class GivenScan(nnx.Module):
    """The selective scan along four cross routes, from given per-pixel features.

    Attributes:
      dt_proj: (4, rank, d) map of the step sizes; None when they are given in full (xv2a).
      dt_bias, A_log, D: as in SelectiveScan.
    """

    def __init__(self, d: int, rank: int, config: SS2DConfig, *, rngs: nnx.Rngs) -> None:
        low_rank = config.operator != "xv2a"
        self.dt_proj = (
            nnx.Param(initial_dt_proj(config, (ROUTES, rank, d), rngs)) if low_rank else None
        )
        self.dt_bias = nnx.Param(initial_dt_bias(config, (ROUTES, d), rngs))
        self.A_log = nnx.Param(initial_A_log(config, (ROUTES, d, config.d_state), rngs))
        self.D = nnx.Param(jnp.ones((ROUTES, d), jnp.float32))
        self.implementation = config.scan_implementation

    def __call__(
        self,
        u: Float[Array, "b h w d"],
        dt: Float[Array, "b h w r"],
        B: Float[Array, "b h w 4*n"],
        C: Float[Array, "b h w 4*n"],
    ) -> Float[Array, "b h w d"]:
        """Scans.

        r is rank (all routes share the steps), 4 * rank (each has its own) or d (full, shared).
        """
        image = u.shape[:3]
        B, C = (a.astype(jnp.float32).reshape(*image, ROUTES, -1) for a in (B, C))
        dt = dt.astype(jnp.float32)
        dt_proj = None if self.dt_proj is None else self.dt_proj[...]
        rank = dt.shape[-1] if dt_proj is None else dt_proj.shape[1]
        delta = jnp.broadcast_to(dt.reshape(*image, -1, rank), (*image, ROUTES, rank))
        scan = partial(selective_scan_2d, delta_softplus=True, implementation=self.implementation)
        A, D, bias = -jnp.exp(self.A_log[...]), self.D[...], self.dt_bias[...]
        return scan_image(scan, u, delta, A, B, C, D, bias, dt_proj)


class FusedSS2D(nnx.Module):
    """The operators "xv1a", "xv2a" and "xv3a" of ChangeMamba.

    [depthwise convolution -> act] -> in_proj -> [u, dt, B, C] -> scan -> output norm -> output
    activation -> [* u] -> out_proj -> dropout.

    The arguments are those of SS2D.
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
        d, rank, n = config.d_inner(d_model), config.rank(d_model), config.d_state
        linear = partial(
            make_linear, use_bias=config.projection_bias, init=linear_init, dtype=dtype, rngs=rngs
        )
        d_dt = {"xv1a": rank, "xv2a": d, "xv3a": ROUTES * rank}[config.operator]
        self.splits = (d, d + d_dt, d + d_dt + ROUTES * n)
        self.conv = (
            DepthwiseConv(d_model, config.d_conv, use_bias=config.conv_bias, dtype=dtype, rngs=rngs)
            if config.d_conv > 1
            else None
        )
        self.in_proj = linear(d_model, d + d_dt + 2 * ROUTES * n)
        self.scan = GivenScan(d, rank, config, rngs=rngs)
        self.out_norm = OutputNorm(config.output_norm, d, dtype=dtype, rngs=rngs)
        self.out_proj = linear(d, d_model)
        self.dropout = Dropout(config.dropout)
        self.config = config

    def __call__(
        self, x: Float[Array, "b h w d_model"], *, key: jax.Array | None = None
    ) -> Float[Array, "b h w d_model"]:
        """Applies the operator."""
        if self.conv is not None:
            x = ACTIVATIONS[self.config.activation](self.conv(x))
        u, dt, B, C = jnp.split(self.in_proj(x), self.splits, axis=-1)
        y = self.out_norm(self.scan(u, dt, B, C))
        if self.config.output_activation == "gelu":
            y = ACTIVATIONS["gelu"](y)
        if self.config.multiply_input:
            y = y * u
        return self.dropout(self.out_proj(y), key=key)
