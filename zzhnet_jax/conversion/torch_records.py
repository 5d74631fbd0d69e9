"""What a PyTorch checkpoint says of its tensors: records, and PyTorch's names of element types."""

import dataclasses
import math

import ml_dtypes
import numpy as np

STORAGE_DTYPES: dict[str, np.dtype] = {
    f"{module}.{name}Storage": np.dtype(dtype)
    for name, dtype in {
        "Double": np.float64,
        "Float": np.float32,
        "Half": np.float16,
        "BFloat16": ml_dtypes.bfloat16,
        "Long": np.int64,
        "Int": np.int32,
        "Short": np.int16,
        "Char": np.int8,
        "Byte": np.uint8,
        "Bool": np.bool_,
        "ComplexFloat": np.complex64,
        "ComplexDouble": np.complex128,
        "Untyped": np.uint8,
    }.items()
    for module in ("torch", "torch.cuda", "torch.storage")
}

TENSOR_DTYPES: dict[str, np.dtype] = {
    f"torch.{name}": np.dtype(dtype)
    for name, dtype in {
        "float64": np.float64,
        "float32": np.float32,
        "float16": np.float16,
        "bfloat16": ml_dtypes.bfloat16,
        "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
        "float8_e5m2": ml_dtypes.float8_e5m2,
        "int64": np.int64,
        "int32": np.int32,
        "int16": np.int16,
        "int8": np.int8,
        "uint64": np.uint64,
        "uint32": np.uint32,
        "uint16": np.uint16,
        "uint8": np.uint8,
        "bool": np.bool_,
        "complex64": np.complex64,
        "complex128": np.complex128,
    }.items()
}


@dataclasses.dataclass(frozen=True, eq=False)
class Opaque:
    """Stands for a value that is no tensor, container, number or string: only its type's name."""

    name: str


@dataclasses.dataclass(frozen=True)
class StorageRef:
    """A run of numbers in the file: its key there, element type and number of elements."""

    key: str
    dtype: np.dtype
    size: int


@dataclasses.dataclass(frozen=True)
class TensorRef:
    """A tensor as the file describes it, unchecked.

    Offset and strides count elements of `dtype` in the storage.
    """

    storage: StorageRef
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor itself: more than its storage's if expanded, fewer if a slice."""
        return math.prod(self.shape) * self.dtype.itemsize


def printable(text: object, limit: int = 80) -> str:
    """Text from a file made fit for one line of a terminal: no control characters, not too long."""
    plain = ascii(text if isinstance(text, str) else str(text))[1:-1]
    return plain if len(plain) <= limit else plain[: limit - 3] + "..."
