"""VSSBlock, the hierarchy of stages, the classifier VSSM and the feature extractor Backbone."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from zzhnet_jax.errors import ConfigError
from zzhnet_jax.models.blocks import call_blocks
from zzhnet_jax.models.placement import constrain
from zzhnet_jax.models.vssm.config import BlockConfig, SS2DConfig, VSSMConfig
from zzhnet_jax.models.vssm.initializers import LinearInit, truncated_normal
from zzhnet_jax.models.vssm.layers import (
    DropPath,
    GatedMlp,
    Mlp,
    fold_key,
    make_linear,
    make_norm,
)
from zzhnet_jax.models.vssm.patches import Downsample, PatchEmbed
from zzhnet_jax.models.vssm.ss2d import SS2D
from zzhnet_jax.models.vssm.ss2d_xv import FusedSS2D


def make_ss2d(
    d_model: int,
    config: SS2DConfig,
    linear_init: LinearInit = "truncated_normal",
    *,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> SS2D | FusedSS2D:
    """The scan operator that `config.operator` names; the arguments are those of SS2D."""
    kind = FusedSS2D if config.operator.startswith("xv") else SS2D
    return kind(d_model, config, linear_init=linear_init, dtype=dtype, rngs=rngs)


class VSSBlock(nnx.Module):
    """x + op(norm(x)), then x + mlp(norm2(x)); with `post_norm` x + norm(op(x)) and so on.

    Args:
      d_model: width.
      config: its fields.
      linear_init: initial values of its linear layers; VMamba's hierarchy and the decoders of
        ChangeMamba differ here.
      dtype: compute type.
      rngs: source of the initial weights.
    """

    def __init__(
        self,
        d_model: int,
        config: BlockConfig,
        *,
        linear_init: LinearInit = "truncated_normal",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        norm = partial(make_norm, config.norm, d_model, dtype=dtype, rngs=rngs)
        has_ssm, has_mlp = config.ssm.ssm_ratio > 0, config.mlp_ratio > 0
        op = partial(make_ss2d, d_model, config.ssm, linear_init, dtype=dtype, rngs=rngs)
        mlp = partial(
            GatedMlp if config.gated_mlp else Mlp,
            d_model,
            int(d_model * config.mlp_ratio),
            activation=config.mlp_activation,
            dropout=config.mlp_dropout,
            linear_init=linear_init,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = norm() if has_ssm else None
        self.op = op() if has_ssm else None
        self.norm2 = norm() if has_mlp else None
        self.mlp = mlp() if has_mlp else None
        self.drop_path = DropPath()
        self.post_norm = config.post_norm

    def __call__(
        self,
        x: Float[Array, "b h w d_model"],
        *,
        key: jax.Array | None = None,
        drop_path: float | Array = 0.0,
    ) -> Float[Array, "b h w d_model"]:
        """Applies the block; in training drops each residual branch of a sample at a rate."""
        for i, (norm, branch) in enumerate(((self.norm, self.op), (self.norm2, self.mlp))):
            if norm is None or branch is None:
                continue
            branch_key = fold_key(key, 2 * i)
            y = (
                norm(branch(x, key=branch_key))
                if self.post_norm
                else branch(norm(x), key=branch_key)
            )
            x = x + self.drop_path(y, drop_path, key=fold_key(key, 2 * i + 1))
            x = constrain(x, "batch rows columns channels")
        return x


class Stage(nnx.Module):
    """Blocks of one width, then a downsampling layer except in the last stage."""

    def __init__(
        self,
        d_model: int,
        d_next: int | None,
        config: VSSMConfig,
        drop_path_rates: Sequence[float],
        *,
        rngs: nnx.Rngs,
    ) -> None:
        dtype = jnp.dtype(config.dtype)
        self.blocks = nnx.List(
            [VSSBlock(d_model, config.block, dtype=dtype, rngs=rngs) for _ in drop_path_rates]
        )
        self.drop_path_rates = tuple(drop_path_rates)
        version, norm = config.downsample_version, config.block.norm
        self.downsample = (
            None
            if d_next is None
            else Downsample(d_model, d_next, version=version, norm=norm, dtype=dtype, rngs=rngs)
        )
        self.remat = config.block.remat

    def __call__(
        self, x: Float[Array, "b h w d_model"], *, key: jax.Array | None = None
    ) -> tuple[Float[Array, "b h w d_model"], Array]:
        """The blocks' output, and that downsampled (the same array in the last stage)."""
        x = call_blocks(self.blocks, x, key, drop_path=self.drop_path_rates, remat=self.remat)
        return x, x if self.downsample is None else self.downsample(x)


class Hierarchy(nnx.Module):
    """Patch embedding, position embedding and stages: what classifier and backbone share."""

    def __init__(self, config: VSSMConfig, *, rngs: nnx.Rngs) -> None:
        widths, dtype = config.widths, jnp.dtype(config.dtype)
        self.patch_embed = PatchEmbed(
            config.in_chans,
            widths[0],
            version=config.patch_embed_version,
            patch_size=config.patch_size,
            norm=config.block.norm if config.patch_norm else None,
            dtype=dtype,
            rngs=rngs,
        )
        side = config.image_size // config.patch_size
        self.pos_embed = (
            nnx.Param(truncated_normal()(rngs.params(), (1, side, side, widths[0]), jnp.float32))
            if config.position_embedding
            else None
        )
        self.layers = nnx.List(
            [
                Stage(width, following, config, rates, rngs=rngs)
                for width, following, rates in zip(
                    widths, (*widths[1:], None), config.drop_path_rates, strict=True
                )
            ]
        )
        self.config = config

    def stages(
        self, x: Float[Array, "b h w c"], *, key: jax.Array | None = None
    ) -> list[Float[Array, "b h2 w2 d"]]:
        """Output of every stage before its downsampling.

        Raises:
          ValueError: the image has not the size that the position embedding was made for.
        """
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            if x.shape[1:3] != self.pos_embed.shape[1:3]:
                made, given = self.pos_embed.shape[1:3], x.shape[1:3]
                raise ValueError(f"position embedding for {made} patches, image has {given}")
            x = x + self.pos_embed[...].astype(x.dtype)
        outputs = []
        for i, stage in enumerate(self.layers):
            output, x = stage(x, key=fold_key(key, i))
            outputs.append(output)
        return outputs


class Classifier(nnx.Module):
    """Norm, mean over the pixels, linear head."""

    def __init__(
        self, d_model: int, num_classes: int, config: VSSMConfig, *, rngs: nnx.Rngs
    ) -> None:
        dtype = jnp.dtype(config.dtype)
        self.norm = make_norm(config.block.norm, d_model, dtype=dtype, rngs=rngs)
        self.head = make_linear(d_model, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b classes"]:
        """Float32 logits."""
        return self.head(jnp.mean(self.norm(x), axis=(1, 2))).astype(jnp.float32)


class VSSM(Hierarchy):
    """VMamba's image classifier.

    Args:
      config: its fields.
      num_classes: classes.
      rngs: source of the initial weights.
    """

    def __init__(self, config: VSSMConfig, num_classes: int, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs=rngs)
        self.classifier = Classifier(config.widths[-1], num_classes, config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w c"], *, key: jax.Array | None = None
    ) -> Float[Array, "b classes"]:
        """Logits, float32."""
        return self.classifier(self.stages(x, key=key)[-1])


class Backbone(Hierarchy):
    """The hierarchy as a feature extractor with a norm for each level that it hands out.

    Args:
      config: its fields.
      out_indices: stages whose output, before downsampling, is returned.
      rngs: source of the initial weights.

    Raises:
      ConfigError: an index that is no stage.
    """

    def __init__(
        self, config: VSSMConfig, *, out_indices: Sequence[int] = (0, 1, 2, 3), rngs: nnx.Rngs
    ) -> None:
        super().__init__(config, rngs=rngs)
        stages = len(config.depths)
        if not out_indices or not set(out_indices) <= set(range(stages)):
            raise ConfigError("out_indices", tuple(out_indices), f"indices below {stages}")
        dtype = jnp.dtype(config.dtype)
        self.out_indices = tuple(out_indices)
        self.out_norms = nnx.Dict(
            {
                str(i): make_norm(config.block.norm, config.widths[i], dtype=dtype, rngs=rngs)
                for i in out_indices
            }
        )

    def __call__(
        self, x: Float[Array, "b h w c"], *, key: jax.Array | None = None
    ) -> tuple[Float[Array, "b h2 w2 d"], ...]:
        """Normalised features of the chosen stages, finest first."""
        outputs = self.stages(x, key=key)
        return tuple(self.out_norms[str(i)](outputs[i]) for i in self.out_indices)


def build(config: VSSMConfig, num_classes: int, *, rngs: nnx.Rngs) -> VSSM:
    """The classifier, as the model registry asks for it."""
    return VSSM(config, num_classes, rngs=rngs)
