"""Parameter names of the ChangeMamba networks in PyTorch, the newer ones and those of MambaCD.

Both are read; `naming` says which are written.
"""

from collections.abc import Iterable
from typing import Literal

from zzhnet_jax.models.changemamba.config import ARRANGEMENTS, ChangeMambaConfig
from zzhnet_jax.models.torch_names import Rule, Transform, under
from zzhnet_jax.models.vssm.torch_names import CONV, NORM, backbone_rules, block_rules

Naming = Literal["new", "old"]

POINTWISE = (Rule("weight", "kernel", Transform.POINTWISE), Rule("bias", "bias"))
POINTWISE_NORM = (*under(POINTWISE, "0.", "conv."), *under(NORM, "1.", "norm."))
RESIDUAL = (
    *under(CONV, "conv1."),
    *under(NORM, "bn1.", "norm1."),
    *under(CONV, "conv2."),
    *under(NORM, "bn2.", "norm2."),
)


def _placed(
    rules: Iterable[Rule], new: str, old: str, path: str, naming: Naming
) -> tuple[Rule, ...]:
    """Rules under one of two names, with the other as alias."""
    written, other = (new, old) if naming == "new" else (old, new)
    return under(rules, written, path, aliases=(other,))


def change_decoder_rules(config: ChangeMambaConfig, naming: Naming) -> tuple[Rule, ...]:
    """Names inside a change decoder; the older ones count stages from the finest, from 1."""
    levels = len(config.encoder.depths)
    block = block_rules(config.encoder.block, "changemamba")
    branch = (
        *under(POINTWISE, "0.", "conv."),
        *under(block, "2.", "vss.block."),
        *under(NORM, "1.", "norm."),
    )
    rules: list[Rule] = []
    for i in range(levels):
        old, path = levels - i, f"stages.{i}."
        for j, name in enumerate(ARRANGEMENTS, start=1):
            new_name, old_name = f"stage_blocks.{i}.{name}.", f"st_block_{old}{j}."
            rules += _placed(branch, new_name, old_name, f"{path}branches.{name}.", naming)
        new_name, old_name = f"fuse_layers.{i}.", f"fuse_layer_{old}."
        rules += _placed(POINTWISE_NORM, new_name, old_name, f"{path}fuse.", naming)
        new_name, old_name = f"smooth_layers.{i - 1}.", f"smooth_layer_{old}."
        rules += _placed(RESIDUAL, new_name, old_name, f"{path}smooth.", naming) if i else ()
    return tuple(rules)


def semantic_decoder_rules(config: ChangeMambaConfig, naming: Naming) -> tuple[Rule, ...]:
    """Names inside a semantic decoder."""
    levels = len(config.encoder.depths)
    block = block_rules(config.encoder.block, "changemamba")
    rules: list[Rule] = []
    for i in range(levels):
        old, path = levels - i, f"stages.{i}."
        position = 1 if i else 2
        new_name = f"stage_blocks.{i}.{position}."
        old_name = f"st_block_{old}_semantic.{position}."
        rules += _placed(block, new_name, old_name, f"{path}vss.block.", naming)
        if i == 0:
            new_name, old_name = "stage_blocks.0.0.", f"st_block_{old}_semantic.0."
            rules += _placed(POINTWISE, new_name, old_name, f"{path}entry.", naming)
        else:
            new_name, old_name = f"transition_layers.{i - 1}.", f"trans_layer_{old}."
            rules += _placed(POINTWISE_NORM, new_name, old_name, f"{path}entry.", naming)
            new_name, old_name = f"smooth_layers.{i - 1}.", f"smooth_layer_{old}_semantic."
            rules += _placed(RESIDUAL, new_name, old_name, f"{path}smooth.", naming)
    new_name, old_name = f"smooth_layers.{levels - 1}.", "smooth_layer_0_semantic."
    return (*rules, *_placed(RESIDUAL, new_name, old_name, "smooth.", naming))


def _encoder_rules(config: ChangeMambaConfig) -> tuple[Rule, ...]:
    backbone = backbone_rules(config.encoder, "changemamba")
    if not config.separate_encoders:
        return under(backbone, "encoder.", "encoders.pre.")
    return (
        *under(backbone, "encoder_1.", "encoders.pre."),
        *under(backbone, "encoder_2.", "encoders.post."),
    )


def changemamba_rules(config: ChangeMambaConfig, naming: Naming = "new") -> tuple[Rule, ...]:
    """Names of the network of `config.task`."""
    change = change_decoder_rules(config, naming)
    semantic = semantic_decoder_rules(config, naming)
    encoder = _encoder_rules(config)
    if config.task == "bcd":
        return (
            *encoder,
            *under(change, "decoder."),
            *under(POINTWISE, "main_clf.", "head.conv."),
        )
    if config.task == "scd":
        return (
            *encoder,
            *under(change, "decoder_bcd.", "change_decoder."),
            *under(semantic, "decoder_T1.", "pre_decoder."),
            *under(semantic, "decoder_T2.", "post_decoder."),
            *under(POINTWISE, "main_clf_cd.", "change_head.conv."),
            *under(POINTWISE, "aux_clf.", "semantic_head.conv."),
        )
    return (
        *encoder,
        *under(semantic, "decoder_building.", "building_decoder."),
        *under(change, "decoder_damage.", "damage_decoder."),
        *under(POINTWISE, "main_clf.", "damage_head.conv."),
        *under(POINTWISE, "aux_clf.", "building_head.conv."),
    )
