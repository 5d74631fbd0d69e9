"""The safetensors layout: a length (uint64), a JSON header of that length, then the numbers.

Read here rather than with the `safetensors` package, whose numpy side lacks some element types and
copies every tensor.
"""

import json
import math
from typing import Any

import ml_dtypes
import numpy as np

from zzhnet_jax.conversion.torch_file import TorchFile
from zzhnet_jax.conversion.torch_records import StorageRef, TensorRef, printable
from zzhnet_jax.errors import ConversionError

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}


def is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file of `size` bytes that begins with `head` has this layout."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def read_safetensors(buffer: memoryview) -> TorchFile:
    """Reads the header of a safetensors file.

    Args:
      buffer: the mapped file, for which `is_safetensors` holds.

    Raises:
      ConversionError: the header is damaged, or describes tensors that the file does not hold.
    """
    length = int.from_bytes(buffer[:8], "little")
    numbers = buffer[8 + length :]
    try:
        header = json.loads(buffer[8 : 8 + length].tobytes())
        content = {
            name: _tensor(fields, len(numbers))
            for name, fields in header.items()
            if name != "__metadata__"
        }
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ConversionError(
            f"its safetensors header is damaged ({printable(error)}); download it again"
        ) from error

    def find_storage(ref: StorageRef) -> memoryview:
        start = int(ref.key)
        return numbers[start : start + ref.size * ref.dtype.itemsize]

    return TorchFile(content, len(buffer), find_storage)


def _tensor(fields: dict[str, Any], available: int) -> TensorRef:
    dtype = DTYPES[fields["dtype"]]
    shape = tuple(int(length) for length in fields["shape"])
    start, end = (int(position) for position in fields["data_offsets"])
    size = math.prod(shape)
    if min((*shape, start)) < 0 or end > available or end - start != size * dtype.itemsize:
        raise ValueError(f"shape {shape} of {dtype} at bytes {start} to {end} of {available}")
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return TensorRef(StorageRef(str(start), dtype, size), dtype, 0, shape, strides)
