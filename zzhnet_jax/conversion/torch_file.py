"""A PyTorch checkpoint, whatever its container: what it describes, and where its numbers lie.

The file is mapped into memory, never read whole and never unpacked. Every length is checked
against the file before it is used, so that a crafted header cannot ask for memory that the file
does not fill.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from zzhnet_jax.conversion.torch_records import StorageRef, TensorRef
from zzhnet_jax.errors import ConversionError


class TorchFile:
    """A checkpoint whose description has been read and whose numbers are still in the file.

    Attributes:
      content: the object that was saved, with a `TensorRef` for every tensor.
      size: bytes of the file.
    """

    def __init__(
        self, content: Any, size: int, find_storage: Callable[[StorageRef], memoryview]
    ) -> None:
        """Takes the saved object, the file's size, and what finds a storage's bytes in the file."""
        self.content = content
        self.size = size
        self._find_storage = find_storage

    def array(self, ref: TensorRef) -> np.ndarray:
        """The tensor as a read-only, C-contiguous array: a view of the file if its layout allows.

        Raises:
          ConversionError: the tensor reaches outside its storage, or the storage outside the file.
        """
        storage = self._find_storage(ref.storage)
        if 0 in ref.shape:
            return np.zeros(ref.shape, ref.dtype)
        itemsize = ref.dtype.itemsize
        available = len(storage) // itemsize
        steps = zip(ref.shape, ref.strides, strict=True)
        last = ref.offset + sum((length - 1) * stride for length, stride in steps)
        if last >= available:
            raise ConversionError(
                f"shape {ref.shape}, strides {ref.strides} and offset {ref.offset} reach element "
                f"{last} of a storage that has {available}"
            )
        start, strides = ref.offset * itemsize, [stride * itemsize for stride in ref.strides]
        view = np.ndarray(ref.shape, ref.dtype, storage, start, strides)
        array = np.require(view, requirements=["C", "A"])
        array.flags.writeable = False
        return array
