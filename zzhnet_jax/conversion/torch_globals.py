"""What a PyTorch checkpoint's pickle may name, and what stands for it.

A global is only a name: those that make tensors become records that say where the numbers lie, a
short list of data-only classes become inert stand-ins, and anything else is refused by the name
that the file asked for.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from zzhnet_jax.conversion.torch_records import (
    STORAGE_DTYPES,
    TENSOR_DTYPES,
    Opaque,
    StorageRef,
    TensorRef,
    printable,
)
from zzhnet_jax.errors import ConversionError

_DATA_ONLY = frozenset(
    """
    argparse.Namespace types.SimpleNamespace yacs.config.CfgNode fvcore.common.config.CfgNode
    easydict.EasyDict addict.addict.Dict omegaconf.dictconfig.DictConfig
    omegaconf.listconfig.ListConfig omegaconf.base.ContainerMetadata omegaconf.base.Metadata
    omegaconf.nodes.AnyNode typing.Any collections.defaultdict collections.Counter collections.deque
    builtins.set builtins.frozenset builtins.dict builtins.list builtins.tuple builtins.str
    builtins.int builtins.float builtins.bool builtins.bytes builtins.bytearray builtins.complex
    builtins.slice builtins.range builtins.object _codecs.encode copyreg._reconstructor
    datetime.date datetime.datetime datetime.time datetime.timedelta datetime.timezone
    pathlib.Path pathlib.PosixPath pathlib.PurePosixPath pathlib.WindowsPath pathlib.PureWindowsPath
    numpy.core.multiarray.scalar numpy.core.multiarray._reconstruct numpy._core.multiarray.scalar
    numpy._core.multiarray._reconstruct numpy.dtype numpy.ndarray
    torch.device torch.Tensor torch.nn.parameter.Parameter torch.nn.parameter.Buffer
    """.split()
)
"""Classes that scripts store beside the tensors: configurations, dates, metrics. Made `Opaque`."""

_PYTHON_2_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}


@dataclasses.dataclass(frozen=True)
class Global:
    """A name that the file asked for and that is known here."""

    name: str


def plain_key(key: Any) -> Any:
    """A dict key that may be hashed without descending into nested values."""
    plain = (str, int, float, bytes, type(None))
    if isinstance(key, plain) or (
        isinstance(key, tuple) and all(isinstance(k, plain) for k in key)
    ):
        return key
    raise TypeError(f"a dict key of type {type(key).__name__}")


def find(module: object, name: object) -> Global:
    """Turns a global into its name, if it is one that stands for data."""
    full = f"{_PYTHON_2_MODULES.get(str(module), module)}.{name}"
    if any(full in known for known in (_DATA_ONLY, _CALLS, STORAGE_DTYPES, TENSOR_DTYPES)):
        return Global(full)
    raise ConversionError(
        f"it asks for {printable(full)}, which is neither a tensor nor plain data, so reading "
        "stops here and nothing was run; "
        "save the weights alone with torch.save(model.state_dict(), path)"
    )


def call(function: Any, arguments: Any) -> Any:
    """Stands in for `function(*arguments)`."""
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise TypeError("a call of something that is no known name")
    make = _CALLS.get(function.name)
    return Opaque(function.name) if make is None else make(*arguments)


def storage(persistent: Any) -> StorageRef:
    """The storage behind a persistent id `("storage", type, key, location, size, view)`.

    The location is the device that it came from, which has no meaning here.
    """
    kind, storage_type, key, _, size, *view = persistent
    if kind != "storage" or not isinstance(storage_type, Global):
        raise TypeError("a persistent id that is no storage")
    if view and view[0] is not None:
        raise ConversionError(
            "it holds storages that are views of others, as written by PyTorch before 0.4; save it "
            "again with a newer PyTorch"
        )
    return StorageRef(str(key), STORAGE_DTYPES[storage_type.name], _count(size))


def _count(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ValueError("a size, stride or offset that no tensor can have")
    return value


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> TensorRef:
    if not isinstance(storage, StorageRef) or len(shape) != len(strides):
        raise TypeError("a tensor without storage, or with strides that do not fit its shape")
    return TensorRef(
        storage,
        storage.dtype,
        _count(offset),
        tuple(map(_count, shape)),
        tuple(map(_count, strides)),
    )


def _tensor_with_dtype(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> TensorRef:
    return dataclasses.replace(
        _tensor(storage, offset, shape, strides), dtype=TENSOR_DTYPES[dtype.name]
    )


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _subclass(function: Any, _type: Any, arguments: Any, *_: Any) -> Any:
    return call(function, arguments)


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda pairs=(): {plain_key(key): value for key, value in pairs},
    "torch.Size": lambda items=(): tuple(items),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_with_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _subclass,
}
