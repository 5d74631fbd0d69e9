"""Operations of matrix products and convolutions in a compiled program, two a multiply-add."""

import math
import re

import numpy as np

from .hlo_text import Instruction


def product_flops(instruction: Instruction, operands: list[Instruction]) -> float | None:
    """Operations of one instruction; None if it is neither a product nor a convolution.

    Args:
      instruction: of a compiled program.
      operands: the instructions whose results it takes.
    """
    if len(operands) < 2:
        return None
    if instruction.opcode == "dot":
        return _dot_flops(instruction, operands)
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, operands)
    if instruction.opcode == "custom-call" and "__cublas$" in instruction.attributes:
        return _dot_flops(instruction, operands)
    if instruction.opcode == "custom-call" and "__cudnn$conv" in instruction.attributes:
        return _library_convolution_flops(instruction, operands)
    return None


def _dot_flops(instruction: Instruction, operands: list[Instruction]) -> float:
    text = instruction.attributes
    dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", text)
    if dims is None:
        dims = re.search(r'"lhs_contracting_dimensions":\[([\d,"]*)\]', text)
    places = [int(place) for place in re.findall(r"\d+", dims[1])] if dims else []
    lhs = operands[0].arrays[0].dims
    return 2.0 * math.prod(instruction.arrays[0].dims) * math.prod(lhs[p] for p in places)


def _convolution_flops(instruction: Instruction, operands: list[Instruction]) -> float:
    """Two operations for each pair of a kernel's and an input's value that meet, padding left out.

    TPU programs write matrix products as convolutions, some with windows that mostly meet padding.
    """
    text = instruction.attributes
    lhs_labels, rhs_labels, out_labels = _labels(text)
    lhs, rhs = operands[0].arrays[0].dims, operands[1].arrays[0].dims
    out = instruction.arrays[0].dims
    window = _window(text, sum(label.isdigit() for label in out_labels))
    pairs = 1.0
    for axis in range(len(window["size"])):
        pairs *= _meetings(
            input_size=lhs[lhs_labels.index(str(axis))],
            output_size=out[out_labels.index(str(axis))],
            size=window["size"][axis],
            stride=window["stride"][axis],
            low=window["low"][axis],
            base_dilation=window["lhs_dilate"][axis],
            window_dilation=window["rhs_dilate"][axis],
        )
    channels = rhs[rhs_labels.index("i")]
    batch_groups = re.search(r"batch_group_count=(\d+)", text)
    others = out[out_labels.index("b")] * out[out_labels.index("f")]
    return 2.0 * pairs * channels * others / (int(batch_groups[1]) if batch_groups else 1)


def _meetings(
    *,
    input_size: int,
    output_size: int,
    size: int,
    stride: int,
    low: int,
    base_dilation: int,
    window_dilation: int,
) -> int:
    outputs = np.arange(output_size)[:, None] * stride - low
    places = outputs + np.arange(size)[None] * window_dilation
    inside = (places >= 0) & (places <= (input_size - 1) * base_dilation)
    return int(np.count_nonzero(inside & (places % base_dilation == 0)))


def _window(text: str, axes: int) -> dict[str, list[int]]:
    found = re.search(r"window=\{([^}]*)\}", text)
    fields = dict(part.split("=", 1) for part in found[1].split()) if found else {}

    def numbers(name: str, default: int) -> list[int]:
        value = fields.get(name)
        return [int(part) for part in value.split("x")] if value else [default] * axes

    pads = fields.get("pad", "x".join(["0_0"] * axes))
    return {
        "size": numbers("size", 1),
        "stride": numbers("stride", 1),
        "lhs_dilate": numbers("lhs_dilate", 1),
        "rhs_dilate": numbers("rhs_dilate", 1),
        "low": [int(pad.split("_")[0]) for pad in pads.split("x")] if axes else [],
    }


def _labels(text: str) -> tuple[str, str, str]:
    found = re.search(r"dim_labels=([a-z\d?]+)_([a-z\d?]+)->([a-z\d?]+)", text)
    return (found[1], found[2], found[3]) if found else ("bf", "io", "bf")


def _library_convolution_flops(instruction: Instruction, operands: list[Instruction]) -> float:
    """As `_convolution_flops` for cuDNN's three products, padding counted."""
    first, second = operands[0].arrays[0].dims, operands[1].arrays[0].dims
    result = instruction.arrays[0].dims
    if "BackwardInput" in instruction.attributes:
        images, kernel = first, second
    elif "BackwardFilter" in instruction.attributes:
        images, kernel = second, result
    else:
        images, kernel = result, second
    outputs = kernel[_labels(instruction.attributes)[1].index("o")]
    return 2.0 * math.prod(images) * math.prod(kernel) / outputs
