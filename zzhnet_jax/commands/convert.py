"""`zzhnet convert`: PyTorch checkpoints to models of this package, and back; needs no PyTorch."""

import hashlib
import json as jsonlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from zzhnet_jax.conversion.adapt import Adaptation
from zzhnet_jax.conversion.convert import convert_checkpoint, to_torch_state_dict
from zzhnet_jax.conversion.detect import Naming
from zzhnet_jax.conversion.torch_checkpoint import load_torch_state_dict
from zzhnet_jax.conversion.torch_write import save_torch_state_dict
from zzhnet_jax.errors import ConfigError, ConversionError
from zzhnet_jax.models.io import load_model
from zzhnet_jax.models.weights import Format

from .arguments import Switch, option, parse


@dataclass(frozen=True, kw_only=True)
class ConvertArguments:
    """Converts a VMamba or ChangeMamba checkpoint (.pth, .pt, .safetensors), or writes one.

    The network is recognised from the tensors. Every tensor must have its place and every parameter
    its tensor; what does not fit is listed and nothing is written. The result is a folder that
    `zzhnet predict`, `zzhnet evaluate` and `load_model` read, with a report of where each tensor
    went (conversion.md, conversion.json). Nothing in the checkpoint is executed.

    Attributes:
      source: the checkpoint; with --to torch a folder with a saved model, or a run folder.
      output: folder to write; with --to torch a file that ends in .pth, .pt or .safetensors.
      model: name of the network (`zzhnet models` lists them); unless given, found from the tensors.
      to: what to make: a model of this package, or a checkpoint for the PyTorch originals.
      naming: parameter names to write with --to torch: ChangeMamba's of today (new) or MambaCD's
        (old).
      strict: let nothing be missing, unexpected or of another shape; this is the default.
      allow: names of PyTorch tensors for which that is allowed, as shell patterns ("main_clf.*").
      verify: read the result back and compare a checksum of every tensor.
      entry: entry of the file that holds the weights, such as model_ema, if there are several.
      adapt: make tensors of another network fit: encoder (a classifier's layers start a change
        network), head (another number of classes), stem (another number of bands), position
        (another image size, for networks with a position embedding).
      num_classes: classes of the main output; unless given, those of the checkpoint.
      forward_type: the original's string for the scan operator, such as v052d_noz, for what no
        tensor shows; unless given, as in the preset.
      in_chans: bands of the images; unless given, those of the checkpoint.
      image_size: side of the images, for networks with a position embedding.
      weights: how to keep the weights: one safetensors file, or an Orbax folder, which many devices
        read in parts.
      json: print the report as one JSON object.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="IN")]
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="OUT")]
    model: Annotated[str | None, option("NAME")] = None
    to: Literal["jax", "torch"] = "jax"
    naming: Naming = "new"
    strict: Switch = False
    allow: Annotated[tuple[str, ...], option("PATTERN ...")] = ()
    verify: Switch = False
    entry: Annotated[str | None, option("NAME")] = None
    adapt: Annotated[tuple[Adaptation, ...], option("KIND ...")] = ()
    num_classes: Annotated[int | None, option("N")] = None
    forward_type: Annotated[str | None, option("TEXT")] = None
    in_chans: Annotated[int | None, option("N")] = None
    image_size: Annotated[int | None, option("PIXELS")] = None
    weights: Format = "safetensors"
    json: Switch = False

    def __post_init__(self) -> None:
        if self.strict and self.allow:
            raise ConfigError("allow", " ".join(self.allow), "left out together with --strict")


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    arguments = parse(ConvertArguments, argv, prog="zzhnet convert")
    result = _to_torch(arguments) if arguments.to == "torch" else _to_jax(arguments)
    print(jsonlib.dumps(result) if arguments.json else result["summary"])
    return 0


def _to_jax(arguments: ConvertArguments) -> dict[str, Any]:
    """Converts, and gives the report as JSON has it."""
    fields = {"in_chans": arguments.in_chans, "image_size": arguments.image_size}
    report = convert_checkpoint(
        arguments.source,
        arguments.output,
        model=arguments.model,
        allow=arguments.allow,
        entry=arguments.entry,
        num_classes=arguments.num_classes,
        forward_type=arguments.forward_type,
        overrides={name: value for name, value in fields.items() if value is not None},
        adaptations=arguments.adapt,
        verify=arguments.verify,
        weights_format=arguments.weights,
    )
    lines = [report.summary(), *(f"  {decision}" for decision in report.decisions)]
    lines += [f"  adapted: {change}" for change in report.adapted]
    lines.append(f"model and report are in {arguments.output}")
    return {"summary": "\n".join(lines), **report.to_dict()}


def _to_torch(arguments: ConvertArguments) -> dict[str, Any]:
    """Writes the originals' checkpoint, and reads it back if asked to."""
    state_dict = to_torch_state_dict(load_model(arguments.source), naming=arguments.naming)
    save_torch_state_dict(state_dict, arguments.output)
    checked = ""
    if arguments.verify:
        _compare(state_dict, arguments.output)
        checked = f", {len(state_dict)} checksums equal"
    values = sum(array.size for array in state_dict.values())
    summary = f"{arguments.source} -> {arguments.output}: {len(state_dict)} tensors"
    return {
        "summary": f"{summary}, {values:,} values, {arguments.naming} names{checked}",
        "tensors": {name: list(array.shape) for name, array in state_dict.items()},
    }


def _compare(state_dict: dict[str, np.ndarray], path: Path) -> None:
    """Reads a file back and compares it with what was to be written, by checksums."""
    written = load_torch_state_dict(path)
    for name, array in state_dict.items():
        if _checksum(written[name]) != _checksum(array):
            raise ConversionError(f"{path}: {name} was not written as it is; write the file again")


def _checksum(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()
