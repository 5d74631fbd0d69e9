"""Difference module: what differs between the dates, at one stage of the encoder.

Coarse differences are informed by finer ones: each block also receives the difference feature of
the stage before it, brought to its own size and width.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from zzhnet_jax.models.dates import split_dates
from zzhnet_jax.models.vssm.depthwise import DepthwiseConv
from zzhnet_jax.models.vssm.layers import make_conv
from zzhnet_jax.models.zzhnet.config import DecoderNorm
from zzhnet_jax.models.zzhnet.layers import norm_layer


class DDM(nnx.Module):
    """Difference feature of one stage, from both dates and the finer stage's difference.

    Absolute difference, signed difference and product of the two (normed) features pass a gated
    projection, value * SiLU(gate), and a depthwise convolution with identity.
    """

    def __init__(
        self, d: int, *, d_finer: int | None, norm: DecoderNorm, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.norm = norm_layer(norm, d, dtype=dtype, rngs=rngs)
        self.value_gate = nnx.Linear(3 * d, 2 * d, dtype=dtype, rngs=rngs)
        self.spread = DepthwiseConv(d, use_bias=False, dtype=dtype, rngs=rngs)
        self.out_norm = norm_layer(norm, d, dtype=dtype, rngs=rngs)
        self.from_finer = (
            None
            if d_finer is None
            else make_conv(d_finer, d, 2, stride=2, use_bias=False, dtype=dtype, rngs=rngs)
        )

    def __call__(
        self,
        both: Float[Array, "2b h w d"],
        finer: Float[Array, "b h2 w2 d_finer"] | None = None,
    ) -> Float[Array, "b h w d"]:
        """Difference of the dates that `join_dates` put together; the first stage has no finer."""
        pre, post = split_dates(self.norm(both))
        signed = post - pre
        features = jnp.concatenate([jnp.abs(signed), signed, pre * post], axis=-1)
        value, gate = jnp.split(self.value_gate(features), 2, axis=-1)
        difference = value * jax.nn.silu(gate)
        if self.from_finer is not None and finer is not None:
            difference = difference + self.from_finer(finer)
        return jax.nn.relu(self.out_norm(difference + self.spread(difference)))
