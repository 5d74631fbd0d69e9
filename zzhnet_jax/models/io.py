"""Saved models: a folder with `model.safetensors` (weights) and `config.json` (everything else)."""

import contextlib
import dataclasses
import json
import os
import typing
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from zzhnet_jax.errors import CheckpointError, ConfigError
from zzhnet_jax.models import functional, registry

WEIGHTS, CONFIG = "model.safetensors", "config.json"
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


def flatten(tree: functional.Tree, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict whose keys join the path with dots."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        flat.update(flatten(value, path) if isinstance(value, dict) else {path: value})
    return flat


def save_model(
    model: nnx.Module, directory: str | os.PathLike, *, card: registry.ModelCard | None = None
) -> None:
    """Writes a model so that `load_model` gives it back; each file appears whole or not at all.

    Args:
      model: a network made by `create_model`, or loaded.
      directory: where to write; made if missing, an older model there is replaced.
      card: a card to store in place of `model.card`.

    Raises:
      CheckpointError: the files cannot be written, for example because the disk is full.
    """
    network = cast(registry.Network, model)
    _, params, stats = functional.split(model)
    arrays = {k: np.asarray(v) for k, v in flatten({"params": params, "stats": stats}).items()}
    description = {
        "format": _FORMAT,
        "card": dataclasses.asdict(card or network.card),
        "config": dataclasses.asdict(network.config),
    }
    target = Path(directory)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with _replacing(target / WEIGHTS) as file:
            safetensors.numpy.save_file(arrays, file)
        with _replacing(target / CONFIG) as file:
            file.write_text(json.dumps(description, indent=2) + "\n")
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{target}: the model cannot be written ({reason}); free space or choose another folder"
        ) from None


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write, which becomes `path` once it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_model(path: str | os.PathLike) -> nnx.Module:
    """Reads a saved model.

    Args:
      path: a folder written by `save_model`, or a run folder, which holds one called `model`.

    Returns:
      The network in evaluation mode, with its `card`.

    Raises:
      CheckpointError: there is no model, a file is damaged, or the weights do not fit the config.
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        folder = folder / "model"
    description = _read_description(folder, path)
    try:
        name = description["card"]["name"]
        config = config_from_dict(type(registry.preset(name)), description["config"])
        card = config_from_dict(registry.ModelCard, description["card"])
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(
            f"{folder / CONFIG}: not a model of this version ({error}); export the model again"
        ) from None
    model = nnx.eval_shape(lambda: registry.build(name, config, card.num_classes, rngs=nnx.Rngs(0)))
    graphdef, params, stats = functional.split(model)
    tree = _fill({"params": params, "stats": stats}, folder / WEIGHTS)
    model = functional.merge(graphdef, tree["params"], tree["stats"])
    cast(registry.Network, model).card = card
    model.eval()
    return model


def _read_description(folder: Path, path: str | os.PathLike) -> dict[str, Any]:
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise CheckpointError(
            f"{path}: no model here; give a run folder or one that holds {WEIGHTS} and {CONFIG}"
        )
    try:
        description = json.loads((folder / CONFIG).read_text())
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{folder / CONFIG}: cannot be read ({error})") from None
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise CheckpointError(f"{folder / CONFIG}: not the description of a zzhnet_jax model")
    return description


def _fill(abstract: functional.Tree, file: Path) -> functional.Tree:
    """Arrays from `file` in the places of `abstract`; every name and shape must agree."""
    try:
        arrays = safetensors.numpy.load_file(file)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: damaged ({error}); export the model again") from None
    wanted = flatten(abstract)
    wrong = sorted(wanted.keys() ^ arrays.keys()) + sorted(
        k for k in wanted.keys() & arrays.keys() if wanted[k].shape != arrays[k].shape
    )
    if wrong:
        raise CheckpointError(
            f"{file}: belongs to another network; {len(wrong)} arrays differ in name or shape,"
            f" first {wrong[0]}"
        )

    def take(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(arrays[".".join(str(key.key) for key in path)], leaf.dtype)

    return jax.tree_util.tree_map_with_path(take, abstract)
