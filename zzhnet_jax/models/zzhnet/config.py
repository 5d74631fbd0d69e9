"""Everything that can be chosen about a ZZHNet, and its presets.

Stages are counted from 0 (H/4) to 3 (H/32), as in the Backbone's `out_indices`.
"""

from dataclasses import dataclass, field
from typing import Literal

from zzhnet_jax.models.vssm.config import (
    BlockConfig,
    ComputeDtype,
    SS2DConfig,
    check,
    check_choices,
)

TokenOrder = Literal["interleave", "concat_width", "concat_height", "concat_channels"]
ChannelSchedule = Literal["constant", "progressive"]
HeadKind = Literal["bilinear", "learned"]
DecoderNorm = Literal["layer", "batch", "group"]

NUM_STAGES = 4


@dataclass(frozen=True)
class ZZHNetConfig:
    """Configuration of a ZZHNet.

    Attributes:
      in_chans: bands of each image.
      width: channels of the first stage; stage i has width * 2^i.
      depths: VSSBlocks in each of the four stages.
      num_shared_stages: how many of the first stages use one set of weights for both dates (0..4).
      cssm_stages: stages that end with a CSSM block, which scans both dates at once.
      token_order: how a CSSM arranges the tokens of the two dates for its scan.
      patch_embed_version: 1 is one strided convolution; 2 is two, with a norm and GELU between.
      downsample_version: 1 is patch merging; 2 and 3 are strided convolutions of size 2 and 3.
      block: the VSSBlocks, also of the CSSM's scan and feed-forward part.
      drop_path_rate: rate of the last block; it rises linearly from 0 at the first.
      decoder_width: channels of the decoder, or of its finest stage when "progressive".
      decoder_blocks: residual blocks at each decoder stage.
      channel_schedule: "constant" maps every stage to `decoder_width`; "progressive" starts at
        8 * decoder_width and halves towards the finest stage.
      head: "bilinear" gives logits at H/4 and enlarges them; "learned" takes two learned steps of
        2x, the first with a skip from the stem (needs `patch_embed_version` 2).
      norm: normalisation in the difference blocks, fusion, decoder and head.
      dtype: what the network computes in; parameters and the scan are float32 either way.
    """

    in_chans: int = 3
    width: int = 96
    depths: tuple[int, ...] = (2, 2, 4, 2)
    num_shared_stages: int = 2
    cssm_stages: tuple[int, ...] = (2, 3)
    token_order: TokenOrder = "interleave"
    patch_embed_version: Literal[1, 2] = 2
    downsample_version: Literal[1, 2, 3] = 3
    block: BlockConfig = field(default_factory=BlockConfig)
    drop_path_rate: float = 0.2
    decoder_width: int = 128
    decoder_blocks: int = 1
    channel_schedule: ChannelSchedule = "constant"
    head: HeadKind = "learned"
    norm: DecoderNorm = "layer"
    dtype: ComputeDtype = "float32"

    def __post_init__(self) -> None:
        """Refuses values that no ZZHNet can have, by field."""
        for name in ("in_chans", "width", "decoder_width", "decoder_blocks"):
            check(self, name, getattr(self, name) >= 1, "at least 1")
        stages = len(self.depths) == NUM_STAGES and min(self.depths) >= 1
        check(self, "depths", stages, f"{NUM_STAGES} positive numbers, one a stage")
        shared = 0 <= self.num_shared_stages <= NUM_STAGES
        check(self, "num_shared_stages", shared, f"0 to {NUM_STAGES}")
        known = set(self.cssm_stages) <= set(range(NUM_STAGES))
        check(self, "cssm_stages", known, f"stages from 0 to {NUM_STAGES - 1}")
        check(self, "drop_path_rate", 0 <= self.drop_path_rate < 1, "in [0, 1)")
        check_choices(
            self,
            {
                "token_order": TokenOrder,
                "patch_embed_version": Literal[1, 2],
                "downsample_version": Literal[1, 2, 3],
                "channel_schedule": ChannelSchedule,
                "head": HeadKind,
                "norm": DecoderNorm,
                "dtype": ComputeDtype,
            },
        )
        stem = self.head == "bilinear" or self.patch_embed_version == 2
        check(self, "head", stem, "'bilinear' with patch_embed_version 1, which has no H/2 map")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each encoder stage."""
        return tuple(self.width * 2**i for i in range(NUM_STAGES))

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels of each decoder stage, finest first."""
        growth = 2 if self.channel_schedule == "progressive" else 1
        return tuple(self.decoder_width * growth**i for i in range(NUM_STAGES))


PRESETS: dict[str, ZZHNetConfig] = {
    "zzhnet_nano": ZZHNetConfig(
        width=16,
        depths=(1, 1, 2, 1),
        block=BlockConfig(ssm=SS2DConfig(ssm_ratio=1.0), mlp_ratio=2.0),
        drop_path_rate=0.05,
        decoder_width=24,
    ),
    "zzhnet_tiny": ZZHNetConfig(width=64, depths=(2, 2, 4, 2), decoder_width=64),
    "zzhnet_small": ZZHNetConfig(
        width=96, depths=(2, 2, 8, 2), drop_path_rate=0.3, decoder_width=96
    ),
    "zzhnet_base": ZZHNetConfig(
        width=128, depths=(2, 2, 15, 2), drop_path_rate=0.5, decoder_width=128
    ),
}
