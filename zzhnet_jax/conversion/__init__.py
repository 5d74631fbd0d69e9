"""Weights from PyTorch and back, without PyTorch: VMamba's and ChangeMamba's checkpoints."""

from zzhnet_jax.conversion.convert import convert_checkpoint, to_torch_state_dict
from zzhnet_jax.conversion.report import ConversionReport
from zzhnet_jax.conversion.torch_checkpoint import load_torch_state_dict
from zzhnet_jax.conversion.torch_write import save_torch_state_dict

__all__ = [
    "ConversionReport",
    "convert_checkpoint",
    "load_torch_state_dict",
    "save_torch_state_dict",
    "to_torch_state_dict",
]
