"""VMamba's constructor options, as its YAML files and scripts state them, read into our configs."""

from collections.abc import Mapping
from typing import Any, Literal

from zzhnet_jax.conversion.forward_type import parse, parse_initialization
from zzhnet_jax.errors import ConversionError
from zzhnet_jax.models.vssm.config import Activation, BlockConfig, NormKind, SS2DConfig, VSSMConfig
from zzhnet_jax.models.vssm.torch_names import Dialect

Options = Mapping[str, Any]

# ln2d and ln are one norm in two memory layouts.
_NORMS: dict[str, NormKind] = {"ln": "layer", "ln2d": "layer", "bn": "batch"}


def ss2d_config(
    *,
    forward_type: str,
    dialect: Dialect,
    d_state: int = 16,
    ssm_ratio: float = 2.0,
    dt_rank: int | str = "auto",
    act: Activation = "silu",
    d_conv: int = 3,
    conv_bias: bool = True,
    bias: bool = False,
    dropout: float = 0.0,
    initialize: Literal["v0", "v1", "v2"] = "v0",
) -> SS2DConfig:
    """The operator from the arguments of VMamba's SS2D, with their defaults.

    Raises:
      ConversionError: the original cannot run this `forward_type`.
      ConfigError: an option has a value that it cannot have.
    """
    operator = parse(forward_type, dialect=dialect).operator
    base = SS2DConfig(
        d_state=d_state,
        ssm_ratio=max(ssm_ratio, 0.0),
        dt_rank=None if dt_rank == "auto" else int(dt_rank),
        d_conv=max(d_conv, 1),
        conv_bias=conv_bias,
        projection_bias=bias,
        activation=act,
        dropout=dropout,
        initialization=parse_initialization(initialize, dialect=dialect, operator=operator),
    )
    return parse(forward_type, dialect=dialect, base=base)


def block_config(options: Options, dialect: Dialect) -> BlockConfig:
    """The blocks from `ssm_*`, `mlp_*`, `gmlp`, `forward_type`, `norm_layer` and `post_norm`.

    Raises:
      ConversionError: the original cannot run these options.
      ConfigError: an option has a value that it cannot have.
    """
    norm = options.get("norm_layer", "ln")
    if norm not in _NORMS:
        raise ConversionError(f"norm_layer = {norm!r}: VMamba has {', '.join(_NORMS)}")
    ssm = ss2d_config(
        forward_type=options.get("forward_type", "v2"),
        dialect=dialect,
        d_state=options.get("ssm_d_state", 16),
        ssm_ratio=options.get("ssm_ratio", 2.0),
        dt_rank=options.get("ssm_dt_rank", "auto"),
        act=options.get("ssm_act_layer", "silu"),
        d_conv=options.get("ssm_conv", 3),
        conv_bias=options.get("ssm_conv_bias", True),
        dropout=options.get("ssm_drop_rate", 0.0),
        initialize=options.get("ssm_init", "v0"),
    )
    return BlockConfig(
        ssm=ssm,
        mlp_ratio=max(options.get("mlp_ratio", 4.0), 0.0),
        gated_mlp=options.get("gmlp", False),
        mlp_activation=options.get("mlp_act_layer", "gelu"),
        mlp_dropout=options.get("mlp_drop_rate", 0.0),
        norm=_NORMS[norm],
        post_norm=options.get("post_norm", False),
        remat=options.get("use_checkpoint", False),
    )


def vssm_config(options: Options, dialect: Dialect) -> VSSMConfig:
    """The hierarchy from the options of VMamba's VSSM and of the encoders of ChangeMamba.

    Raises:
      ConversionError: the original cannot run these options.
      ConfigError: an option has a value that it cannot have.
    """
    dims = options.get("dims", 96)
    return VSSMConfig(
        depths=tuple(options.get("depths", (2, 2, 9, 2))),
        dims=dims if isinstance(dims, int) else tuple(dims),
        in_chans=options.get("in_chans", 3),
        patch_size=options.get("patch_size", 4),
        patch_norm=options.get("patch_norm", True),
        patch_embed_version=_version(options, "patchembed_version"),
        downsample_version=_version(options, "downsample_version"),
        drop_path_rate=options.get("drop_path_rate", 0.1),
        position_embedding=options.get("posembed", False),
        image_size=options.get("imgsize", 224),
        block=block_config(options, dialect),
    )


def _version(options: Options, name: str) -> Any:
    """Number of "v1", "v2", ...; with "none" the original builds and then fails when called."""
    text = options.get(name, "v2")
    if text not in ("v1", "v2", "v3"):
        raise ConversionError(f"{name} = {text!r}: only v1, v2 and v3 can run")
    return int(text[1:])
