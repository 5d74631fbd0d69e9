"""Functions that are traced only when the program that calls them is lowered.

Where the platform decides which kernel runs, every kernel is traced and all but one are thrown
away. Tracing a kernel takes up to a second; a deferred one takes none, for its results are
declared, and it is traced where it is kept.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np
from jax._src import dispatch
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

_deferred = Primitive("deferred_call")
_deferred.multiple_results = True


class Splittable(Protocol):
    """A function that knows how to split itself over the devices of a mesh. It must be hashable."""

    def __call__(self, *arrays: Array) -> list[Array]:
        """Runs on one device."""

    def over(self, mesh: Mesh) -> Callable[..., list[Array]]:
        """The same function, over all devices of a mesh."""


def deferred(
    function: Splittable, results: list[jax.ShapeDtypeStruct], *arrays: Array
) -> list[Array]:
    """`function(*arrays)`, traced at lowering.

    Args:
      function: calls with equal ones and equal types are traced once.
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


def _lower(ctx: mlir.LoweringRuleContext, *values: Any, function: Any, types: Any) -> Any:
    mesh = _mesh_to_split(ctx.module_context.axis_context)
    run = function if mesh is None else function.over(mesh)
    lower = mlir.lower_fun(partial(_run, function=run, types=types), multiple_results=True)
    return lower(ctx, *values)


def _mesh_to_split(context: Any) -> Mesh | None:
    """The mesh of a program for several devices, unless it is inside `shard_map` already."""
    devices = getattr(context, "device_assignment", None)
    mesh = getattr(context, "abstract_mesh", None)
    if devices is None or len(devices) == 1 or mesh is None:
        return None
    return Mesh(np.array(devices).reshape(mesh.axis_sizes), mesh.axis_names)


_deferred.def_abstract_eval(_infer_types)
_deferred.def_impl(jax.jit(_deferred.bind, static_argnames=("function", "types")))
mlir.register_lowering(_deferred, _lower)
# Or else a program is lowered before its devices are known. JAX has no public name for the set.
dispatch.prim_requires_devices_during_lowering.add(_deferred)
