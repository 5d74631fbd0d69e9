"""Reads a PyTorch checkpoint's pickle as data: nothing it names is ever imported or called.

`pickletools` splits the stream into opcodes; a small stack machine here carries out the ones that
build data. A global is only a name: those that make tensors become records that say where the
numbers lie, a short list of data-only classes become inert stand-ins, and anything else is refused
by the name that the file asked for.
"""

import dataclasses
import io
import pickletools
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

PICKLE_LIMIT = 1 << 23
"""Longest pickle that is read, in bytes: room for some 40,000 tensors."""

DATA_ONLY = frozenset(
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
class _Global:
    """A name that the file asked for and that is known here."""

    name: str


def read_pickle(data: memoryview) -> tuple[Any, int]:
    """Reads one pickle.

    Args:
      data: bytes that begin with a pickle; what follows its end is left alone.

    Returns:
      The object, made of dicts, lists, tuples, numbers, strings, `TensorRef`, `StorageRef` and
      `Opaque`, and the number of bytes read.

    Raises:
      ConversionError: the stream is damaged, or names something that is neither tensor nor plain
        data.
    """
    stream = io.BytesIO(data[:PICKLE_LIMIT])
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            machine.step(opcode.name, argument)
        return machine.result(), stream.tell()
    except ConversionError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        if stream.tell() >= PICKLE_LIMIT:
            raise ConversionError(
                f"its pickle is longer than {PICKLE_LIMIT} bytes; save the state dict alone, "
                "without logs or histories"
            ) from error
        raise ConversionError(
            f"its pickle is damaged or truncated ({printable(error)}); copy or download the file "
            "again"
        ) from error


_MARK = object()


class _Machine:
    """The stack and memo of the pickle format, for the opcodes that build data."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def result(self) -> Any:
        """The object left on the stack at the end."""
        (value,) = self.stack
        return value

    def step(self, name: str, argument: Any) -> None:
        """Carries out one opcode."""
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in _MEMOIZE:
            self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]
        elif name in _RECALL:
            self.stack.append(self.memo[argument])
        elif name in _IGNORED:
            return
        elif (action := getattr(self, "op_" + name.lower(), None)) is not None:
            action(argument)
        else:
            raise ConversionError(
                f"its pickle uses the instruction {name}, which no PyTorch state dict needs; "
                "save it again with torch.save(model.state_dict(), path)"
            )

    def _pop_to_mark(self) -> list[Any]:
        start = len(self.stack) - 1
        while self.stack[start] is not _MARK:
            start -= 1
            if start < 0:
                raise ValueError("mark missing")
        items = self.stack[start + 1 :]
        del self.stack[start:]
        return items

    def op_mark(self, _: None) -> None:
        self.stack.append(_MARK)

    def op_pop(self, _: None) -> None:
        self.stack.pop()

    def op_pop_mark(self, _: None) -> None:
        self._pop_to_mark()

    def op_dup(self, _: None) -> None:
        self.stack.append(self.stack[-1])

    def op_none(self, _: None) -> None:
        self.stack.append(None)

    def op_newtrue(self, _: None) -> None:
        self.stack.append(True)

    def op_newfalse(self, _: None) -> None:
        self.stack.append(False)

    def op_tuple(self, _: None) -> None:
        self.stack.append(tuple(self._pop_to_mark()))

    def op_tuple1(self, _: None) -> None:
        self._tuple(1)

    def op_tuple2(self, _: None) -> None:
        self._tuple(2)

    def op_tuple3(self, _: None) -> None:
        self._tuple(3)

    def _tuple(self, length: int) -> None:
        items = tuple(self.stack[-length:])
        if len(items) < length:
            raise ValueError("stack too short")
        self.stack[-length:] = [items]

    def op_list(self, _: None) -> None:
        self.stack.append(self._pop_to_mark())

    def op_dict(self, _: None) -> None:
        items = self._pop_to_mark()
        self.stack.append({})
        self._set_items(items)

    def op_frozenset(self, _: None) -> None:
        self._pop_to_mark()
        self.stack.append(Opaque("builtins.frozenset"))

    def op_append(self, _: None) -> None:
        self._extend([self.stack.pop()])

    def op_appends(self, _: None) -> None:
        self._extend(self._pop_to_mark())

    def op_additems(self, _: None) -> None:
        self._pop_to_mark()

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Opaque):
            raise TypeError("items appended to something that is no list")

    def op_setitem(self, _: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def op_setitems(self, _: None) -> None:
        self._set_items(self._pop_to_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update(
                (_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True)
            )
        elif not isinstance(target, Opaque):
            raise TypeError("items set on something that is no dict")

    def op_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(_find(module, name))

    def op_stack_global(self, _: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(_find(module, name))

    def op_inst(self, argument: str) -> None:
        self.op_global(argument)
        function = self.stack.pop()
        self.stack.append(_call(function, tuple(self._pop_to_mark())))

    def op_reduce(self, _: None) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(_call(function, arguments))

    def op_newobj(self, _: None) -> None:
        self.op_reduce(None)

    def op_newobj_ex(self, _: None) -> None:
        self.stack.pop()
        self.op_reduce(None)

    def op_build(self, _: None) -> None:
        self.stack.pop()
        if not isinstance(self.stack[-1], dict | Opaque | TensorRef):
            raise TypeError("state set on a plain value")

    def op_binpersid(self, _: None) -> None:
        self.stack.append(_storage(self.stack.pop()))


_LITERALS = frozenset(
    "BININT BININT1 BININT2 INT LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "UNICODE "
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": lambda: Opaque("builtins.set"),
}
_MEMOIZE = frozenset(["PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"])
_RECALL = frozenset(["GET", "BINGET", "LONG_BINGET"])
_IGNORED = frozenset(["PROTO", "FRAME", "STOP"])


def _key(key: Any) -> Any:
    """A dict key that may be hashed without descending into nested values."""
    plain = (str, int, float, bytes, type(None))
    if isinstance(key, plain) or (
        isinstance(key, tuple) and all(isinstance(k, plain) for k in key)
    ):
        return key
    raise TypeError(f"a dict key of type {type(key).__name__}")


def _find(module: object, name: object) -> _Global:
    """Turns a global into its name, if it is one that stands for data."""
    full = f"{_PYTHON_2_MODULES.get(str(module), module)}.{name}"
    if any(full in known for known in (DATA_ONLY, _CALLS, STORAGE_DTYPES, TENSOR_DTYPES)):
        return _Global(full)
    raise ConversionError(
        f"it asks for {printable(full)}, which is neither a tensor nor plain data, so reading "
        "stops here and nothing was run; "
        "save the weights alone with torch.save(model.state_dict(), path)"
    )


def _call(function: Any, arguments: Any) -> Any:
    """Stands in for `function(*arguments)`."""
    if not isinstance(function, _Global) or not isinstance(arguments, tuple):
        raise TypeError("a call of something that is no known name")
    make = _CALLS.get(function.name)
    return Opaque(function.name) if make is None else make(*arguments)


def _storage(persistent: Any) -> StorageRef:
    """The storage behind a persistent id `("storage", type, key, location, size, view)`.

    The location is the device that it came from, which has no meaning here.
    """
    kind, storage_type, key, _, size, *view = persistent
    if kind != "storage" or not isinstance(storage_type, _Global):
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
    return _call(function, arguments)


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda pairs=(): {_key(key): value for key, value in pairs},
    "torch.Size": lambda items=(): tuple(items),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_with_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _subclass,
}
