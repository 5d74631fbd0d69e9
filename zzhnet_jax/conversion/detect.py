"""Recognises a network by the names and shapes of its PyTorch tensors, and says how."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

from zzhnet_jax.conversion import structure
from zzhnet_jax.conversion.forward_type import parse
from zzhnet_jax.conversion.structure import Shapes
from zzhnet_jax.errors import ConversionError
from zzhnet_jax.models import registry
from zzhnet_jax.models.changemamba.config import ARRANGEMENTS
from zzhnet_jax.models.changemamba.torch_names import changemamba_rules
from zzhnet_jax.models.torch_names import Rule
from zzhnet_jax.models.vssm.config import VSSMConfig
from zzhnet_jax.models.vssm.torch_names import Dialect, vssm_rules

Naming = Literal["new", "old"]
"""Whose parameter names: ChangeMamba's of today, or those of its first releases (MambaCD)."""


@dataclasses.dataclass(frozen=True)
class TorchFamily:
    """Networks of one kind, as PyTorch checkpoints show them.

    Attributes:
      prefix: how the names of their presets begin.
      title: what they are.
      marker: beginnings of tensor names that no family further down has.
      head: the last layer of the output whose classes are `num_classes`, under any of its names.
      dialect: whose `forward_type` strings they use.
      encoders: names of the hierarchies in them; "" is the network itself.
      field: where in their config the hierarchy's stands; "" is the config itself.
      others: config fields that are lengths in other tensors: field -> tensor and axis.
    """

    prefix: str
    title: str
    marker: tuple[str, ...]
    head: tuple[str, ...]
    dialect: Dialect = "changemamba"
    encoders: tuple[str, ...] = ("encoder",)
    field: str = "encoder"
    others: Mapping[str, tuple[str, int]] = dataclasses.field(default_factory=dict)

    def presets(self) -> tuple[str, ...]:
        """Names of their presets."""
        return tuple(name for name in registry.list_models() if name.startswith(self.prefix + "_"))

    def hierarchy(self, config: Any) -> VSSMConfig:
        """The hierarchy's part of their config."""
        return getattr(config, self.field) if self.field else config

    def rules(self, config: Any, naming: Naming) -> tuple[Rule, ...]:
        """Their parameter names in PyTorch."""
        return changemamba_rules(config, naming) if self.field else vssm_rules(config)

    def hierarchy_structure(self, shapes: Shapes) -> dict[str, Any]:
        """The fields of the hierarchy's config that the tensors settle."""
        prefix = f"{self.encoders[0]}." if self.encoders[0] else ""
        inside = {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}
        return structure.hierarchy(inside)

    def structure(self, shapes: Shapes) -> dict[str, Any]:
        """The fields of the whole config that the tensors settle."""
        inner = self.hierarchy_structure(shapes)
        lengths = {f: shapes[t][i] for f, (t, i) in self.others.items() if t in shapes}
        return {self.field: inner, **_branches(shapes), **lengths} if self.field else inner


_NEW_BRANCH = re.compile(r"decoder\w*\.stage_blocks\.(\d+)\.([a-z]+)\.(\d)\.")
_OLD_BRANCH = re.compile(r"decoder\w*\.st_block_(\d)([123])\.(\d)\.")


def _branches(shapes: Shapes) -> dict[str, Any]:
    """What the names in a change decoder say of its branches.

    Today's names count the stages from the coarsest, 0; the old ones from the finest, 1, and number
    the arrangements.
    """
    new = [found.groups() for found in map(_NEW_BRANCH.match, shapes) if found]
    old = [found.groups() for found in map(_OLD_BRANCH.match, shapes) if found]
    names = {name for _, name, _ in new} | {ARRANGEMENTS[int(name) - 1] for _, name, _ in old}
    finest = max((int(stage) for stage, _, _ in new), default=0)
    return {
        "arrangements": tuple(name for name in ARRANGEMENTS if name in names),
        "scan_finest": any(int(stage) == finest and part == "2" for stage, _, part in new)
        or any(stage == "1" and part == "2" for stage, _, part in old),
    }


_CLASSIFIER = "main_clf.weight"
FAMILIES = (
    TorchFamily(
        prefix="mambammbda",
        title="a multimodal MambaBDA",
        marker=("encoder_1.",),
        head=("aux_clf.weight",),
        encoders=("encoder_1", "encoder_2"),
        others={"decoder_width": (_CLASSIFIER, 1), "damage_classes": (_CLASSIFIER, 0)},
    ),
    TorchFamily(
        prefix="mambabda",
        title="a MambaBDA",
        marker=("decoder_damage.",),
        head=("aux_clf.weight",),
        others={"decoder_width": (_CLASSIFIER, 1), "damage_classes": (_CLASSIFIER, 0)},
    ),
    TorchFamily(
        prefix="mambascd",
        title="a MambaSCD",
        marker=("decoder_bcd.",),
        head=("main_clf_cd.weight",),
        others={"decoder_width": ("aux_clf.weight", 1), "semantic_classes": ("aux_clf.weight", 0)},
    ),
    TorchFamily(
        prefix="mambabcd",
        title="a MambaBCD",
        marker=("decoder.",),
        head=(_CLASSIFIER,),
        others={"decoder_width": (_CLASSIFIER, 1)},
    ),
    TorchFamily(
        prefix="vmamba",
        title="a VMamba classifier",
        marker=("classifier.", "head."),
        head=("classifier.head.weight", "head.weight"),
        dialect="vmamba",
        encoders=("",),
        field="",
    ),
)


@dataclasses.dataclass(frozen=True)
class Detection:
    """The network that a checkpoint is for.

    Attributes:
      family: the kind of network.
      model: its preset's name.
      config: its resolved config.
      overrides: dotted fields in which that differs from the preset.
      num_classes: of the main output.
      naming: of the checkpoint's tensors.
      decisions: how all this was settled, a sentence each.
    """

    family: TorchFamily
    model: str
    config: Any
    overrides: Mapping[str, Any]
    num_classes: int
    naming: Naming
    decisions: tuple[str, ...]


def family_of(model: str) -> TorchFamily:
    """The family of a preset.

    Raises:
      ConfigError: there is no such network.
      ConversionError: the network has no PyTorch original.
    """
    registry.preset(model)
    for family in FAMILIES:
        if model.startswith(f"{family.prefix}_"):
            return family
    known = ", ".join(f"{family.prefix}_*" for family in FAMILIES)
    raise ConversionError(f"{model} has no PyTorch original; networks that have one are {known}")


def detect(
    shapes: Shapes,
    *,
    model: str | None = None,
    num_classes: int | None = None,
    forward_type: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Detection:
    """Finds the network that tensors of these names and shapes belong to.

    Args:
      shapes: PyTorch name -> shape.
      model: the network's name, if known: then its preset holds.
      num_classes: classes of the main output, if not those of the last layer.
      forward_type: the original's string for the scan operator, if not as in the preset.
      overrides: fields of the hierarchy's config to set.

    Raises:
      ConversionError: no network has such tensors, or the original cannot run the string.
      ConfigError: no such network or field.
    """
    if model is None:
        family, why = _recognise(shapes)
        model, config, how = _nearest_preset(family, shapes)
        decisions = [why, *how]
    else:
        family, config = family_of(model), registry.preset(model)
        decisions = [f"{model}: as asked for"]
    inner = registry.override(family.hierarchy(config), overrides or {}, path=model)
    if forward_type is not None:
        ssm = parse(forward_type, dialect=family.dialect, base=inner.block.ssm)
        inner = registry.override(inner, {"block": {"ssm": dataclasses.asdict(ssm)}}, path=model)
        decisions.append(f"forward_type {forward_type} as {family.dialect} reads it")
    config = dataclasses.replace(config, **{family.field: inner}) if family.field else inner
    if num_classes is None:
        num_classes, why = _classes(family, shapes)
        decisions.append(why)
    naming: Naming = "old" if any(map(_OLD_NAME.search, shapes)) else "new"
    if naming == "old":
        decisions.append("parameter names of the first releases")
    changed = structure.changed_fields(registry.preset(model), config)
    return Detection(family, model, config, changed, num_classes, naming, tuple(decisions))


def _classes(family: TorchFamily, shapes: Shapes) -> tuple[int, str]:
    """Classes of the main output, and how that is known."""
    for name in family.head:
        if name in shapes:
            return shapes[name][0], f"{shapes[name][0]} classes: the rows of {name}"
    raise ConversionError(
        f"it has no {family.head[0]}, which tells the number of classes; give that number"
    )


_OLD_NAME = re.compile(r"(^|\.)(st_block_|ln_1\.|self_attention\.)")


def _recognise(shapes: Shapes) -> tuple[TorchFamily, str]:
    for family in FAMILIES:
        marked = [name for name in shapes if name.startswith(family.marker)]
        if marked:
            return family, f"{family.title}, known by {marked[0]}"
    if any(name.startswith("outnorm") for name in shapes):
        raise ConversionError(
            "it is a backbone without a head; name the network that it is to start with --model "
            "and --adapt encoder"
        )
    known = ", ".join(f"{family.title} ({family.marker[0]}*)" for family in FAMILIES)
    first = next(iter(shapes), "none")
    raise ConversionError(
        f"its tensors belong to no network known here (the first is {first}); known are {known}"
    )


def _nearest_preset(family: TorchFamily, shapes: Shapes) -> tuple[str, Any, list[str]]:
    """The preset with the fewest fields to change, its config when changed, and an account."""
    found = family.structure(shapes)
    changes = {
        name: structure.differences(registry.preset(name), found) for name in family.presets()
    }
    model = min(changes, key=lambda name: len(structure.flat(changes[name])))
    settled = structure.flat(changes[model])
    how = f"{model}: the shapes are its own"
    if settled:
        fields = ", ".join(f"{path} = {value!r}" for path, value in settled.items())
        how = f"{model}: the nearest preset, with fields changed to fit the shapes: {fields}"
    config = registry.override(registry.preset(model), changes[model])
    unseen = structure.unseen(family.hierarchy(config), family.hierarchy_structure(shapes))
    trusted = ", ".join(f"{path} = {value!r}" for path, value in unseen.items())
    return model, config, [how, f"as in the preset, for no tensor shows it: {trusted}"]
