"""ZZHNet: two images in, one change map out.

Low stages share weights between the dates and run as one doubled batch; CSSM blocks let each date
see the other; high stages have weights per date; difference blocks and attentional fusion hand
[pre, post, difference] of every stage to the decoder.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from zzhnet_jax.models.blocks import call_block, call_blocks, call_each
from zzhnet_jax.models.dates import join_dates, split_dates
from zzhnet_jax.models.placement import constrain
from zzhnet_jax.models.vssm.layers import fold_key
from zzhnet_jax.models.vssm.patches import Downsample, PatchEmbed
from zzhnet_jax.models.vssm.vssm import VSSBlock
from zzhnet_jax.models.zzhnet.config import NUM_STAGES, ZZHNetConfig
from zzhnet_jax.models.zzhnet.cssm import CSSM
from zzhnet_jax.models.zzhnet.ddm import DDM
from zzhnet_jax.models.zzhnet.decoder import BilinearHead, Decoder, LearnedHead
from zzhnet_jax.models.zzhnet.fusion import AFF

# Four halvings by the patch embedding and three more between stages.
_MULTIPLE = 4 * 2 ** (NUM_STAGES - 1)


class Stage(nnx.Module):
    """Downsampling from the stage before, then this stage's VSSBlocks, for one set of weights."""

    def __init__(self, config: ZZHNetConfig, stage: int, *, rngs: nnx.Rngs) -> None:
        d, dtype = config.widths[stage], jnp.dtype(config.dtype)
        self.downsample = (
            Downsample(
                config.widths[stage - 1],
                d,
                version=config.downsample_version,
                norm=config.block.norm,
                dtype=dtype,
                rngs=rngs,
            )
            if stage > 0
            else None
        )
        total, first = sum(config.depths), sum(config.depths[:stage])
        self.drop_path_rates = tuple(
            config.drop_path_rate * i / max(total - 1, 1)
            for i in range(first, first + config.depths[stage])
        )
        self.blocks = nnx.List(
            [VSSBlock(d, config.block, dtype=dtype, rngs=rngs) for _ in self.drop_path_rates]
        )
        self.remat = config.block.remat

    def shrink(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Brings the output of the stage before to this stage's size."""
        return x if self.downsample is None else self.downsample(x)

    def __call__(
        self, x: Float[Array, "b h w d"], *, key: jax.Array | None = None
    ) -> Float[Array, "b h w d"]:
        """Applies the blocks; their input is what `shrink` gives."""
        return call_blocks(self.blocks, x, key, drop_path=self.drop_path_rates, remat=self.remat)


class ZZHNet(nnx.Module):
    """Change network for two co-registered images.

    Args:
      config: its fields.
      num_classes: classes of the change map.
      rngs: source of the initial weights.
    """

    def __init__(self, config: ZZHNetConfig, *, num_classes: int = 2, rngs: nnx.Rngs) -> None:
        dtype = jnp.dtype(config.dtype)
        kwargs: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        widths = config.widths
        self.config = config
        self.patch_embed = PatchEmbed(
            config.in_chans,
            config.width,
            version=config.patch_embed_version,
            norm=config.block.norm,
            **kwargs,
        )
        shared = range(config.num_shared_stages)
        own = range(config.num_shared_stages, NUM_STAGES)
        self.shared_stages = nnx.List([Stage(config, i, rngs=rngs) for i in shared])
        self.pre_stages = nnx.List([Stage(config, i, rngs=rngs) for i in own])
        self.post_stages = nnx.List([Stage(config, i, rngs=rngs) for i in own])
        self.cssm = nnx.List(
            [
                CSSM(
                    widths[i],
                    config.block,
                    config.token_order,
                    drop_path=config.drop_path_rate
                    * sum(config.depths[: i + 1])
                    / sum(config.depths),
                    **kwargs,
                )
                for i in sorted(config.cssm_stages)
            ]
        )
        self.ddm = nnx.List(
            [
                DDM(d, d_finer=widths[i - 1] if i else None, norm=config.norm, **kwargs)
                for i, d in enumerate(widths)
            ]
        )
        self.fusion = nnx.List([AFF(d, norm=config.norm, **kwargs) for d in widths])
        self.decoder = Decoder(
            [3 * d for d in widths],
            config.decoder_widths,
            num_blocks=config.decoder_blocks,
            norm=config.norm,
            **kwargs,
        )
        self.head = (
            LearnedHead(
                config.decoder_widths[0], config.width // 2, num_classes, norm=config.norm, **kwargs
            )
            if config.head == "learned"
            else BilinearHead(config.decoder_widths[0], num_classes, **kwargs)
        )

    def __call__(
        self,
        pre: Float[Array, "b h w c"],
        post: Float[Array, "b h w c"],
        *,
        key: jax.Array | None = None,
    ) -> Float[Array, "b h w classes"]:
        """Change logits.

        Args:
          pre: earlier image, normalised, of any size.
          post: later image, of the same size.
          key: random key of this call; needed in training mode when `drop_path_rate` is above 0.

        Returns:
          Logits in float32, of the images' size.

        Raises:
          ValueError: the images differ in shape, or have other bands than the network.
        """
        if pre.shape != post.shape or pre.ndim != 4 or pre.shape[-1] != self.config.in_chans:
            raise ValueError(
                f"pre {pre.shape} and post {post.shape}: expected two images (b, h, w,"
                f" {self.config.in_chans}) of one shape"
            )
        height, width = pre.shape[1:3]
        images = join_dates(pre, post).astype(self.config.dtype)
        bottom, right = -height % _MULTIPLE, -width % _MULTIPLE
        images = jnp.pad(images, ((0, 0), (0, bottom), (0, right), (0, 0)), mode="edge")
        maps = self.patch_embed.maps(images)
        x = self.decoder(self._fused_features(maps[-1], key))
        if isinstance(self.head, LearnedHead):
            logits = self.head(x, *split_dates(maps[0]))
        else:
            logits = self.head(x)
        return logits[:, :height, :width]

    def _fused_features(
        self, tokens: Float[Array, "2b h w d"], key: jax.Array | None
    ) -> list[Float[Array, "b _ _ _"]]:
        """[pre, post, difference] of each stage, finest first."""
        x, finer, features = tokens, None, []
        for i in range(NUM_STAGES):
            with jax.named_scope(f"stage{i}"):
                x = self._encode(x, i, fold_key(key, i))
                finer = self.ddm[i](x, finer)
                fused = self.fusion[i](x, join_dates(finer, finer))
                both = jnp.concatenate([*split_dates(fused), finer], axis=-1)
                features.append(constrain(both, "batch rows columns channels"))
        return features

    def _encode(
        self, x: Float[Array, "2b h w c"], stage: int, key: jax.Array | None
    ) -> Float[Array, "2b h2 w2 d"]:
        """One stage for both dates, and its CSSM if it has one."""
        own = stage - self.config.num_shared_stages
        if own < 0:
            shared = self.shared_stages[stage]
            x = shared(shared.shrink(x), key=fold_key(key, 0))
        else:
            dates = [self.pre_stages[own], self.post_stages[own]]
            # One by one: side by side they are a grouped convolution, for whose weight gradient XLA
            # gathers the whole batch on every GPU.
            small = [date.shrink(x) for date, x in zip(dates, split_dates(x), strict=True)]
            x = join_dates(*call_each(dates, jnp.stack(small), fold_key(key, 0)))
        if stage in self.config.cssm_stages:
            block = self.cssm[sorted(self.config.cssm_stages).index(stage)]
            x = call_block(block, x, fold_key(key, 1), remat=self.config.block.remat)
        return x
