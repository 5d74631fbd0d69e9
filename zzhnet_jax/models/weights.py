"""A saved model's arrays: one safetensors file, or an Orbax folder that many devices read in parts.

Both hold the same tree, {"params": ..., "stats": ...}, and each appears whole or not at all.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from zzhnet_jax.errors import CheckpointError
from zzhnet_jax.models import functional

Format = Literal["safetensors", "orbax"]
FILES: dict[Format, str] = {"safetensors": "model.safetensors", "orbax": "model.orbax"}


def find(folder: Path) -> Path | None:
    """The weights in a folder, in whichever format they are."""
    return next((folder / name for name in FILES.values() if (folder / name).exists()), None)


def write(folder: Path, tree: functional.Tree, kind: Format) -> None:
    """Replaces the weights in a folder, those of the other format too."""
    path = folder / FILES[kind]
    if kind == "safetensors":
        with replacing(path) as file:
            safetensors.numpy.save_file({k: np.asarray(v) for k, v in flatten(tree).items()}, file)
    else:
        with _checkpointer() as checkpointer:
            checkpointer.save(path.absolute(), tree, force=True)
    for name in FILES.values():
        other = folder / name
        if other.is_dir() and other != path:
            shutil.rmtree(other)
        elif other != path:
            other.unlink(missing_ok=True)


def read(path: Path, abstract: functional.Tree) -> functional.Tree:
    """Arrays in the places of `abstract`, with its dtypes and, where it has them, its shardings.

    Args:
      path: what `find` gave.
      abstract: `jax.ShapeDtypeStruct`s; every name and shape must agree with what is there.

    Raises:
      CheckpointError: the weights are damaged or belong to another network.
    """
    if path.name == FILES["safetensors"]:
        return _read_safetensors(path, abstract)
    with _checkpointer() as checkpointer:
        try:
            found = checkpointer.metadata(path.absolute()).item_metadata
            if found is None:
                raise ValueError("it does not say what it holds")
            _check(path, abstract, jax.tree.map(lambda leaf: leaf.shape, found.tree))
            placed = jax.tree.map(_placed, abstract)
            return checkpointer.restore(path.absolute(), placed)
        except (ValueError, KeyError, TypeError, OSError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise CheckpointError(f"{path}: damaged ({reason}); export the model again") from None


def _checkpointer() -> Any:
    """Orbax's, imported here since it takes a second and most models are read without it."""
    import orbax.checkpoint

    return orbax.checkpoint.StandardCheckpointer()


def _placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """On this process's first device where nothing else is asked for."""
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _read_safetensors(path: Path, abstract: functional.Tree) -> functional.Tree:
    try:
        arrays = safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); export the model again") from None
    _check(path, abstract, {name: array.shape for name, array in arrays.items()})

    def take(keys: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        array = jnp.asarray(arrays[".".join(str(key.key) for key in keys)], leaf.dtype)
        return array if leaf.sharding is None else jax.device_put(array, leaf.sharding)

    return jax.tree_util.tree_map_with_path(take, abstract)


def _check(path: Path, abstract: functional.Tree, shapes: dict[str, Any]) -> None:
    """Compares names and shapes; `shapes` may be nested."""
    wanted = {name: tuple(leaf.shape) for name, leaf in flatten(abstract).items()}
    found = {name: tuple(shape) for name, shape in flatten(shapes).items()}
    wrong = sorted(wanted.keys() ^ found.keys()) + sorted(
        name for name in wanted.keys() & found.keys() if wanted[name] != found[name]
    )
    if wrong:
        raise CheckpointError(
            f"{path}: belongs to another network; {len(wrong)} arrays differ in name or shape,"
            f" first {wrong[0]}"
        )


def flatten(tree: functional.Tree, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict whose keys join the path with dots."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        flat.update(flatten(value, path) if isinstance(value, dict) else {path: value})
    return flat


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write, which becomes `path` once it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
