"""Configurations of the VMamba hierarchy: typed fields, checked on construction."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from zzhnet_jax.errors import ConfigError

Activation = Literal["silu", "gelu", "relu", "sigmoid"]
NormKind = Literal["layer", "batch"]
Operator = Literal["selective", "xv1a", "xv2a", "xv3a", "ssd"]
Gate = Literal["activated", "linear", "none"]
OutputNorm = Literal["layer", "none", "dwconv3", "layer_dwconv3", "softmax", "sigmoid"]
ScanPattern = Literal["cross", "unidirectional", "bidirectional", "cascade"]
Initialization = Literal["mamba", "normal", "small_normal", "uniform"]
ComputeDtype = Literal["float32", "bfloat16"]


def check_choices(config: Any, choices: dict[str, Any]) -> None:
    """Raises ConfigError for the first field whose value its Literal type does not list."""
    for name, literal in choices.items():
        allowed = get_args(literal)
        if getattr(config, name) not in allowed:
            listing = ", ".join(repr(value) for value in allowed)
            raise ConfigError(name, getattr(config, name), f"one of {listing}")


def check(config: Any, name: str, valid: bool, allowed: str) -> None:
    """Raises ConfigError for field `name` unless `valid`."""
    if not valid:
        raise ConfigError(name, getattr(config, name), allowed)


@dataclass(frozen=True)
class SS2DConfig:
    """The 2-D selective scan operator.

    Attributes:
      operator: "selective" is Mamba's scan as VMamba's v0 .. v05 use it. "xv1a", "xv2a" and "xv3a"
        compute u, dt, B and C in one projection after the convolution (low-rank dt per pixel, full
        dt, low-rank dt per route). "ssd" is Mamba-2's scan with one decay per head; it has
        `dt_rank` heads a route.
      d_state: states a channel.
      ssm_ratio: inner width over d_model; 0 leaves the whole branch out of a VSSBlock.
      dt_rank: rank of the step-size projection; None is ceil(d_model / 16).
      d_conv: odd side of the depthwise convolution; 1 is no convolution.
      conv_bias: a bias in that convolution.
      projection_bias: a bias in the input and output projections.
      activation: after the convolution, and on the gate.
      gate: "activated" multiplies the output by act(z), "linear" by z, "none" has no z.
      output_norm: what is applied to the merged scan; "softmax" runs over the pixels of each
        channel.
      output_activation: what follows the output norm.
      multiply_input: multiplies the output by the projected input u (operators xv1a, xv2a, xv3a
        only).
      pattern: the order in which the four routes visit the pixels. "cascade" scans the rows, then
        the columns of the result.
      initialization: of A, D and the step sizes. "mamba": A = -(1..N), steps log-uniform in
        [dt_min, dt_max]. "normal": all of them normal; "small_normal": the same with the step
        sizes' 0.1 times; "uniform": A = -1, steps 0.1 times uniform.
      dt_min: smallest initial step.
      dt_max: largest initial step.
      dt_init_floor: initial steps are clamped below here.
      dt_scale: factor on the initial step-size projection.
      dt_init: step-size projection uniform within +-dt_rank^-0.5 or constant at it.
      dropout: on the output.
      scan_implementation: backend of the scan; None is the best for the platform.
    """

    operator: Operator = "selective"
    d_state: int = 1
    ssm_ratio: float = 2.0
    dt_rank: int | None = None
    d_conv: int = 3
    conv_bias: bool = False
    projection_bias: bool = False
    activation: Activation = "silu"
    gate: Gate = "none"
    output_norm: OutputNorm = "layer"
    output_activation: Literal["none", "gelu"] = "none"
    multiply_input: bool = False
    pattern: ScanPattern = "cross"
    initialization: Initialization = "mamba"
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    dt_scale: float = 1.0
    dt_init: Literal["random", "constant"] = "random"
    dropout: float = 0.0
    scan_implementation: str | None = None

    def __post_init__(self) -> None:
        check_choices(
            self,
            {
                "operator": Operator,
                "activation": Activation,
                "gate": Gate,
                "output_norm": OutputNorm,
                "output_activation": Literal["none", "gelu"],
                "pattern": ScanPattern,
                "initialization": Initialization,
                "dt_init": Literal["random", "constant"],
            },
        )
        check(self, "d_state", self.d_state >= 1, "at least 1")
        check(self, "ssm_ratio", self.ssm_ratio >= 0, "0 (no scan branch) or more")
        check(self, "dt_rank", self.dt_rank is None or self.dt_rank >= 1, "None or at least 1")
        check(self, "d_conv", self.d_conv >= 1 and self.d_conv % 2 == 1, "odd; 1 is no convolution")
        check(self, "dt_min", 0 < self.dt_min <= self.dt_max, "positive and at most dt_max")
        check(self, "dropout", 0 <= self.dropout < 1, "in [0, 1)")
        self._check_combination()

    def _check_combination(self) -> None:
        fused = self.operator.startswith("xv")
        if self.operator != "selective":
            check(self, "gate", self.gate == "none", f"'none' with operator {self.operator!r}")
            check(
                self, "pattern", self.pattern == "cross", f"'cross' with operator {self.operator!r}"
            )
        check(
            self, "multiply_input", fused or not self.multiply_input, "False unless operator is xv*"
        )
        if self.operator == "ssd":
            allowed = "'uniform', 'normal' or 'small_normal' with operator 'ssd'"
            check(self, "initialization", self.initialization != "mamba", allowed)

    def d_inner(self, d_model: int) -> int:
        """Width inside the operator."""
        return int(self.ssm_ratio * d_model)

    def rank(self, d_model: int) -> int:
        """Rank of the step-size projection (heads a route for operator "ssd")."""
        return self.dt_rank if self.dt_rank is not None else -(-d_model // 16)


@dataclass(frozen=True)
class BlockConfig:
    """A VSSBlock: scan branch and MLP branch, each with its norm and residual.

    Attributes:
      ssm: the scan operator; its branch is left out when `ssm.ssm_ratio` is 0.
      mlp_ratio: hidden width of the MLP over d_model; 0 leaves the MLP branch out.
      gated_mlp: half of the MLP's hidden units gate the other half.
      mlp_activation: activation of the MLP.
      mlp_dropout: dropout in the MLP.
      norm: kind of the norms.
      post_norm: norm after each branch instead of before it.
      remat: keep only the block's input for the backward pass and compute the rest again.
    """

    ssm: SS2DConfig = SS2DConfig()
    mlp_ratio: float = 4.0
    gated_mlp: bool = False
    mlp_activation: Activation = "gelu"
    mlp_dropout: float = 0.0
    norm: NormKind = "layer"
    post_norm: bool = False
    remat: bool = False

    def __post_init__(self) -> None:
        check_choices(self, {"mlp_activation": Activation, "norm": NormKind})
        check(self, "mlp_ratio", self.mlp_ratio >= 0, "0 (no MLP branch) or more")
        check(self, "mlp_dropout", 0 <= self.mlp_dropout < 1, "in [0, 1)")


@dataclass(frozen=True)
class VSSMConfig:
    """The four-stage (or any number of stages) hierarchy.

    Attributes:
      depths: blocks in each stage.
      dims: width of each stage; an integer is the first one's and doubles from stage to stage.
      in_chans: bands of the image.
      patch_size: pixels a side that one token of the first stage covers.
      patch_norm: norms in the patch embedding.
      patch_embed_version: 1 is one strided convolution, 2 is two with GELU between.
      downsample_version: between stages; 1 merges 2x2 patches, 2 is a 2x2 and 3 a 3x3 convolution
        of stride 2.
      drop_path_rate: of the last block; grows linearly from 0 at the first.
      position_embedding: adds a learned map after the patch embedding, for images of `image_size`.
      image_size: side of the image; used by the position embedding alone.
      block: every block of the hierarchy; its norm is that of the whole hierarchy.
      dtype: compute type; parameters are float32 and scans run in float32 in any case.
    """

    depths: tuple[int, ...] = (2, 2, 5, 2)
    dims: int | tuple[int, ...] = 96
    in_chans: int = 3
    patch_size: int = 4
    patch_norm: bool = True
    patch_embed_version: Literal[1, 2] = 2
    downsample_version: Literal[1, 2, 3] = 3
    drop_path_rate: float = 0.2
    position_embedding: bool = False
    image_size: int = 224
    block: BlockConfig = BlockConfig()
    dtype: ComputeDtype = "float32"

    def __post_init__(self) -> None:
        check_choices(
            self,
            {
                "patch_embed_version": Literal[1, 2],
                "downsample_version": Literal[1, 2, 3],
                "dtype": ComputeDtype,
            },
        )
        check(self, "depths", all(d >= 0 for d in self.depths) and bool(self.depths), "not empty")
        if not isinstance(self.dims, int):
            stages = len(self.depths)
            check(self, "dims", len(self.dims) == stages, f"one width or {stages}, one a stage")
        check(self, "in_chans", self.in_chans >= 1, "at least 1")
        check(self, "drop_path_rate", 0 <= self.drop_path_rate < 1, "in [0, 1)")
        if self.patch_embed_version == 2:
            even = self.patch_size >= 2 and self.patch_size % 2 == 0
            check(self, "patch_size", even, "even with patch_embed_version 2")
        check(self, "patch_size", self.patch_size >= 1, "at least 1")

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of every stage."""
        if isinstance(self.dims, int):
            return tuple(self.dims * 2**i for i in range(len(self.depths)))
        return self.dims

    @property
    def drop_path_rates(self) -> tuple[tuple[float, ...], ...]:
        """Drop path rate of every block, by stage: linear from 0 to `drop_path_rate`."""
        total = sum(self.depths)
        rates = [self.drop_path_rate * i / max(total - 1, 1) for i in range(total)]
        starts = [sum(self.depths[:i]) for i in range(len(self.depths))]
        return tuple(
            tuple(rates[start : start + depth])
            for start, depth in zip(starts, self.depths, strict=True)
        )


def _published(dim: int, stage3: int, ratio: float, drop_path: float) -> VSSMConfig:
    block = BlockConfig(ssm=SS2DConfig(ssm_ratio=ratio))
    return VSSMConfig(depths=(2, 2, stage3, 2), dims=dim, drop_path_rate=drop_path, block=block)


def _vanilla(dim: int, stage3: int, drop_path: float) -> VSSMConfig:
    ssm = SS2DConfig(d_state=16, gate="activated", conv_bias=True)
    return VSSMConfig(
        depths=(2, 2, stage3, 2),
        dims=dim,
        patch_embed_version=1,
        downsample_version=1,
        drop_path_rate=drop_path,
        block=BlockConfig(ssm=ssm, mlp_ratio=0.0),
    )


def _mamba2(dim: int, stage3: int, drop_path: float) -> VSSMConfig:
    ssm = SS2DConfig(
        operator="ssd", d_state=64, ssm_ratio=1.0, activation="gelu", initialization="uniform"
    )
    return VSSMConfig(
        depths=(2, 2, stage3, 2),
        dims=dim,
        drop_path_rate=drop_path,
        block=BlockConfig(ssm=ssm),
    )


# The published versions: s<ssm_ratio>l<blocks in the third stage>, the first one, and Mamba-2's.
PRESETS: dict[str, VSSMConfig] = {
    "vmamba_tiny_s2l5": _published(96, 5, 2.0, 0.2),
    "vmamba_tiny_s1l8": _published(96, 8, 1.0, 0.2),
    "vmamba_tiny_vanilla": _vanilla(96, 9, 0.2),
    "vmamba_tiny_m2": _mamba2(96, 4, 0.2),
    "vmamba_small_s2l15": _published(96, 15, 2.0, 0.3),
    "vmamba_small_s1l20": _published(96, 20, 1.0, 0.3),
    "vmamba_small_vanilla": _vanilla(96, 27, 0.3),
    "vmamba_small_m2": _mamba2(96, 12, 0.3),
    "vmamba_base_s2l15": _published(128, 15, 2.0, 0.6),
    "vmamba_base_s1l20": _published(128, 20, 1.0, 0.5),
    "vmamba_base_vanilla": _vanilla(128, 27, 0.6),
    "vmamba_base_m2": _mamba2(128, 12, 0.3),
}
