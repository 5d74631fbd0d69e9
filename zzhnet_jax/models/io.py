"""Saved models: a folder with weights (`models.weights`) and `config.json` (everything else)."""

import dataclasses
import json
import os
import typing
from pathlib import Path
from types import UnionType
from typing import Any, cast

import safetensors
from flax import nnx

from zzhnet_jax.errors import CheckpointError, ConfigError
from zzhnet_jax.models import functional, registry, weights

CONFIG = "config.json"
_FORMAT = 1


def config_from_dict(cls: type, values: dict[str, Any]) -> Any:
    """Rebuilds a (nested) frozen dataclass from what `dataclasses.asdict` and JSON made of it.

    Raises:
      ConfigError: a field is unknown or has a value that the class refuses.
    """
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        if name not in hints:
            raise ConfigError(name, value, f"a field of {cls.__name__}: {', '.join(hints)}")
        arguments[name] = _from_json(hints[name], value)
    return cls(**arguments)


def _from_json(hint: Any, value: Any) -> Any:
    if isinstance(value, dict):
        options = typing.get_args(hint) if isinstance(hint, UnionType) else (hint,)
        cls: Any = next((option for option in options if dataclasses.is_dataclass(option)), None)
        return value if cls is None else config_from_dict(cls, value)
    return tuple(value) if isinstance(value, list) else value


def save_model(
    model: nnx.Module,
    directory: str | os.PathLike,
    *,
    card: registry.ModelCard | None = None,
    weights_format: weights.Format = "safetensors",
) -> None:
    """Writes a model so that `load_model` gives it back; each file appears whole or not at all.

    Args:
      model: a network made by `create_model`, or loaded.
      directory: where to write; made if missing, an older model there is replaced.
      card: a card to store in place of `model.card`.
      weights_format: "orbax" writes a folder that several devices or processes read in parts.

    Raises:
      CheckpointError: the files cannot be written, for example because the disk is full.
    """
    network = cast(registry.Network, model)
    _, params, stats = functional.split(model)
    description = {
        "format": _FORMAT,
        "card": dataclasses.asdict(card or network.card),
        "config": dataclasses.asdict(network.config),
    }
    target = Path(directory)
    try:
        target.mkdir(parents=True, exist_ok=True)
        weights.write(target, {"params": params, "stats": stats}, weights_format)
        with weights.replacing(target / CONFIG) as file:
            file.write_text(json.dumps(description, indent=2) + "\n")
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{target}: the model cannot be written ({reason}); free space or choose another folder"
        ) from None


def load_model(path: str | os.PathLike) -> nnx.Module:
    """Reads a saved model.

    Args:
      path: a folder written by `save_model`, or a run folder, which holds one called `model`.

    Returns:
      The network in evaluation mode, with its `card`.

    Raises:
      CheckpointError: there is no model, a file is damaged, or the weights do not fit the config.
    """
    file, description = _open(path)
    try:
        name = description["card"]["name"]
        config = config_from_dict(type(registry.preset(name)), description["config"])
        card = config_from_dict(registry.ModelCard, description["card"])
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(
            f"{file.parent / CONFIG}: not a model of this version ({error}); export the model again"
        ) from None
    graphdef, params, stats = functional.abstract(
        lambda rngs: registry.build(name, config, card.num_classes, rngs=rngs)
    )
    tree = weights.read(file, {"params": params, "stats": stats})
    model = functional.merge(graphdef, tree["params"], tree["stats"])
    cast(registry.Network, model).card = card
    model.eval()
    return model


def read_weights(path: str | os.PathLike, abstract: functional.Tree) -> functional.Tree:
    """The arrays of a saved model, in the places of `abstract`, each where its sharding says.

    Args:
      path: as for `load_model`.
      abstract: {"params": ..., "stats": ...} of `jax.ShapeDtypeStruct`s.

    Raises:
      CheckpointError: there is no model, it is damaged, or its arrays have other names or shapes.
    """
    return weights.read(_open(path)[0], abstract)


def _open(path: str | os.PathLike) -> tuple[Path, dict[str, Any]]:
    """The weights of a saved model, and its description."""
    folders = (
        folder for folder in (Path(path), Path(path) / "model") if (folder / CONFIG).is_file()
    )
    file = next(filter(None, map(weights.find, folders)), None)
    if file is None:
        raise CheckpointError(
            f"{path}: no model here; give a run folder or one that holds {CONFIG} and"
            f" {' or '.join(weights.FILES.values())}"
        )
    config = file.parent / CONFIG
    try:
        description = json.loads(config.read_text())
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{config}: cannot be read ({error})") from None
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise CheckpointError(f"{config}: not the description of a zzhnet_jax model")
    return file, description
