"""Reads the structure of a VMamba hierarchy off the names and shapes of its PyTorch tensors.

Shapes settle nearly every field of `VSSMConfig`. What leaves no trace in them (which activation,
the order of the scan, an output norm without weights) has to come from a preset or from the user.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

from zzhnet_jax.errors import ConversionError

Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class AnyOf:
    """A field of which the tensors say only that it has one of these values; the first is usual."""

    values: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A ratio of two widths, of which the tensors show only the wide one, rounded down."""

    wide: int
    narrow: int

    @property
    def value(self) -> float:
        """The plain quotient."""
        return self.wide / self.narrow


_INVISIBLE = (
    "block.ssm.activation",
    "block.ssm.output_activation",
    "block.ssm.multiply_input",
    "block.ssm.pattern",
    "block.mlp_activation",
    "block.post_norm",
)


def differences(config: Any, structure: Mapping[str, Any]) -> dict[str, Any]:
    """The fields in which a config is not as the tensors say, with values that are.

    Args:
      config: a frozen dataclass, nested.
      structure: field -> value, `AnyOf`, `Ratio`, or a mapping for a nested dataclass.

    Returns:
      Overrides for `models.registry.override`; empty when the config fits.
    """
    found: dict[str, Any] = {}
    for name, value in structure.items():
        current = getattr(config, name)
        if isinstance(value, Mapping):
            if inner := differences(current, value):
                found[name] = inner
        elif isinstance(value, AnyOf):
            if current not in value.values:
                found[name] = value.values[0]
        elif isinstance(value, Ratio):
            if int(current * value.narrow) != value.wide:
                found[name] = value.value
        elif current != value:
            found[name] = value
    return found


def changed_fields(old: Any, new: Any, prefix: str = "") -> dict[str, Any]:
    """The fields, by dotted path, in which a config differs from another of its class."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(old):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if dataclasses.is_dataclass(before):
            found |= changed_fields(before, after, f"{prefix}{field.name}.")
        elif before != after:
            found[f"{prefix}{field.name}"] = after
    return found


def flat(overrides: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested overrides by dotted path."""
    paths: dict[str, Any] = {}
    for name, value in overrides.items():
        nested = isinstance(value, Mapping)
        paths |= flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return paths


def unseen(config: Any, structure: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a hierarchy that decide what it computes and that its tensors do not settle.

    Args:
      config: the hierarchy's config.
      structure: what the tensors say of it.

    Returns:
      Dotted path -> value in `config`.
    """
    open_fields = [path for path, value in flat(structure).items() if isinstance(value, AnyOf)]
    return {
        path: functools.reduce(getattr, path.split("."), config)
        for path in (*_INVISIBLE, *open_fields)
    }


def hierarchy(shapes: Shapes) -> dict[str, Any]:
    """The fields of `VSSMConfig` that the tensors settle, nested as the dataclass is.

    Args:
      shapes: PyTorch name -> shape, the names as seen from the hierarchy.

    Raises:
      ConversionError: there is no patch embedding or no block where they should be.
    """
    depths, block, width = _stages(shapes)
    widths = [width(stage) for stage in range(len(depths))]
    doubling = all(w == widths[0] * 2**i for i, w in enumerate(widths))
    fields: dict[str, Any] = {"depths": tuple(depths)}
    fields |= {"dims": widths[0] if doubling else tuple(widths)}
    fields |= _patch_embedding(shapes)
    reduction = shapes.get("layers.0.downsample.reduction.weight")
    convolution = shapes.get("layers.0.downsample.1.weight")
    if reduction is not None:
        fields["downsample_version"] = 1
    elif convolution is not None:
        fields["downsample_version"] = convolution[-1]
    fields["position_embedding"] = "pos_embed" in shapes
    if "pos_embed" in shapes:
        fields["image_size"] = shapes["pos_embed"][-1] * fields["patch_size"]
    return fields | {"block": vss_block(block, widths[0])}


def _stages(shapes: Shapes) -> tuple[list[int], dict[str, tuple[int, ...]], Any]:
    """Blocks in each stage, the first block's tensors, and a function to each stage's width."""
    pattern = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.(.+)")
    last: dict[int, int] = {}
    first: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if found := pattern.fullmatch(name):
            stage, index = int(found[1]), int(found[2])
            last[stage] = max(last.get(stage, 0), index)
            if index == 0:
                first.setdefault(stage, {})[canonical(found[3])] = shape
    if sorted(last) != list(range(len(last))) or not last or sorted(first) != sorted(last):
        raise ConversionError("layers.*.blocks.* are missing or not numbered from 0")

    def width(stage: int) -> int:
        norm = first[stage].get("norm.weight", first[stage].get("norm2.weight"))
        if norm is None:
            raise ConversionError(f"layers.{stage}.blocks.0.norm.weight is missing")
        return norm[0]

    return [last[stage] + 1 for stage in sorted(last)], first[0], width


def canonical(name: str) -> str:
    """A name inside a block, with the first releases' names replaced by today's."""
    return name.replace("ln_1.", "norm.").replace("self_attention.", "op.")


def _patch_embedding(shapes: Shapes) -> dict[str, Any]:
    first = shapes.get("patch_embed.0.weight", shapes.get("patch_embed.proj.weight"))
    if first is None or len(first) != 4:
        raise ConversionError("patch_embed.0.weight is missing or no convolution")
    version = 2 if "patch_embed.5.weight" in shapes else 1
    return {
        "in_chans": first[1],
        "patch_embed_version": version,
        "patch_size": first[-1] if version == 1 else 2 * (first[-1] - 1),
        "patch_norm": "patch_embed.2.weight" in shapes or "patch_embed.norm.weight" in shapes,
    }


def vss_block(shapes: Shapes, d_model: int) -> dict[str, Any]:
    """The fields of `BlockConfig` that a block's tensors settle; names as seen from the block."""
    fields: dict[str, Any] = {
        "norm": "batch" if {"norm.running_mean", "norm2.running_mean"} & shapes.keys() else "layer"
    }
    fc1, fc2 = shapes.get("mlp.fc1.weight"), shapes.get("mlp.fc2.weight")
    if fc1 is None or fc2 is None:
        fields["mlp_ratio"] = 0.0
    else:
        fields |= {"mlp_ratio": Ratio(fc2[1], d_model), "gated_mlp": fc1[0] == 2 * fc2[1]}
    inside = {name[3:]: shape for name, shape in shapes.items() if name.startswith("op.")}
    return fields | {"ssm": _ss2d(inside, d_model) if inside else {"ssm_ratio": 0.0}}


def _ss2d(shapes: Shapes, d_model: int) -> dict[str, Any]:
    """The fields of `SS2DConfig` that an operator's tensors settle."""
    try:
        d_inner = shapes["out_proj.weight"][1]
        rows = shapes["in_proj.weight"][0]
        fields: dict[str, Any] = {"ssm_ratio": Ratio(d_inner, d_model)}
        fields |= {"projection_bias": "in_proj.bias" in shapes}
        convolution = shapes.get("conv2d.weight", shapes.get("conv2d.1.weight"))
        fields["d_conv"] = 1 if convolution is None else convolution[-1]
        fields["conv_bias"] = bool({"conv2d.bias", "conv2d.1.bias"} & shapes.keys())
        if "x_proj_weight" not in shapes:
            operator, rank = _fused(shapes, d_inner, rows)
            d_state = shapes["A_logs"][1]
        elif len(shapes["Ds"]) == 3:
            operator, rank = "ssd", shapes["A_logs"][1]
            d_state = (shapes["x_proj_weight"][1] - rank) // 2
        else:
            operator, rank = "selective", shapes["dt_projs_weight"][2]
            d_state = shapes["A_logs"][1]
    except (KeyError, IndexError) as error:
        raise ConversionError(f"the scan operator cannot be read: {error} is missing") from error
    fields |= {"operator": operator, "d_state": d_state}
    fields["dt_rank"] = None if rank is None or rank == -(-d_model // 16) else rank
    if operator in ("selective", "ssd"):
        gated = rows == 2 * d_inner
        fields["gate"] = AnyOf(("activated", "linear")) if gated else "none"
    return fields | _output_norm(shapes)


def _fused(shapes: Shapes, d_inner: int, rows: int) -> tuple[str, int | None]:
    """Which of the operators with one projection for u, dt, B and C this is, and its step rank."""
    if "dt_projs_weight" not in shapes:
        return "xv2a", None
    rank = shapes["dt_projs_weight"][2]
    steps = rows - d_inner - 8 * shapes["A_logs"][1]
    return ("xv1a" if steps == rank else "xv3a"), rank


def _output_norm(shapes: Shapes) -> dict[str, Any]:
    if "out_norm.2.weight" in shapes:
        return {"output_norm": "layer_dwconv3"}
    weight = shapes.get("out_norm.weight", shapes.get("out_norm.1.weight"))
    if weight is None:
        return {"output_norm": AnyOf(("none", "softmax", "sigmoid"))}
    return {"output_norm": "layer" if len(weight) == 1 else "dwconv3"}
