"""The VMamba hierarchy: SS2D, VSSBlock, VSSM and Backbone."""

from zzhnet_jax.models.vssm.config import PRESETS, BlockConfig, SS2DConfig, VSSMConfig
from zzhnet_jax.models.vssm.ss2d import SS2D
from zzhnet_jax.models.vssm.vssm import VSSM, Backbone, VSSBlock, build

__all__ = [
    "PRESETS",
    "SS2D",
    "VSSM",
    "Backbone",
    "BlockConfig",
    "SS2DConfig",
    "VSSBlock",
    "VSSMConfig",
    "build",
]
