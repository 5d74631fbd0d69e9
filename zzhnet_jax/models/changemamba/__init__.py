"""ChangeMamba: change detection, semantic change detection and building damage assessment."""

from zzhnet_jax.models.changemamba.config import PRESETS, ChangeMambaConfig
from zzhnet_jax.models.changemamba.networks import (
    BinaryChange,
    BuildingDamage,
    SemanticChange,
    build,
)

__all__ = [
    "PRESETS",
    "BinaryChange",
    "BuildingDamage",
    "ChangeMambaConfig",
    "SemanticChange",
    "build",
]
