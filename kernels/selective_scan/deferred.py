"""Functions that are traced only when the program that calls them is lowered.

Where the platform decides which kernel runs, every kernel is traced and all but one are thrown
away. Tracing a kernel takes up to a second; a deferred one takes none, for its results are
declared, and it is traced where it is kept.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import PartitionSpec
from jaxtyping import Array

_deferred = Primitive("deferred_call")
_deferred.multiple_results = True


def deferred(
    function: Callable[..., list[Array]], results: list[jax.ShapeDtypeStruct], *arrays: Array
) -> list[Array]:
    """`function(*arrays)`, traced at lowering.

    Args:
      function: hashable; calls with equal ones and equal types are traced once.
      results: shapes and dtypes that it returns.
      *arrays: at least one; inside `shard_map` results vary over the mesh axes that the first does.
    """
    types = tuple((x.shape, x.dtype) for x in results)
    return _deferred.bind(*arrays, function=function, types=types)


@partial(jax.jit, static_argnames=("function", "types"))
def _run(*arrays: Array, function: Callable[..., list[Array]], types: Any) -> list[Array]:
    results = function(*arrays)
    found = tuple((x.shape, x.dtype) for x in results)
    if found != types:
        raise AssertionError(f"{function} returns {found}, not {types} as declared")
    return results


def _infer_types(first: Any, *_: Any, function: Any, types: Any) -> list[Any]:
    def like_first(shape: tuple[int, ...], dtype: Any) -> Any:
        sharding = first.sharding.update(spec=PartitionSpec(*[None] * len(shape)))
        return first.update(shape=shape, dtype=dtype, sharding=sharding, weak_type=False)

    return [like_first(*x) for x in types]


_deferred.def_abstract_eval(_infer_types)
_deferred.def_impl(jax.jit(_deferred.bind, static_argnames=("function", "types")))
mlir.register_lowering(_deferred, mlir.lower_fun(_run, multiple_results=True))
