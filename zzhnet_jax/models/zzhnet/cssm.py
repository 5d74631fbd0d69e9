"""CSSM: one selective scan that sees all of both images.

The tokens of the two dates are arranged in one image, scanned along its four routes, and put back;
norm, projections and feed-forward part are shared by the dates. Each residual branch has a learned
scale per channel that starts near zero, so that a new block leaves the features as they are.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from zzhnet_jax.models.dates import join_dates, split_dates
from zzhnet_jax.models.placement import constrain
from zzhnet_jax.models.vssm.config import BlockConfig
from zzhnet_jax.models.vssm.depthwise import DepthwiseConv
from zzhnet_jax.models.vssm.layers import (
    ACTIVATIONS,
    DropPath,
    GatedMlp,
    Mlp,
    fold_key,
    make_linear,
    make_norm,
)
from zzhnet_jax.models.vssm.scans import SelectiveScan
from zzhnet_jax.models.vssm.ss2d import OutputNorm
from zzhnet_jax.models.zzhnet.config import TokenOrder

_INITIAL_SCALE = 1e-2


def arrange(
    pre: Float[Array, "b h w d"], post: Float[Array, "b h w d"], order: TokenOrder
) -> Float[Array, "b _ _ _"]:
    """Both dates as one image.

    Returns:
      "interleave" (b, h, 2w, d): columns pre, post, pre, post ...; "concat_width" (b, h, 2w, d);
      "concat_height" (b, 2h, w, d); "concat_channels" (b, h, w, 2d).
    """
    if order == "interleave":
        b, h, w, d = pre.shape
        return jnp.stack([pre, post], axis=3).reshape(b, h, 2 * w, d)
    axis = {"concat_height": 1, "concat_width": 2, "concat_channels": 3}[order]
    return jnp.concatenate([pre, post], axis=axis)


def separate(
    both: Float[Array, "b _ _ _"], order: TokenOrder
) -> tuple[Float[Array, "b h w d"], Float[Array, "b h w d"]]:
    """The two dates back from `arrange`."""
    if order == "interleave":
        return both[:, :, 0::2], both[:, :, 1::2]
    axis = {"concat_height": 1, "concat_width": 2, "concat_channels": 3}[order]
    pre, post = jnp.split(both, 2, axis=axis)
    return pre, post


class CrossDateScan(nnx.Module):
    """SS2D with shared projections whose scan runs over both dates at once."""

    def __init__(
        self,
        d_model: int,
        config: BlockConfig,
        order: TokenOrder,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        ssm = config.ssm
        d = ssm.d_inner(d_model)
        kwargs: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        self.in_proj = make_linear(d_model, 2 * d, use_bias=ssm.projection_bias, **kwargs)
        self.conv = (
            DepthwiseConv(d, ssm.d_conv, use_bias=ssm.conv_bias, **kwargs)
            if ssm.d_conv > 1
            else None
        )
        d_scan = 2 * d if order == "concat_channels" else d
        self.scan = SelectiveScan(d_scan, ssm.rank(d_model), ssm, rngs=rngs)
        self.out_norm = OutputNorm(ssm.output_norm, d, **kwargs)
        self.out_proj = make_linear(d, d_model, use_bias=ssm.projection_bias, **kwargs)
        self.activation = ssm.activation
        self.order = order

    def __call__(self, x: Float[Array, "2b h w d_model"]) -> Float[Array, "2b h w d_model"]:
        """Scans both dates of a batch made by `join_dates`."""
        act = ACTIVATIONS[self.activation]
        u, z = jnp.split(self.in_proj(x), 2, axis=-1)
        u, z = (constrain(part, "batch rows columns inner") for part in (u, z))
        u = act(u if self.conv is None else self.conv(u))
        scanned = self.scan(arrange(*split_dates(u), self.order))
        y = self.out_norm(join_dates(*separate(scanned, self.order)))
        y = constrain(y, "batch rows columns inner")
        return self.out_proj(y * act(z))


class CSSM(nnx.Module):
    """Cross-date block: x + scale * scan(norm(x)), then x + scale * ffn(norm(x)), for both dates.

    Args:
      d_model: width of the features.
      config: scan and feed-forward part; its `gate` is not consulted, since the block always gates.
      order: how the tokens of the dates are arranged for the scan.
      drop_path: rate at which a sample's branch is dropped in training.
      dtype: compute type.
      rngs: source of the initial weights.
    """

    def __init__(
        self,
        d_model: int,
        config: BlockConfig,
        order: TokenOrder,
        *,
        drop_path: float = 0.0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        kwargs: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        self.norm = make_norm(config.norm, d_model, **kwargs)
        self.scan = CrossDateScan(d_model, config, order, **kwargs)
        self.scan_scale = nnx.Param(jnp.full(d_model, _INITIAL_SCALE, jnp.float32))
        self.norm2 = make_norm(config.norm, d_model, **kwargs)
        mlp = GatedMlp if config.gated_mlp else Mlp
        hidden = int(max(config.mlp_ratio, 1.0) * d_model)
        self.mlp = mlp(d_model, hidden, activation=config.mlp_activation, **kwargs)
        self.mlp_scale = nnx.Param(jnp.full(d_model, _INITIAL_SCALE, jnp.float32))
        self.drop_path = DropPath()
        self.drop_path_rate = drop_path

    def __call__(
        self, x: Float[Array, "2b h w d_model"], *, key: jax.Array | None = None
    ) -> Float[Array, "2b h w d_model"]:
        """Applies the block to both dates of a batch made by `join_dates`."""
        y = self.scan(self.norm(x)) * self.scan_scale[...].astype(x.dtype)
        x = x + self.drop_path(y, self.drop_path_rate, key=fold_key(key, 0))
        y = self.mlp(self.norm2(x), key=fold_key(key, 1)) * self.mlp_scale[...].astype(x.dtype)
        x = x + self.drop_path(y, self.drop_path_rate, key=fold_key(key, 2))
        return constrain(x, "batch rows columns channels")
