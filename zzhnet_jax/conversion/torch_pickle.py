"""Reads a PyTorch checkpoint's pickle as data: nothing it names is ever imported or called.

`pickletools` splits the stream into opcodes; a small stack machine here carries out the ones that
build data, and torch_globals.py answers for whatever it names.
"""

import io
import pickletools
from collections.abc import Callable
from typing import Any

from zzhnet_jax.conversion.torch_globals import call, find, plain_key, storage
from zzhnet_jax.conversion.torch_records import Opaque, TensorRef, printable
from zzhnet_jax.errors import ConversionError

PICKLE_LIMIT = 1 << 23
"""Longest pickle that is read, in bytes: room for some 40,000 tensors."""


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
                (plain_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True)
            )
        elif not isinstance(target, Opaque):
            raise TypeError("items set on something that is no dict")

    def op_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(find(module, name))

    def op_stack_global(self, _: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(find(module, name))

    def op_inst(self, argument: str) -> None:
        self.op_global(argument)
        function = self.stack.pop()
        self.stack.append(call(function, tuple(self._pop_to_mark())))

    def op_reduce(self, _: None) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(call(function, arguments))

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
        self.stack.append(storage(self.stack.pop()))


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
