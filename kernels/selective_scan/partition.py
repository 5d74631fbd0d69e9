"""Gradient, vmap and meshes for kernels that XLA cannot look into, in one place.

A Mosaic or Triton call is a black box: XLA neither differentiates it nor knows how to split it over
devices. But every scan is independent of the others in batch and in groups of channels, so

    gradient   a custom VJP of the two halves of a `Kernel`
    vmap       folded into the batch if only sequences are mapped, else into channels and groups
    a mesh     batch and channels are split, everything else is whole on every device; gradients of
               what devices share are summed over them

The mesh is known only when the program is lowered. XLA then calls back, when it has propagated
shardings by the rule of `mesh_split`; except on TPUs, where the half becomes a `shard_map` over the
axes that `split_over` declares. On one device, and inside `shard_map`, nothing of it remains.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float

from ..platforms import by_platform
from .base import Kernel, KernelScan, Tile, state_dtype
from .deferred import deferred
from .mesh_split import (
    AXES,
    OPERANDS,
    MeshAxes,
    Split,
    axes_of,
    declared_axes,
    guess_axes,
    plan_split,
    sharding_rule,
)

Arrays = dict[str, Array]

_SHARED_BY_BATCH = ("A", "D", "delta_bias")


def differentiable(kernel: Kernel) -> KernelScan:
    """A scan that runs a kernel, differentiable and usable under jit, vmap, checkpoint and meshes.

    Besides the arguments of every scan it takes `tile`, block sizes or None for the kernel's own
    choice, and `interpret`, handed to the kernel's `pallas_call`.
    """

    @partial(jax.custom_vjp, nondiff_argnums=(0,))
    def run(flags: tuple[tuple[str, Any], ...], operands: Arrays) -> tuple[Array, Array]:
        results = _call(_Half(kernel, False, flags), operands)
        return results["y"], results["state"]

    def forward(
        flags: tuple[tuple[str, Any], ...], operands: Arrays
    ) -> tuple[tuple[Array, Array], Arrays]:
        results = _call(_Half(kernel, False, flags), operands)
        # Kept by those who compute everything else again, see `zzhnet_jax.models.functional`.
        y, kept = (checkpoint_name(results[name], "scan_states") for name in ("y", "kept"))
        return (y, results["state"]), operands | {"kept": kept}

    def backward(
        flags: tuple[tuple[str, Any], ...], residuals: Arrays, gradients: tuple[Array, Array]
    ) -> tuple[Arrays]:
        y, state = gradients
        return (_call(_Half(kernel, True, flags), residuals | {"y": y, "state": state}),)

    run.defvjp(forward, backward)

    def scan(
        u: Float[Array, "b l d"],
        delta: Float[Array, "b l d"],
        A: Float[Array, "d n"],
        B: Float[Array, "b l g n"],
        C: Float[Array, "b l g n"],
        D: Float[Array, "d"] | None,
        delta_bias: Float[Array, "d"] | None,
        initial_state: Float[Array, "b d n"] | None,
        *,
        delta_softplus: bool,
        reverse: bool,
        tile: Tile | None = None,
        interpret: Any = False,
    ) -> tuple[Float[Array, "b l d"], Float[Array, "b d n"]]:
        values = (u, delta, A, B, C, D, delta_bias, initial_state)
        operands = {k: x for k, x in zip(OPERANDS, values, strict=True) if x is not None}
        flags = dict(delta_softplus=delta_softplus, reverse=reverse, tile=tile, interpret=interpret)
        return run(tuple(flags.items()), operands)

    return scan


def varying_alike(*arrays: Array | None) -> tuple[Any, ...]:
    """The same values, all varying over the union of the mesh axes that any of them varies over.

    Inside `shard_map`, a kernel takes operands of one kind only, and the gradient of an operand
    that all devices share must be summed over them: that sum is the transpose of this.
    """
    given = [x for x in arrays if x is not None]
    varies = [jax.typeof(x).manual_axis_type.varying for x in given]
    union = frozenset().union(*varies)

    def vary(x: Array | None) -> Array | None:
        if x is None:
            return None
        missing = union - jax.typeof(x).manual_axis_type.varying
        return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x

    return tuple(vary(x) for x in arrays)


@dataclass(frozen=True)
class _Half:
    """The forward or the backward half of a kernel, as a function from named arrays to others."""

    kernel: Kernel
    backward: bool
    flags: tuple[tuple[str, Any], ...]

    def __call__(self, arrays: Arrays) -> Arrays:
        """Runs it; what the kernel does is traced only when the program is lowered."""
        results = self.results(arrays)
        body = _Body(self, tuple(arrays), tuple(results), declared_axes())
        values = deferred(body, list(results.values()), *arrays.values())
        return dict(zip(results, values, strict=True))

    def run(self, arrays: Arrays) -> Arrays:
        """Runs it here and now."""
        operands: list[Any] = [arrays.get(name) for name in OPERANDS]
        if not self.backward:
            y, state, kept = self.kernel.forward(*operands, **dict(self.flags))
            return {"y": y, "state": state, "kept": kept}
        rest = (arrays[name] for name in ("kept", "y", "state"))
        gradients = self.kernel.backward(*operands, *rest, **dict(self.flags))
        return {k: x for k, x in zip(OPERANDS, gradients, strict=True) if x is not None}

    def total(self, split: Split, name: str, x: Array) -> Array:
        """The sum of a gradient over the devices that share its operand; other results as given."""
        if not self.backward:
            return x
        shared = () if "b" in AXES[name] else split.batch
        if "g" in AXES[name]:
            shared += split.within
        return lax.psum(x, shared) if shared else x

    def results(self, arrays: Arrays) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the results."""
        if self.backward:
            given = {k: arrays[k] for k in OPERANDS if k in arrays}
            return {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in given.items()}
        u, A = arrays["u"], arrays["A"]
        (b, length, d), n = u.shape, A.shape[1]
        wide = state_dtype(*arrays.values())
        kept = self.kernel.kept(length, n, dict(self.flags)["tile"])
        return {
            "y": jax.ShapeDtypeStruct(u.shape, u.dtype),
            "state": jax.ShapeDtypeStruct((b, d, n), wide),
            "kept": jax.ShapeDtypeStruct((b, kept, n, d), wide),
        }


@dataclass(frozen=True)
class _Body:
    """A half as a function from arrays to arrays, hashable, in the dtypes that were declared."""

    half: _Half
    names: tuple[str, ...]
    results: tuple[str, ...]
    axes: MeshAxes | None

    def __call__(self, *values: Array) -> list[Array]:
        arrays = dict(zip(self.names, values, strict=True))
        results = self.half.run(arrays)
        dtypes = arrays if self.half.backward else {"y": arrays["u"]}
        return [results[k].astype(dtypes.get(k, results[k]).dtype) for k in self.results]

    def over(self, mesh: Mesh) -> Callable[..., list[Array]]:
        """The same, split over a mesh."""

        def run(*values: Array) -> list[Array]:
            arrays = dict(zip(self.names, values, strict=True))
            axes = self.axes or guess_axes(mesh, arrays["u"].shape[0])
            split = plan_split(mesh, axes, arrays)

            def local(*values: Array) -> list[Array]:
                parts = zip(self.results, self(*values), strict=True)
                return [self.half.total(split, k, x) for k, x in parts]

            return jax.shard_map(
                local,
                mesh=mesh,
                in_specs=tuple(split.sharding(k).spec for k in self.names),
                out_specs=[split.sharding(k).spec for k in self.results],
                check_vma=False,
            )(*values)

        return run


def _call(half: _Half, arrays: Arrays) -> Arrays:
    """Runs a half under whatever `vmap` and mesh there are."""

    @custom_vmap
    def run(arrays: Arrays) -> Arrays:
        return _partitioned(half, arrays)

    @run.def_vmap
    def mapped(size: int, batched: list[dict[str, bool]], arrays: Arrays) -> tuple[Arrays, Any]:
        (is_batched,) = batched
        # The backward half sums gradients over the batch, but not over mapped calls.
        into_batch = not half.backward and not any(is_batched.get(k) for k in _SHARED_BY_BATCH)
        letters = "b" if into_batch else "dg"
        folded = {k: _fold(x, k, letters, size, is_batched[k]) for k, x in arrays.items()}
        results = _call(half, folded)
        results = {k: _unfold(x, k, letters, size) for k, x in results.items()}
        return results, dict.fromkeys(results, True)

    return run(arrays)


def _axis_of(name: str, letters: str) -> int | None:
    """The axis that one of the letters names, counted from the end."""
    found = [i for i, letter in enumerate(AXES[name]) if letter in letters]
    return found[0] - len(AXES[name]) if found else None


def _fold(x: Array, name: str, letters: str, size: int, batched: bool) -> Array:
    """Merges a mapped axis, the first, into the axis that one of the letters names."""
    axis = _axis_of(name, letters)
    if axis is None:
        return x
    if not batched:
        x = jnp.broadcast_to(x, (size, *x.shape))
    x = jnp.moveaxis(x, 0, axis - 1)
    at = x.ndim + axis
    return x.reshape(*x.shape[: at - 1], size * x.shape[at], *x.shape[at + 1 :])


def _unfold(x: Array, name: str, letters: str, size: int) -> Array:
    """Undoes `_fold`."""
    axis = _axis_of(name, letters)
    if axis is None:
        raise AssertionError(f"{name} is shared by the mapped calls")
    axis += x.ndim
    x = x.reshape(*x.shape[:axis], size, x.shape[axis] // size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _partitioned(half: _Half, arrays: Arrays) -> Arrays:
    """Runs a half, split over the mesh if XLA is about to split the program.

    On TPUs XLA never calls back (jax-ml/jax#38196); there `deferred` splits it, as declared.
    """

    def run(arrays: Arrays) -> Arrays:
        return half(arrays)

    def partition(mesh: Mesh, operands: tuple[Any], results: Any) -> tuple[Any, ...]:
        (structs,) = operands
        split = plan_split(mesh, axes_of(mesh, structs["u"]), structs)

        def local(arrays: Arrays) -> Arrays:
            return {k: half.total(split, k, x) for k, x in half(arrays).items()}

        def shardings(structs: dict[str, Any]) -> dict[str, NamedSharding]:
            return {k: split.sharding(k) for k in structs}

        return mesh, local, shardings(results), (shardings(structs),)

    by_xla = custom_partitioning(run)
    rule = sharding_rule(arrays, half.results(arrays))
    by_xla.def_partition(
        partition=partition,
        sharding_rule=lambda *_: rule,
        decode_shardings=False,  # decoding fails where Shardy splits a mesh axis, as B's may be
    )
    return by_platform(arrays, tpu=run, default=by_xla)
