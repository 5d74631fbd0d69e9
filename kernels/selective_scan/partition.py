"""Gradient, vmap and meshes for kernels that XLA cannot look into, in one place.

A Mosaic or Triton call is a black box: XLA neither differentiates it nor knows how to split it over
devices. But every scan is independent of the others in batch and in groups of channels, so

    gradient   a custom VJP of the two halves of a `Kernel`
    vmap       folded into the batch if only sequences are mapped, else into channels and groups
    a mesh     batch split as u's batch, channels as u's channels, everything else whole; gradients
               of what devices share are summed over them

The mesh is known only when XLA splits the program, after tracing: `custom_partitioning` calls back
then, with the shardings that Shardy propagated by the rule given here. On one device, and inside
`shard_map`, nothing of it remains in the program.
"""

import math
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from .base import Kernel, KernelScan, Tile, state_dtype
from .deferred import deferred

Arrays = dict[str, Array]

OPERANDS = ("u", "delta", "A", "B", "C", "D", "delta_bias", "initial_state")

# The axes of each array, also of its gradient. `kept` has axes of its own between these two.
_AXES = {
    **{"u": "bld", "delta": "bld", "A": "dn", "B": "blgn", "C": "blgn", "D": "d"},
    **{"delta_bias": "d", "initial_state": "bdn", "y": "bld", "state": "bdn", "kept": "bd"},
}
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
        return (results["y"], results["state"]), operands | {"kept": results["kept"]}

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


def varying_alike(*arrays: Array | None) -> tuple[Array | None, ...]:
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
        results = self._results(arrays)
        body = _Body(self, tuple(arrays), tuple(results))
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

    def _results(self, arrays: Arrays) -> dict[str, jax.ShapeDtypeStruct]:
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

    def __call__(self, *values: Array) -> list[Array]:
        arrays = dict(zip(self.names, values, strict=True))
        results = self.half.run(arrays)
        dtypes = arrays if self.half.backward else {"y": arrays["u"]}
        return [results[k].astype(dtypes.get(k, results[k]).dtype) for k in self.results]


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


def _axes(name: str, ndim: int) -> str:
    """One letter an axis; digits for the axes of `kept` that nothing else has."""
    if name != "kept":
        return _AXES[name]
    return "b" + "0123456789"[: ndim - 2] + "d"


def _axis_of(name: str, ndim: int, letters: str) -> int | None:
    """The axis that one of the letters names, counted from the end."""
    found = [i for i, letter in enumerate(_axes(name, ndim)) if letter in letters]
    return found[0] - ndim if found else None


def _fold(x: Array, name: str, letters: str, size: int, batched: bool) -> Array:
    """Merges a mapped axis, the first, into the axis that one of the letters names."""
    axis = _axis_of(name, x.ndim - batched, letters)
    if axis is None:
        return x
    if not batched:
        x = jnp.broadcast_to(x, (size, *x.shape))
    x = jnp.moveaxis(x, 0, axis - 1)
    at = x.ndim + axis
    return x.reshape(*x.shape[: at - 1], size * x.shape[at], *x.shape[at + 1 :])


def _unfold(x: Array, name: str, letters: str, size: int) -> Array:
    """Undoes `_fold`."""
    axis = _axis_of(name, x.ndim, letters)
    if axis is None:
        raise AssertionError(f"{name} is shared by the mapped calls")
    axis += x.ndim
    x = x.reshape(*x.shape[:axis], size, x.shape[axis] // size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _partitioned(half: _Half, arrays: Arrays) -> Arrays:
    """Runs a half, split over the mesh if XLA is about to split the program."""

    def run(arrays: Arrays) -> Arrays:
        return half(arrays)

    def partition(mesh: Mesh, operands: tuple[Any], results: Any) -> tuple[Any, ...]:
        (structs,) = operands
        split = _split(mesh, structs)

        def local(arrays: Arrays) -> Arrays:
            return {k: _total(half, split, k, x) for k, x in half(arrays).items()}

        def shardings(structs: dict[str, Any]) -> dict[str, NamedSharding]:
            return {k: split.sharding(k, x.ndim) for k, x in structs.items()}

        return mesh, local, shardings(results), (shardings(structs),)

    wrapped = custom_partitioning(run)
    wrapped.def_partition(
        partition=partition,
        sharding_rule=partial(_rule, half, arrays),
        decode_shardings=False,  # decoding fails where Shardy splits a mesh axis, as B's may be
    )
    return wrapped(arrays)


def _rule(half: _Half, arrays: Arrays, mesh: Mesh, _: Any, results: Any) -> tuple[str, dict]:
    """Shardy's rule for a half: batch and channels may be split, the other axes may not.

    Channels are groups x channels of a group where there are several of both.
    """
    groups = arrays["B"].shape[2]
    of_group = arrays["u"].shape[2] // groups
    both = groups > 1 and of_group > 1
    channels = "(g p)" if both else "g" if groups > 1 else "p"
    factors = {"d": channels, "g": "g" if groups > 1 else "one"}

    def describe(name: str, ndim: int) -> str:
        return " ".join(factors.get(x, f"k{x}" if x.isdigit() else x) for x in _axes(name, ndim))

    names = [k for k in OPERANDS if k in arrays] if half.backward else ["y", "state", "kept"]
    left = ", ".join(describe(k, arrays[k].ndim) for k in sorted(arrays))
    right = [describe(k, len(t.shape)) for k, t in zip(sorted(names), results, strict=True)]
    text = f"{left} -> {', '.join(right)}"
    # Shardy wants them in the order in which they first appear.
    in_order = dict.fromkeys(re.findall(r"\w+", text))
    whole = tuple(x for x in in_order if x not in ("b", "g", "p"))
    sizes = {"p": of_group} if both else {}  # a size is given where no axis has it
    return text, sizes | {"need_replication_factors": whole}


@dataclass(frozen=True)
class _Split:
    """Mesh axes over which a scan is split.

    Attributes:
      mesh: the mesh.
      batch: axes that split the batch.
      groups: axes that split channels into whole groups.
      within: axes that split further the channels of one group, who share its B and C.
    """

    mesh: Mesh
    batch: tuple[str, ...]
    groups: tuple[str, ...]
    within: tuple[str, ...]

    def sharding(self, name: str, ndim: int) -> NamedSharding:
        """How an array lies on the mesh."""
        of_letter = {"b": self.batch, "d": self.groups + self.within, "g": self.groups}
        spec = (of_letter.get(letter) or None for letter in _axes(name, ndim))
        return NamedSharding(self.mesh, PartitionSpec(*spec))


def _split(mesh: Mesh, structs: dict[str, Any]) -> _Split:
    """Follows u, as far as all devices get equally much and whole groups, or parts of one each."""
    u, groups = structs["u"], structs["B"].shape[2]
    batch, _, channels = _axes_of_mesh(mesh, u)

    def parts(axes: tuple[str, ...]) -> int:
        return math.prod(mesh.shape[x] for x in axes)

    while u.shape[0] % parts(batch):
        batch = batch[:-1]
    while u.shape[2] % parts(channels):
        channels = channels[:-1]
    whole = next(i for i in range(len(channels), -1, -1) if groups % parts(channels[:i]) == 0)
    if parts(channels[:whole]) < groups:
        return _Split(mesh, batch, channels[:whole], ())
    return _Split(mesh, batch, channels[:whole], channels[whole:])


def _axes_of_mesh(mesh: Mesh, struct: Any) -> list[tuple[str, ...]]:
    """For each axis of an array, the mesh axes that split it, major first; none if it is odd.

    XLA tells only which device holds what: a mesh axis splits the array's axis along which a step
    on the mesh moves the slice, the major one moving it furthest.
    """
    held = struct.sharding.devices_indices_map(struct.shape)
    starts = np.vectorize(lambda x: tuple(s.start or 0 for s in held[x]), otypes=[object])
    split: list[list[tuple[int, str]]] = [[] for _ in struct.shape]
    for name in mesh.axis_names:
        if mesh.shape[name] == 1:
            continue
        two = [mesh.devices[tuple(i * (x == name) for x in mesh.axis_names)] for i in (0, 1)]
        for axis, (here, there) in enumerate(zip(*starts(np.array(two)), strict=True)):
            if there != here:
                split[axis].append((there - here, name))
    axes = [tuple(name for _, name in sorted(found, reverse=True)) for found in split]
    whole_axes = NamedSharding(mesh, PartitionSpec(*(x or None for x in axes)))
    equal = whole_axes.is_equivalent_to(struct.sharding, len(struct.shape))
    return axes if equal else [()] * len(axes)


def _total(half: _Half, split: _Split, name: str, x: Array) -> Array:
    """The sum of a gradient over the devices that share its operand; other results as they are."""
    if not half.backward:
        return x
    letters = _axes(name, x.ndim)
    shared = () if "b" in letters else split.batch
    if "g" in letters:
        shared += split.within
    return jax.lax.psum(x, shared) if shared else x
