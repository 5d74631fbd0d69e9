"""The legacy layout of `torch.save`: five pickles in a row, then the storages.

The pickles are a magic number, the format's version, the writer's machine, the saved object, and
the order of the storages. Each storage is its number of elements (int64) and the elements.
"""

from typing import Any

from zzhnet_jax.conversion.torch_file import TorchFile
from zzhnet_jax.conversion.torch_pickle import read_pickle
from zzhnet_jax.conversion.torch_records import StorageRef, TensorRef, printable
from zzhnet_jax.errors import ConversionError

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001


def read_legacy(buffer: memoryview) -> TorchFile:
    """Reads the description in a legacy checkpoint.

    Args:
      buffer: the mapped file.

    Raises:
      ConversionError: the file is damaged, or was not written by `torch.save`.
    """
    position = 0

    def next_pickle() -> Any:
        nonlocal position
        value, length = read_pickle(buffer[position:])
        position += length
        return value

    if next_pickle() != MAGIC:
        raise ConversionError(
            "it is a plain pickle, which torch.save did not write; save it with "
            "torch.save(model.state_dict(), path)"
        )
    version, machine = next_pickle(), next_pickle()
    if version != VERSION or not isinstance(machine, dict):
        raise ConversionError("its format version is unknown; save it with a newer PyTorch")
    if machine.get("little_endian") is not True:
        raise ConversionError(
            "its tensors are big-endian; save it again on a little-endian machine"
        )
    content, keys = next_pickle(), next_pickle()
    storages = _locate(buffer, position, keys, _mentioned(content))

    def find_storage(ref: StorageRef) -> memoryview:
        if ref.key not in storages:
            raise ConversionError(f"its storage {printable(ref.key)} is missing from the file")
        return storages[ref.key]

    return TorchFile(content, len(buffer), find_storage)


def _locate(
    buffer: memoryview, position: int, keys: Any, mentioned: dict[str, StorageRef]
) -> dict[str, memoryview]:
    """Walks over the storages, whose element types stand only where a tensor mentions them."""
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ConversionError("its list of storages is damaged; download it again")
    found: dict[str, memoryview] = {}
    for key in keys:
        ref = mentioned.get(key)
        count = int.from_bytes(buffer[position : position + 8].tobytes(), "little")
        if ref is None or count != ref.size:
            raise ConversionError(
                f"its storage {printable(key)} is not as its tensors describe it: the file is "
                "truncated or damaged; download it again"
            )
        start = position + 8
        position = start + count * ref.dtype.itemsize
        if position > len(buffer):
            raise ConversionError(
                f"its storage {printable(key)} of {count} elements runs past the file's end: it "
                "is truncated; download it again"
            )
        found[key] = buffer[start:position]
    return found


def _mentioned(content: Any) -> dict[str, StorageRef]:
    """Every storage that the saved object mentions, by key."""
    found: dict[str, StorageRef] = {}
    visited: set[int] = set()
    pending = [content]
    while pending:
        value = pending.pop()
        if isinstance(value, TensorRef):
            found[value.storage.key] = value.storage
        elif isinstance(value, StorageRef):
            found[value.key] = value
        elif isinstance(value, dict | list | tuple) and id(value) not in visited:
            visited.add(id(value))
            pending.extend(value.values() if isinstance(value, dict) else value)
    return found
