"""Writes arrays as a PyTorch checkpoint, without PyTorch.

The `.pth` files are what `torch.save(OrderedDict(...))` writes: a zip whose `data.pkl` describes
the tensors and whose other entries are their numbers. `torch.load(path, weights_only=True)` reads
them.
"""

import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from zzhnet_jax.conversion.torch_records import STORAGE_DTYPES
from zzhnet_jax.errors import ConversionError

_STORAGE_NAMES = {
    dtype: name.removeprefix("torch.")
    for name, dtype in STORAGE_DTYPES.items()
    if name.count(".") == 1 and name != "torch.UntypedStorage"
}
_ALIGNMENT = 64
_PADDING_FIELD = 0x4246  # the extra field in which PyTorch keeps the padding that aligns an entry


def save_torch_state_dict(tensors: Mapping[str, np.ndarray], path: str | Path) -> None:
    """Writes a state dict that PyTorch loads.

    Args:
      tensors: name -> array; floating point (bfloat16 through `ml_dtypes`), integer, boolean or
        complex. Order is kept.
      path: ends in `.pth` or `.pt` (zip format) or `.safetensors`. Written beside it first and
        renamed, so never left half-written.

    Raises:
      ConversionError: another ending, or a dtype that the format lacks.
      OSError: the disk is full or the folder cannot be written to.
    """
    path = Path(path)
    if path.suffix not in (".pth", ".pt", ".safetensors"):
        raise ConversionError(f"{path}: unknown ending; use .pth, .pt or .safetensors")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if path.suffix == ".safetensors":
            save_file({name: _contiguous(array) for name, array in tensors.items()}, partial)
        else:
            _write_zip(tensors, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _contiguous(array: np.ndarray) -> np.ndarray:
    """The array in C order; `np.ascontiguousarray` would give scalars an axis."""
    return np.require(array, requirements=["C"])


def _write_zip(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    arrays = {name: np.asarray(array) for name, array in tensors.items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "data.pkl", b"".join(_pickle(arrays)))
        _add(archive, "byteorder", b"little")
        for index, array in enumerate(arrays.values()):
            flat = _contiguous(array).reshape(-1)
            _add(archive, f"data/{index}", flat.view(np.uint8).data)
        _add(archive, "version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    """Adds an entry whose content begins at a multiple of 64 bytes, as PyTorch lays it out."""
    entry = zipfile.ZipInfo(f"archive/{name}")
    start = archive.start_dir + 30 + len(entry.filename) + 4
    padding = -start % _ALIGNMENT
    entry.extra = struct.pack("<HH", _PADDING_FIELD, padding) + b"Z" * padding
    entry.file_size = len(content)
    with archive.open(entry, "w") as file:
        file.write(content)


def _pickle(arrays: Mapping[str, np.ndarray]) -> Iterator[bytes]:
    """The pickle (protocol 2) of an OrderedDict of tensors, opcode by opcode."""
    yield b"\x80\x02" + _ORDERED_DICT + b"("
    for index, (name, array) in enumerate(arrays.items()):
        yield _string(name) + _tensor(str(index), name, array)
    yield b"u."


def _tensor(key: str, name: str, array: np.ndarray) -> bytes:
    """`_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, backward_hooks)`."""
    storage_name = _STORAGE_NAMES.get(array.dtype)
    if storage_name is None:
        raise ConversionError(
            f"tensor {name}: PyTorch's .pth format has no {array.dtype}; convert it to float32"
        )
    strides = [1] * array.ndim
    for axis in range(array.ndim - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(array.shape[axis + 1], 1)
    storage = b"(" + _string("storage") + _global("torch", storage_name)
    storage += _string(key) + _string("cpu") + _integer(array.size) + b"tQ"
    layout = _integer(0) + _tuple(array.shape) + _tuple(strides)
    return _REBUILD_TENSOR + b"(" + storage + layout + b"\x89" + _ORDERED_DICT + b"tR"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _string(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _tuple(values: tuple[int, ...] | list[int]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"


_ORDERED_DICT = _global("collections", "OrderedDict") + b")R"
_REBUILD_TENSOR = _global("torch._utils", "_rebuild_tensor_v2")
