"""ZZHNet, the project's own change network."""

from zzhnet_jax.models.zzhnet.config import PRESETS as PRESETS
from zzhnet_jax.models.zzhnet.config import ZZHNetConfig as ZZHNetConfig
from zzhnet_jax.models.zzhnet.zzhnet import ZZHNet as ZZHNet
