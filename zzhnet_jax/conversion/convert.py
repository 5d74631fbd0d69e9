"""PyTorch checkpoints to models of this package, and back."""

import dataclasses
import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from zzhnet_jax.conversion import adapt, detect, rules
from zzhnet_jax.conversion.adapt import Adaptation
from zzhnet_jax.conversion.detect import Detection, Naming
from zzhnet_jax.conversion.report import ConversionReport
from zzhnet_jax.conversion.rules import Matching
from zzhnet_jax.conversion.torch_checkpoint import load_torch_state_dict
from zzhnet_jax.errors import ConversionError
from zzhnet_jax.models import functional, registry
from zzhnet_jax.models.io import load_model, save_model
from zzhnet_jax.models.weights import Format


def convert_checkpoint(
    path: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    strict: bool = True,
    allow: Sequence[str] = (),
    entry: str | None = None,
    num_classes: int | None = None,
    forward_type: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    adaptations: Collection[Adaptation] = (),
    verify: bool = False,
    weights_format: Format = "safetensors",
) -> ConversionReport:
    """Converts a VMamba or ChangeMamba checkpoint to a folder that `load_model` reads.

    Nothing is written unless every tensor has its place and every parameter its tensor, up to what
    `allow` or `strict` excuse. Needs no PyTorch.

    Args:
      path: a `.pth`, `.pt` or `.safetensors` file; see `load_torch_state_dict`.
      out: the folder to write: weights, config, and the report as `conversion.md` and
        `conversion.json`.
      model: name of the network; found from the tensors' names and shapes if None, and then the
        preset's fields are set as the shapes have them.
      strict: False lets any tensor be missing, unexpected or of another shape; what is missing
        keeps its initial value. The report lists them.
      allow: shell patterns of PyTorch names for which that is allowed, such as "main_clf.*".
      entry: which entry of the file holds the weights, such as "model_ema".
      num_classes: classes of the main output; as the checkpoint has them if None.
      forward_type: the original's string for the scan operator, in the dialect of the network's
        family; settles what no tensor shows. As in the preset if None.
      overrides: fields of the hierarchy's `VSSMConfig` to set, nested as it is.
      adaptations: changes that make tensors of another network fit; see `Adaptation`.
      verify: reads the result back and compares a checksum of every tensor with the source.
      weights_format: as in `save_model`.

    Returns:
      What was placed where, and how that was decided.

    Raises:
      ConversionError: the file cannot be read, the network is not recognised, or tensors do not
        fit.
      ConfigError: there is no such network or field.
      CheckpointError: the result cannot be written.
    """
    path = Path(path)
    source = _Source(load_torch_state_dict(path, entry=entry), tuple(allow) if strict else ("*",))
    try:
        if "encoder" in adaptations:
            source, num_classes = _encoder_only(source, model), num_classes or 2
        detection = detect.detect(
            source.shapes,
            model=model,
            num_classes=num_classes,
            forward_type=forward_type,
            overrides=overrides,
        )
        target = _Target(detection)
        source = _adapted(source, target, adaptations)
        network, matching = target.fill(source)
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from error
    save_model(network, out, weights_format=weights_format)
    del network
    report = ConversionReport(
        source=str(path),
        sha256=_sha256(path),
        model=detection.model,
        overrides=detection.overrides,
        num_classes=detection.num_classes,
        naming=detection.naming,
        decisions=detection.decisions,
        matching=matching,
        dtypes={name: str(array.dtype) for name, array in source.state_dict.items()},
        adapted=source.changes,
        allowed=source.allowed,
        checksums=_verify(source, target, matching, out) if verify else {},
    )
    report.write(Path(out))
    return report


def to_torch_state_dict(model: Any, naming: Naming = "new") -> dict[str, np.ndarray]:
    """The state dict that a network's PyTorch original loads.

    Args:
      model: a network of the VMamba or ChangeMamba families, made, loaded or converted.
      naming: "new" for ChangeMamba as it is, "old" for MambaCD before it; VMamba has one naming.

    Returns:
      PyTorch name -> array, float32 except for counters (int64).

    Raises:
      ConversionError: the network has no PyTorch original.
    """
    family = detect.family_of(model.card.name)
    _, params, stats = functional.split(model)
    return rules.to_state_dict(params, stats, family.rules(model.config, naming))


@dataclasses.dataclass(frozen=True)
class _Source:
    """A checkpoint's tensors, the names that need not fit, and what was changed on request."""

    state_dict: Mapping[str, np.ndarray]
    allowed: tuple[str, ...]
    changes: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """PyTorch name -> shape."""
        return {name: array.shape for name, array in self.state_dict.items()}


class _Target:
    """The network that a checkpoint is for, before it has weights."""

    def __init__(self, detection: Detection) -> None:
        self.detection = detection
        self.rules = detection.family.rules(detection.config, detection.naming)
        self.graphdef, *self.template = functional.abstract(self.build)

    def build(self, rngs: nnx.Rngs) -> Any:
        """The network with initial weights."""
        found = self.detection
        return registry.build(found.model, found.config, found.num_classes, rngs=rngs)

    def match(self, source: _Source) -> Matching:
        """Lays the checkpoint against the network."""
        leaves = [item for tree in self.template for item in rules.flatten(tree).items()]
        shapes = {rules.join(path): tuple(leaf.shape) for path, leaf in leaves}
        return rules.match(source.state_dict, shapes, self.rules)

    def fill(self, source: _Source) -> tuple[Any, Matching]:
        """The network with the checkpoint's weights.

        Initial weights are computed only if some may stay.
        """
        matching = self.match(source)
        template = self.template
        if source.allowed and (matching.missing or matching.mismatched):
            _, *template = functional.split(self.build(nnx.Rngs(0)))
        params, stats, matching = rules.from_state_dict(
            source.state_dict, (template[0], template[1]), self.rules, allow=source.allowed
        )
        return functional.merge(self.graphdef, params, stats), matching


def _encoder_only(source: _Source, model: str | None) -> _Source:
    """A classifier's hierarchy as the encoders of the named network."""
    if model is None:
        raise ConversionError("adapting the encoder needs the network's name; give it")
    encoders = detect.family_of(model).encoders
    return _Source(
        adapt.into_encoders(source.state_dict, encoders),
        (*source.allowed, "decoder*", "main_clf*", "aux_clf*", "encoder*.outnorm*"),
        (f"the classifier's hierarchy goes into {' and '.join(encoders)}",),
    )


def _adapted(source: _Source, target: _Target, adaptations: Collection[Adaptation]) -> _Source:
    """The checkpoint with misfits adapted, as far as that was asked for."""
    misfits = {name: wanted for name, _, _, wanted in target.match(source).mismatched}
    state_dict, changes = adapt.fit(source.state_dict, misfits, adaptations)
    left_out = source.state_dict.keys() - state_dict.keys()
    return _Source(state_dict, (*source.allowed, *sorted(left_out)), (*source.changes, *changes))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(
    source: _Source, target: _Target, matching: Matching, out: str | Path
) -> dict[str, str]:
    """Compares every tensor placed with what the saved model gives back for it.

    Returns:
      PyTorch name -> SHA-256 of the tensor in the type in which the model keeps it.

    Raises:
      ConversionError: a tensor came back with other bits.
    """
    returned = to_torch_state_dict(load_model(out), naming=target.detection.naming)
    checksums = {}
    for place in matching.placements:
        back = returned.pop(rules.torch_name(place.path, target.rules)[0])
        given = source.state_dict[place.torch].astype(back.dtype)
        if back.ndim == 2 and given.shape[2:] == (1, 1):  # a linear layer stored as a convolution
            given = given[:, :, 0, 0]
        checksums[place.torch] = hashlib.sha256(given.tobytes()).hexdigest()
        same_bits = hashlib.sha256(back.tobytes()).hexdigest() == checksums[place.torch]
        if back.shape != given.shape or not same_bits:
            raise ConversionError(
                f"{out}: {place.torch} does not come back as it was; do not use this model"
            )
    return checksums
