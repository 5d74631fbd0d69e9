"""The decoders of ChangeMamba: one relates two dates, the other reads one."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from zzhnet_jax.models.blocks import call_block
from zzhnet_jax.models.changemamba.config import Arrangement, ChangeMambaConfig
from zzhnet_jax.models.placement import constrain
from zzhnet_jax.models.vssm import VSSBlock
from zzhnet_jax.models.vssm.layers import BatchNorm, fold_key, make_conv, make_linear

Features = Sequence[Float[Array, "b h w d"]]

_pointwise = partial(make_linear, init="uniform")


def resize(x: Float[Array, "b h w c"], size: Sequence[int]) -> Float[Array, "b h2 w2 c"]:
    """Bilinear interpolation between pixel centres (PyTorch's align_corners=False)."""
    shape = (x.shape[0], *size, x.shape[-1])
    return jax.image.resize(x, shape, method="bilinear", antialias=False)


class PointwiseNorm(nnx.Module):
    """1x1 convolution with bias, batch norm, ReLU."""

    def __init__(
        self, d_in: int, d_out: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        self.conv = _pointwise(d_in, d_out, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(d_out, dtype=dtype)

    def __call__(self, x: Float[Array, "b h w d_in"]) -> Float[Array, "b h w d_out"]:
        """Applies the layer."""
        return jax.nn.relu(self.norm(self.conv(x)))


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions with batch norm around an identity (He et al. 2016, the basic block)."""

    def __init__(self, d: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        conv = partial(make_conv, d, d, 3, padding=1, use_bias=False, dtype=dtype, rngs=rngs)
        self.conv1, self.norm1 = conv(), BatchNorm(d, dtype=dtype)
        self.conv2, self.norm2 = conv(), BatchNorm(d, dtype=dtype)

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        """Applies the block."""
        y = jax.nn.relu(self.norm1(self.conv1(x)))
        return jax.nn.relu(x + self.norm2(self.conv2(y)))


class DecoderBlock(nnx.Module):
    """The encoder's kind of VSSBlock, at the decoder's width."""

    def __init__(self, config: ChangeMambaConfig, *, rngs: nnx.Rngs) -> None:
        self.block = VSSBlock(
            config.decoder_width,
            config.encoder.block,
            linear_init="uniform",
            dtype=jnp.dtype(config.encoder.dtype),
            rngs=rngs,
        )
        self.remat = config.encoder.block.remat
        self.drop_path_rate = config.decoder_drop_path

    def __call__(
        self, x: Float[Array, "b h w d"], *, key: jax.Array | None
    ) -> Float[Array, "b h w d"]:
        """Applies the block."""
        return call_block(self.block, x, key, remat=self.remat, drop_path=self.drop_path_rate)


def arrange(
    pre: Float[Array, "b h w c"], post: Float[Array, "b h w c"], arrangement: Arrangement
) -> Float[Array, "b h w2 c2"]:
    """Two dates as one image: 2 c channels, 2 w columns interleaved, or 2 w side by side."""
    if arrangement == "cat":
        return jnp.concatenate((pre, post), axis=-1)
    if arrangement == "split":
        return jnp.concatenate((pre, post), axis=2)
    b, h, w, c = pre.shape
    return jnp.stack((pre, post), axis=3).reshape(b, h, 2 * w, c)


def dates(x: Float[Array, "b h w2 c"], arrangement: Arrangement) -> list[Float[Array, "b h w c"]]:
    """The parts of an arranged image: [pre, post], or with "cat" the image itself."""
    if arrangement == "cat":
        return [x]
    if arrangement == "split":
        return jnp.split(x, 2, axis=2)
    return [x[:, :, 0::2], x[:, :, 1::2]]


class Branch(nnx.Module):
    """One arrangement of the two dates: 1x1 convolution to the decoder's width, then a VSSBlock.

    Without `scan`, batch norm and ReLU take the block's place.
    """

    def __init__(
        self,
        d_in: int,
        config: ChangeMambaConfig,
        arrangement: Arrangement,
        *,
        scan: bool,
        rngs: nnx.Rngs,
    ) -> None:
        width, dtype = config.decoder_width, jnp.dtype(config.encoder.dtype)
        self.arrangement = arrangement
        channels = 2 * d_in if arrangement == "cat" else d_in
        self.conv = _pointwise(channels, width, dtype=dtype, rngs=rngs)
        self.vss = DecoderBlock(config, rngs=rngs) if scan else None
        self.norm = None if scan else BatchNorm(width, dtype=dtype)

    def __call__(
        self,
        pre: Float[Array, "b h w c"],
        post: Float[Array, "b h w c"],
        *,
        key: jax.Array | None,
    ) -> list[Float[Array, "b h w d"]]:
        """One map for "cat", one a date otherwise."""
        x = self.conv(arrange(pre, post, self.arrangement))
        if self.vss is not None:
            x = self.vss(x, key=key)
        if self.norm is not None:
            x = jax.nn.relu(self.norm(x))
        return dates(x, self.arrangement)


class ChangeStage(nnx.Module):
    """All branches at one level, fused; then joined to the coarser map, if any, and smoothed."""

    def __init__(
        self, d_in: int, config: ChangeMambaConfig, *, coarsest: bool, scan: bool, rngs: nnx.Rngs
    ) -> None:
        width, dtype = config.decoder_width, jnp.dtype(config.encoder.dtype)
        branch = partial(Branch, d_in, config, scan=scan, rngs=rngs)
        self.branches = nnx.Dict({name: branch(name) for name in config.arrangements})
        self.arrangements = config.arrangements
        maps = sum(1 if name == "cat" else 2 for name in config.arrangements)
        self.fuse = PointwiseNorm(maps * width, width, dtype=dtype, rngs=rngs)
        self.smooth = None if coarsest else ResidualBlock(width, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        pre: Float[Array, "b h w c"],
        post: Float[Array, "b h w c"],
        coarser: Float[Array, "b h2 w2 d"] | None,
        *,
        key: jax.Array | None,
    ) -> Float[Array, "b h w d"]:
        """Applies the stage."""
        maps: list[Array] = []
        for i, name in enumerate(self.arrangements):
            maps += self.branches[name](pre, post, key=fold_key(key, i))
        x = self.fuse(jnp.concatenate(maps, axis=-1))
        if self.smooth is None or coarser is None:
            return x
        coarser = constrain(resize(coarser, x.shape[1:3]), "batch rows columns channels")
        return self.smooth(coarser + x)


class ChangeDecoder(nnx.Module):
    """Relates the features of two dates, coarse to fine.

    Args:
      config: its decoder fields.
      rngs: source of the initial weights.
    """

    def __init__(self, config: ChangeMambaConfig, *, rngs: nnx.Rngs) -> None:
        widths = config.encoder.widths[::-1]
        last = len(widths) - 1
        self.stages = nnx.List(
            [
                ChangeStage(
                    width, config, coarsest=i == 0, scan=config.scan_finest or i < last, rngs=rngs
                )
                for i, width in enumerate(widths)
            ]
        )

    def __call__(
        self, pre: Features, post: Features, *, key: jax.Array | None
    ) -> Float[Array, "b h w d"]:
        """A change map at the finest level, from features listed finest first."""
        levels = [*zip(pre, post, strict=True)][::-1]
        x = self.stages[0](*levels[0], None, key=fold_key(key, 0))
        for i in range(1, len(levels)):
            x = self.stages[i](*levels[i], x, key=fold_key(key, i))
        return x


class SemanticStage(nnx.Module):
    """One level of the semantic decoder: entry, join with the coarser map, VSSBlock."""

    def __init__(
        self, d_in: int, config: ChangeMambaConfig, *, coarsest: bool, rngs: nnx.Rngs
    ) -> None:
        width, dtype = config.decoder_width, jnp.dtype(config.encoder.dtype)
        entry = _pointwise if coarsest else PointwiseNorm
        self.entry = entry(d_in, width, dtype=dtype, rngs=rngs)
        self.smooth = None if coarsest else ResidualBlock(width, dtype=dtype, rngs=rngs)
        self.vss = DecoderBlock(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        coarser: Float[Array, "b h2 w2 d"] | None,
        *,
        key: jax.Array | None,
    ) -> Float[Array, "b h w d"]:
        """Applies the stage."""
        x = self.entry(x)
        if self.smooth is not None and coarser is not None:
            x = self.smooth(resize(coarser, x.shape[1:3]) + x)
        return self.vss(x, key=key)


class SemanticDecoder(nnx.Module):
    """Reads one date's features, coarse to fine.

    Args:
      config: its decoder fields.
      rngs: source of the initial weights.
    """

    def __init__(self, config: ChangeMambaConfig, *, rngs: nnx.Rngs) -> None:
        widths = config.encoder.widths[::-1]
        self.stages = nnx.List(
            [
                SemanticStage(width, config, coarsest=i == 0, rngs=rngs)
                for i, width in enumerate(widths)
            ]
        )
        dtype = jnp.dtype(config.encoder.dtype)
        self.smooth = ResidualBlock(config.decoder_width, dtype=dtype, rngs=rngs)

    def __call__(self, features: Features, *, key: jax.Array | None) -> Float[Array, "b h w d"]:
        """A map at the finest level, from features listed finest first."""
        levels = features[::-1]
        x = self.stages[0](levels[0], None, key=fold_key(key, 0))
        for i in range(1, len(levels)):
            x = self.stages[i](levels[i], x, key=fold_key(key, i))
        return self.smooth(x)
