"""ChangeMamba's networks: binary change, semantic change, building damage (Chen et al. 2024)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from zzhnet_jax.models.changemamba.config import ChangeMambaConfig
from zzhnet_jax.models.changemamba.decoders import (
    ChangeDecoder,
    Features,
    SemanticDecoder,
    resize,
)
from zzhnet_jax.models.dates import join_dates, split_dates
from zzhnet_jax.models.vssm import Backbone
from zzhnet_jax.models.vssm.layers import fold_key, make_linear

Image = Float[Array, "b h w c"]
Logits = Float[Array, "b h w classes"]


class Encoders(nnx.Module):
    """Features of both dates, by one set of weights or by one a date."""

    def __init__(self, config: ChangeMambaConfig, *, rngs: nnx.Rngs) -> None:
        levels = range(len(config.encoder.depths))
        self.pre = Backbone(config.encoder, out_indices=levels, rngs=rngs)
        self.post = (
            Backbone(config.encoder, out_indices=levels, rngs=rngs)
            if config.separate_encoders
            else None
        )
        # Batch statistics are of one date at a time; all else is faster as one doubled batch.
        self.together = self.post is None and config.encoder.block.norm != "batch"

    def __call__(
        self, pre: Image, post: Image, *, key: jax.Array | None
    ) -> tuple[Features, Features]:
        """Features of each date, finest first."""
        if self.together:
            both = self.pre(join_dates(pre, post), key=key)
            pairs = [split_dates(feature) for feature in both]
            return [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        second = self.pre if self.post is None else self.post
        return self.pre(pre, key=fold_key(key, 0)), second(post, key=fold_key(key, 1))


class Head(nnx.Module):
    """1x1 convolution to class scores, resized to the input."""

    def __init__(self, config: ChangeMambaConfig, classes: int, *, rngs: nnx.Rngs) -> None:
        dtype = jnp.dtype(config.encoder.dtype)
        self.conv = make_linear(
            config.decoder_width, classes, init="uniform", dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "b h w d"], size: Sequence[int]) -> Logits:
        """Float32 logits of the given height and width."""
        return resize(self.conv(x).astype(jnp.float32), size)


class BinaryChange(nnx.Module):
    """MambaBCD: logits of change.

    Args:
      config: its fields; task "bcd".
      num_classes: classes of the output.
      rngs: source of the initial weights.
    """

    def __init__(self, config: ChangeMambaConfig, num_classes: int = 2, *, rngs: nnx.Rngs) -> None:
        self.encoders = Encoders(config, rngs=rngs)
        self.decoder = ChangeDecoder(config, rngs=rngs)
        self.head = Head(config, num_classes, rngs=rngs)
        self.config = config

    def __call__(self, pre: Image, post: Image, *, key: jax.Array | None = None) -> Logits:
        """Logits (b, h, w, num_classes), float32."""
        features = self.encoders(pre, post, key=fold_key(key, 0))
        return self.head(self.decoder(*features, key=fold_key(key, 1)), pre.shape[1:3])


class SemanticChange(nnx.Module):
    """MambaSCD: change, and the land cover of both dates.

    The arguments are those of BinaryChange.
    """

    def __init__(self, config: ChangeMambaConfig, num_classes: int = 2, *, rngs: nnx.Rngs) -> None:
        self.encoders = Encoders(config, rngs=rngs)
        self.change_decoder = ChangeDecoder(config, rngs=rngs)
        self.pre_decoder = SemanticDecoder(config, rngs=rngs)
        self.post_decoder = SemanticDecoder(config, rngs=rngs)
        self.change_head = Head(config, num_classes, rngs=rngs)
        self.semantic_head = Head(config, config.semantic_classes, rngs=rngs)
        self.config = config

    def __call__(
        self, pre: Image, post: Image, *, key: jax.Array | None = None
    ) -> dict[str, Logits]:
        """Float32 logits "change", "pre_semantic" and "post_semantic"."""
        size = pre.shape[1:3]
        before, after = self.encoders(pre, post, key=fold_key(key, 0))
        change = self.change_decoder(before, after, key=fold_key(key, 1))
        return {
            "change": self.change_head(change, size),
            "pre_semantic": self.semantic_head(
                self.pre_decoder(before, key=fold_key(key, 2)), size
            ),
            "post_semantic": self.semantic_head(
                self.post_decoder(after, key=fold_key(key, 3)), size
            ),
        }


class BuildingDamage(nnx.Module):
    """MambaBDA, and with separate encoders its multimodal form.

    The arguments are those of BinaryChange.
    """

    def __init__(self, config: ChangeMambaConfig, num_classes: int = 2, *, rngs: nnx.Rngs) -> None:
        self.encoders = Encoders(config, rngs=rngs)
        self.building_decoder = SemanticDecoder(config, rngs=rngs)
        self.damage_decoder = ChangeDecoder(config, rngs=rngs)
        self.building_head = Head(config, num_classes, rngs=rngs)
        self.damage_head = Head(config, config.damage_classes, rngs=rngs)
        self.config = config

    def __call__(
        self, pre: Image, post: Image, *, key: jax.Array | None = None
    ) -> dict[str, Logits]:
        """Float32 logits "building" (of the first date) and "damage"."""
        size = pre.shape[1:3]
        before, after = self.encoders(pre, post, key=fold_key(key, 0))
        building = self.building_decoder(before, key=fold_key(key, 1))
        damage = self.damage_decoder(before, after, key=fold_key(key, 2))
        return {
            "building": self.building_head(building, size),
            "damage": self.damage_head(damage, size),
        }


def build(
    config: ChangeMambaConfig, num_classes: int = 2, *, rngs: nnx.Rngs
) -> BinaryChange | SemanticChange | BuildingDamage:
    """The network of `config.task`; `num_classes` are those of its change or building output."""
    networks: dict[str, type] = {"bcd": BinaryChange, "scd": SemanticChange, "bda": BuildingDamage}
    return networks[config.task](config, num_classes, rngs=rngs)
