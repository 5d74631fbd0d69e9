"""Every network by name: presets, creation, and the card that travels with a model."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, cast

from flax import nnx

from zzhnet_jax.errors import ConfigError
from zzhnet_jax.models import changemamba, vssm, zzhnet

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class ModelCard:
    """What a user of a model must know beside its weights.

    Attributes:
      name: the preset it was made from.
      num_classes: classes of its main output.
      mean, std: per-band statistics, in 0..255, by which its input images are normalised.
      threshold: change probability from which a pixel counts as changed.
    """

    name: str
    num_classes: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    threshold: float = 0.5


class Network(Protocol):
    """What every module made here has beside its weights."""

    config: Any
    card: ModelCard


@dataclass(frozen=True)
class Family:
    """Networks that share a config class and a constructor.

    Attributes:
      presets: name -> config.
      build: constructor, called as build(config, num_classes=..., rngs=...).
      num_images: images that the network takes: 2 for change, 1 for classification.
    """

    presets: Mapping[str, Any]
    build: Callable[..., nnx.Module]
    num_images: int = 2


FAMILIES: tuple[Family, ...] = (
    Family(zzhnet.PRESETS, zzhnet.ZZHNet),
    Family(changemamba.PRESETS, changemamba.build),
    Family(vssm.PRESETS, vssm.build, num_images=1),
)


def list_models() -> tuple[str, ...]:
    """Names that `create_model` takes."""
    return tuple(name for family in FAMILIES for name in family.presets)


def _family(name: str) -> Family:
    for family in FAMILIES:
        if name in family.presets:
            return family
    near = difflib.get_close_matches(name, list_models(), n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ConfigError("model.name", name, f"one of {', '.join(list_models())}{hint}")


def preset(name: str) -> Any:
    """The frozen config of the network called `name`.

    Raises:
      ConfigError: there is no such network.
    """
    return _family(name).presets[name]


def num_images(name: str) -> int:
    """How many images the network called `name` takes."""
    return _family(name).num_images


def override(config: Any, overrides: Mapping[str, Any], *, path: str = "model.overrides") -> Any:
    """A copy of a frozen config with fields replaced; a mapping as value descends into a field.

    Args:
      config: a frozen dataclass, possibly nested.
      overrides: field name -> new value; lists count as tuples.
      path: where these fields stand, for messages.

    Raises:
      ConfigError: no such field, or a value that the config refuses.
    """
    changes = {}
    names = [f.name for f in fields(config)]
    for name, value in overrides.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3)
            hint = f"did you mean {' or '.join(near)}" if near else f"one of {', '.join(names)}"
            raise ConfigError(f"{path}.{name}", value, f"a field that exists: {hint}")
        old = getattr(config, name)
        if is_dataclass(old) and isinstance(value, Mapping):
            value = override(old, value, path=f"{path}.{name}")
        changes[name] = tuple(value) if isinstance(value, list) else value
    try:
        return replace(config, **changes)
    except ConfigError as error:
        raise ConfigError(f"{path}.{error.field}", error.value, error.allowed) from None


def build(name: str, config: Any, num_classes: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """Builds the network called `name` from its resolved config, with a fresh card."""
    model = _family(name).build(config, num_classes=num_classes, rngs=rngs)
    cast(Network, model).card = ModelCard(name, num_classes)
    model.eval()
    return model


def create_model(
    name: str, *, num_classes: int = 2, rngs: nnx.Rngs, **overrides: Any
) -> nnx.Module:
    """Creates a network with fresh weights.

    Args:
      name: one of `list_models()`.
      num_classes: classes of the main output.
      rngs: source of the initial weights, for example `nnx.Rngs(0)`.
      **overrides: fields of the network's config to replace, for example `width=32`.

    Returns:
      The network, in evaluation mode. A change network maps two normalised images (b, h, w, c) to
      float32 logits (b, h, w, num_classes).

    Raises:
      ConfigError: no such network or field, or a value that the field cannot have.
    """
    return build(name, override(preset(name), overrides), num_classes, rngs=rngs)
