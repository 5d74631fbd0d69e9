"""Parameter names of the VMamba hierarchy in PyTorch.

VMamba and ChangeMamba name everything alike except a depthwise output norm; both names are read,
`dialect` says which is written. Names that older checkpoints use are aliases.
"""

from typing import Literal

from zzhnet_jax.models.torch_names import Rule, Transform, under
from zzhnet_jax.models.vssm.config import BlockConfig, SS2DConfig, VSSMConfig

Dialect = Literal["vmamba", "changemamba"]

NORM = (
    Rule("weight", "scale"),
    Rule("bias", "bias"),
    Rule("running_mean", "mean"),
    Rule("running_var", "var"),
    Rule("num_batches_tracked", "count", Transform.COUNTER),
)
CONV = (Rule("weight", "kernel", Transform.CONV), Rule("bias", "bias"))
LINEAR = (Rule("weight", "kernel", Transform.LINEAR), Rule("bias", "bias"))
DEPTHWISE = (Rule("weight", "kernel", Transform.DEPTHWISE), Rule("bias", "bias"))


def ss2d_rules(config: SS2DConfig, dialect: Dialect = "vmamba") -> tuple[Rule, ...]:
    """Names inside an SS2D."""
    heads = config.operator == "ssd"
    per_channel = Transform.IDENTITY if heads else Transform.ROUTES
    return (
        *under(LINEAR, "in_proj."),
        *under(DEPTHWISE, "conv2d.1." if heads else "conv2d.", "conv."),
        Rule("x_proj_weight", "scan.x_proj", Transform.LAST_FIRST),
        Rule("dt_projs_weight", "scan.dt_proj", Transform.SWAP_LAST),
        Rule("dt_projs_bias", "scan.dt_bias"),
        Rule("A_logs", "scan.A_log", per_channel),
        Rule("Ds", "scan.D", per_channel),
        *_output_norm_rules(config, dialect),
        *under(LINEAR, "out_proj."),
    )


def _output_norm_rules(config: SS2DConfig, dialect: Dialect) -> tuple[Rule, ...]:
    if config.output_norm == "layer_dwconv3":
        norm = under(NORM, "out_norm.0.", "out_norm.norm.")
        return (*norm, *under(DEPTHWISE, "out_norm.2.", "out_norm.conv."))
    if config.output_norm == "dwconv3":
        names = ["out_norm.1.", "out_norm."]
        if dialect == "changemamba":
            names.reverse()
        return under(DEPTHWISE, names[0], "out_norm.conv.", aliases=names[1:])
    return under(NORM, "out_norm.", "out_norm.norm.")


def block_rules(config: BlockConfig, dialect: Dialect = "vmamba") -> tuple[Rule, ...]:
    """Names inside a VSSBlock."""
    return (
        *under(NORM, "norm.", aliases=("ln_1.",)),
        *under(ss2d_rules(config.ssm, dialect), "op.", aliases=("self_attention.",)),
        *under(NORM, "norm2."),
        *under(LINEAR, "mlp.fc1."),
        *under(LINEAR, "mlp.fc2."),
    )


def patch_embed_rules(version: Literal[1, 2]) -> tuple[Rule, ...]:
    """Names inside a patch embedding."""
    first = (
        *under(CONV, "0.", "convs.0.", aliases=("proj.",)),
        *under(NORM, "2.", "norms.0.", aliases=("norm.",)),
    )
    if version == 1:
        return first
    return (*first, *under(CONV, "5.", "convs.1."), *under(NORM, "7.", "norms.1."))


def downsample_rules(version: Literal[1, 2, 3]) -> tuple[Rule, ...]:
    """Names inside a downsampling layer."""
    if version == 1:
        return (*under(LINEAR, "reduction."), *under(NORM, "norm."))
    return (*under(CONV, "1.", "conv."), *under(NORM, "3.", "norm."))


def hierarchy_rules(config: VSSMConfig, dialect: Dialect = "vmamba") -> tuple[Rule, ...]:
    """Names that the classifier and the backbone share."""
    return (
        *under(patch_embed_rules(config.patch_embed_version), "patch_embed."),
        Rule("pos_embed", "pos_embed", Transform.IMAGE),
        *under(block_rules(config.block, dialect), "layers.{i}.blocks.{j}."),
        *under(downsample_rules(config.downsample_version), "layers.{i}.downsample."),
    )


def vssm_rules(config: VSSMConfig, dialect: Dialect = "vmamba") -> tuple[Rule, ...]:
    """Names of the classifier VSSM."""
    return (
        *hierarchy_rules(config, dialect),
        *under(NORM, "classifier.norm.", aliases=("norm.",)),
        *under(LINEAR, "classifier.head.", aliases=("head.",)),
    )


def backbone_rules(config: VSSMConfig, dialect: Dialect = "vmamba") -> tuple[Rule, ...]:
    """Names of the feature extractor Backbone."""
    return (*hierarchy_rules(config, dialect), *under(NORM, "outnorm{i}.", "out_norms.{i}."))
