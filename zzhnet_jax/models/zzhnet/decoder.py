"""Decoder and heads: from the fused features of four stages to one logit map.

The decoder walks from H/32 to H/4; at each stage it projects that stage's features, adds the
enlarged map so far, and refines the sum with residual blocks.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from zzhnet_jax.models.placement import constrain
from zzhnet_jax.models.zzhnet.config import NUM_STAGES, DecoderNorm
from zzhnet_jax.models.zzhnet.layers import ConvNorm, ResidualBlock, SubPixelUpsample, resize


class DecoderStage(nnx.Module):
    """Projects one stage's features to `d`, adds the coarser map, refines."""

    def __init__(
        self,
        d_in: int,
        d_coarser: int | None,
        d: int,
        *,
        num_blocks: int,
        norm: DecoderNorm,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kwargs: dict[str, Any] = dict(norm=norm, dtype=dtype, rngs=rngs)
        self.project = ConvNorm(d_in, d, kernel=1, **kwargs)
        self.narrow = (
            None
            if d_coarser is None or d_coarser == d
            else ConvNorm(d_coarser, d, kernel=1, **kwargs)
        )
        self.blocks = nnx.List([ResidualBlock(d, **kwargs) for _ in range(num_blocks)])

    def __call__(
        self, x: Float[Array, "b h w d_in"], coarser: Float[Array, "b h2 w2 d_coarser"] | None
    ) -> Float[Array, "b h w d"]:
        """Decodes one stage; `coarser` is None at the coarsest."""
        x = self.project(x)
        if coarser is not None:
            coarser = coarser if self.narrow is None else self.narrow(coarser)
            coarser = resize(coarser, x.shape[1], x.shape[2])
            x = x + constrain(coarser, "batch rows columns channels")
        for block in self.blocks:
            x = block(x)
        return x


class Decoder(nnx.Module):
    """The four decoder stages; `widths_in` and `widths` are finest first."""

    def __init__(
        self,
        widths_in: Sequence[int],
        widths: Sequence[int],
        *,
        num_blocks: int,
        norm: DecoderNorm,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        coarser: list[int | None] = [*widths[1:], None]
        self.stages = nnx.List(
            [
                DecoderStage(
                    widths_in[i],
                    coarser[i],
                    widths[i],
                    num_blocks=num_blocks,
                    norm=norm,
                    dtype=dtype,
                    rngs=rngs,
                )
                for i in range(NUM_STAGES)
            ]
        )

    def __call__(self, features: Sequence[Float[Array, "b _ _ _"]]) -> Float[Array, "b h w d"]:
        """Decodes features (finest first) to a map of the finest stage's size."""
        x = self.stages[-1](features[-1], None)
        for i in reversed(range(NUM_STAGES - 1)):
            x = self.stages[i](features[i], x)
        return x


class BilinearHead(nnx.Module):
    """Logits at H/4, enlarged four times by interpolation."""

    def __init__(self, d: int, num_classes: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.classify = nnx.Linear(d, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b 4h 4w classes"]:
        """Logits in float32."""
        logits = self.classify(x).astype(jnp.float32)
        return resize(logits, 4 * x.shape[1], 4 * x.shape[2])


class LearnedHead(nnx.Module):
    """Two learned steps of 2x; the first takes both dates' stem features at H/2."""

    def __init__(
        self,
        d: int,
        d_stem: int,
        num_classes: int,
        *,
        norm: DecoderNorm,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        half = max(d // 2, 8)
        kwargs: dict[str, Any] = dict(norm=norm, dtype=dtype, rngs=rngs)
        self.enlarge = SubPixelUpsample(d, half, dtype=dtype, rngs=rngs)
        self.skip = ConvNorm(3 * d_stem, half, kernel=1, **kwargs)
        self.refine = ResidualBlock(half, **kwargs)
        self.classify = SubPixelUpsample(half, num_classes, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b h w d"],
        stem_pre: Float[Array, "b 2h 2w d_stem"],
        stem_post: Float[Array, "b 2h 2w d_stem"],
    ) -> Float[Array, "b 4h 4w classes"]:
        """Logits in float32."""
        stem = jnp.concatenate([stem_pre, stem_post, jnp.abs(stem_post - stem_pre)], axis=-1)
        x = jax.nn.relu(self.enlarge(x) + self.skip(stem))
        return self.classify(self.refine(x)).astype(jnp.float32)
