"""Configuration and presets of the ChangeMamba networks."""

from dataclasses import dataclass, replace
from typing import Literal

from zzhnet_jax.models.vssm.config import (
    BlockConfig,
    SS2DConfig,
    VSSMConfig,
    check,
    check_choices,
)

Task = Literal["bcd", "scd", "bda"]
Arrangement = Literal["cat", "interleave", "split"]

ARRANGEMENTS: tuple[Arrangement, ...] = ("cat", "interleave", "split")


def _encoder(
    dim: int, stage3: int, drop_path: float, block: BlockConfig | None = None
) -> VSSMConfig:
    return VSSMConfig(
        depths=(2, 2, stage3, 2),
        dims=dim,
        drop_path_rate=drop_path,
        block=block or BlockConfig(),
    )


_TINY = _encoder(96, 4, 0.2)


@dataclass(frozen=True)
class ChangeMambaConfig:
    """A change network: VMamba encoder, change decoder and, by task, semantic decoders.

    Attributes:
      task: "bcd" finds changes; "scd" also names the land cover of both dates; "bda" finds the
        buildings before an event and grades their damage.
      encoder: the hierarchy; its blocks are also those of the decoders.
      separate_encoders: one set of encoder weights a date, for images of two sensors.
      arrangements: how the change decoder lays the two dates out for its scans: side by side in the
        channels, columns interleaved, or one image beside the other.
      scan_finest: VSSBlocks in the finest stage of the change decoder; without them it has
        BatchNorm and ReLU there.
      decoder_width: channels of the decoders.
      decoder_drop_path: rate of every block in the decoders.
      semantic_classes: land-cover classes (task "scd").
      damage_classes: damage levels with the background (task "bda").
    """

    task: Task = "bcd"
    encoder: VSSMConfig = _TINY
    separate_encoders: bool = False
    arrangements: tuple[Arrangement, ...] = ARRANGEMENTS
    scan_finest: bool = True
    decoder_width: int = 128
    decoder_drop_path: float = 0.1
    semantic_classes: int = 7
    damage_classes: int = 5

    def __post_init__(self) -> None:
        check_choices(self, {"task": Task})
        known = bool(self.arrangements) and set(self.arrangements) <= set(ARRANGEMENTS)
        check(self, "arrangements", known, "some of 'cat', 'interleave', 'split'")
        check(self, "decoder_width", self.decoder_width >= 1, "at least 1")
        check(self, "decoder_drop_path", 0 <= self.decoder_drop_path < 1, "in [0, 1)")
        check(self, "semantic_classes", self.semantic_classes >= 2, "at least 2")
        check(self, "damage_classes", self.damage_classes >= 2, "at least 2")


# The published "Tiny" figures are those of the mini encoder: with a gate, without MLPs.
_GATED = BlockConfig(ssm=SS2DConfig(gate="activated"), mlp_ratio=0.0)
_ENCODERS = {
    "mini": _encoder(96, 4, 0.2, _GATED),
    "tiny": _TINY,
    "small": _encoder(96, 15, 0.3),
    "base": _encoder(128, 15, 0.6),
}
_NETWORKS = {
    "mambabcd": ChangeMambaConfig(task="bcd"),
    "mambascd": ChangeMambaConfig(task="scd"),
    "mambabda": ChangeMambaConfig(task="bda"),
    "mambammbda": ChangeMambaConfig(
        task="bda",
        separate_encoders=True,
        arrangements=("cat",),
        scan_finest=False,
        damage_classes=4,
    ),
}

PRESETS: dict[str, ChangeMambaConfig] = {
    f"{network}_{size}": replace(config, encoder=encoder)
    for network, config in _NETWORKS.items()
    for size, encoder in _ENCODERS.items()
}
