"""The fused two-dimensional scan as JAX sees it: its gradient, vmap and meshes.

As in `selective_scan.partition`, a kernel is two black boxes, a forward and a backward half, and
images and channels are independent of each other. Mapped calls are folded into the batch; devices
take parts of the batch or of the channels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from ..selective_scan.deferred import deferred
from ..selective_scan.mesh_split import MeshAxes, declared_axes, guess_axes
from ..selective_scan.partition import varying_alike
from .frame import ROUTES, Frame, frame_of
from .fused_kernels import IMAGE, KERNELS, FusedName
from .patterns import ScanPattern

# Axes of the arrays: b h w d, k routes, n states, l kept ones; m = 2 n, p = n + 1. Operands are u,
# the step sizes, in one array or one for each route, A, B, C, D and delta_bias.
_AFTER_STEPS = ("kdn", "bhwkn", "bhwkn", "kd", "kd")
_FORWARD = (IMAGE, "bknld")
_AFTER_STEP_GRADIENTS = ("bhwkm", "bkpd", "bod")


def fused_scan(
    u: Float[Array, "b h w d"],
    delta: Float[Array, "b h w 4 d"] | Float[Array, "b h w 4 r"],
    A: Float[Array, "4 d n"],
    B: Float[Array, "b h w 4 n"],
    C: Float[Array, "b h w 4 n"],
    D: Float[Array, "4 d"] | None,
    delta_bias: Float[Array, "4 d"] | None,
    dt_proj: Float[Array, "4 r d"] | None = None,
    *,
    name: FusedName,
    delta_softplus: bool,
    pattern: ScanPattern,
    interpret: Any = False,
) -> Float[Array, "b h w d"]:
    """The scan of an image along four routes, summed; see `selective_scan_2d`.

    `name` says by which kernels. `interpret` is handed to `pallas_call`; it must be hashable. y
    is in u's dtype or a wider one.
    """
    nothing = jnp.zeros(A.shape[:2], jnp.float32)
    weights = (nothing if x is None else x for x in (D, delta_bias))
    small = (x.astype(jnp.float32) for x in (A, B, C, *weights))
    options = _Options(name, pattern, delta_softplus, interpret)
    steps = KERNELS[name].steps(delta, dt_proj)
    return _scan(options, *varying_alike(*(_accepted(x) for x in (u, *steps)), *small))


def _accepted(x: Array) -> Array:
    """`x` in a dtype that all kernels take: Mosaic has no float16."""
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


@dataclass(frozen=True)
class _Options:
    """What is fixed at trace time."""

    name: FusedName
    pattern: ScanPattern
    delta_softplus: bool
    interpret: Any


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(options: _Options, *operands: Array) -> Float[Array, "b h w d"]:
    return _call(_Half(options, False, declared_axes()), *operands)[0]


def _scan_forward(options: _Options, *operands: Array) -> tuple[Array, tuple[Array, ...]]:
    results = _call(_Half(options, False, declared_axes()), *operands)
    # Named as what the scan of a single route keeps.
    y, starts = (checkpoint_name(x, "scan_states") for x in results)
    return y, (*operands, starts)


def _scan_backward(
    options: _Options, residuals: tuple[Array, ...], y_gradient: Float[Array, "b h w d"]
) -> tuple[Array, ...]:
    n = _d_state(options, residuals)
    *images, matrices, weights, direct = _call(
        _Half(options, True, declared_axes()), *residuals, y_gradient
    )
    weights, direct = jnp.sum(weights, 0), jnp.sum(direct, 0)
    A, delta_bias = weights[:, :n].swapaxes(1, 2), weights[:, n]
    D = jnp.broadcast_to(direct, delta_bias.shape)
    return *images, A, matrices[..., :n], matrices[..., n:], D, delta_bias


_scan.defvjp(_scan_forward, _scan_backward)


def _d_state(options: _Options, arrays: tuple[Array, ...]) -> int:
    return int(arrays[1 + len(KERNELS[options.name].step_axes)].shape[2])


@dataclass(frozen=True)
class _Half:
    """The forward or the backward half of the scan, as a function from arrays to arrays.

    Gradients of what images share are given for each image.

    Attributes:
      options: what is fixed at trace time.
      backward: which half.
      mesh_axes: over which axes of a mesh to split it, if that is declared.
    """

    options: _Options
    backward: bool
    mesh_axes: MeshAxes | None

    @property
    def axes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The axes of the operands and of the results."""
        steps = KERNELS[self.options.name].step_axes
        operands = (IMAGE, *steps, *_AFTER_STEPS)
        if self.backward:
            return (*operands, _FORWARD[1], _FORWARD[0]), (IMAGE, *steps, *_AFTER_STEP_GRADIENTS)
        return operands, _FORWARD

    def results(self, *arrays: Array) -> list[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the results."""
        u, n = arrays[0], _d_state(self.options, arrays)
        b, h, w, d = u.shape
        if not self.backward:
            kept = KERNELS[self.options.name].kept_shape(self.frame(*arrays))
            return [jax.ShapeDtypeStruct(*x) for x in ((u.shape, u.dtype), (kept, jnp.float32))]
        shapes = ((b, h, w, ROUTES, 2 * n), (b, ROUTES, n + 1, d), (b, 1, d))
        images = arrays[: 1 + len(KERNELS[self.options.name].step_axes)]
        of_images = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in images]
        return of_images + [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def frame(self, *arrays: Array) -> Frame:
        """The sizes of the scan."""
        options = self.options
        return frame_of(
            arrays[0],
            _d_state(options, arrays),
            options.pattern,
            delta_softplus=options.delta_softplus,
            interpret=options.interpret,
        )

    def __call__(self, *arrays: Array) -> list[Array]:
        """Runs the half."""
        kernels = KERNELS[self.options.name]
        run = kernels.backward if self.backward else kernels.forward
        return run(self.frame(*arrays), *arrays)

    def over(self, mesh: Mesh) -> Callable[..., list[Array]]:
        """The same, split over a mesh: devices take parts of the batch and of the channels."""
        operands, results = self.axes

        def run(*arrays: Array) -> list[Array]:
            b, _, _, d = arrays[0].shape
            axes = self.mesh_axes or guess_axes(mesh, b)
            parts = {"b": _dividing(b, axes.batch, mesh), "d": _dividing(d, axes.channels, mesh)}

            def spec(letters: str) -> PartitionSpec:
                return PartitionSpec(*(parts.get(x) or None for x in letters))

            def local(*arrays: Array) -> list[Array]:
                found = zip(self(*arrays), results, strict=True)
                if not parts["d"]:
                    return [x for x, _ in found]
                return [x if "d" in letters else lax.psum(x, parts["d"]) for x, letters in found]

            in_specs, out_specs = tuple(map(spec, operands)), list(map(spec, results))
            split = jax.shard_map(
                local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
            )
            return split(*arrays)

        return run


def _dividing(size: int, axes: tuple[str, ...], mesh: Mesh) -> tuple[str, ...]:
    """As many of the first axes as divide the size."""
    while size % math.prod(mesh.shape[x] for x in axes):
        axes = axes[:-1]
    return axes


def _call(half: _Half, *arrays: Array) -> list[Array]:
    """Runs a half under whatever `vmap` there is; it is traced only when lowered, then split."""

    @custom_vmap
    def run(*arrays: Array) -> list[Array]:
        return deferred(half, half.results(*arrays), *arrays)

    @run.def_vmap
    def mapped(size: int, batched: list[bool], *arrays: Array) -> tuple[list[Array], list[bool]]:
        every = [True] * len(half.axes[1])
        shared = ["b" not in letters for letters in half.axes[0]]  # A, D and delta_bias
        if any(x and y for x, y in zip(batched, shared, strict=True)):

            def one(i: Array) -> list[Array]:
                pairs = zip(arrays, batched, strict=True)
                return _call(half, *(x[i] if is_batched else x for x, is_batched in pairs))

            return lax.map(one, jnp.arange(size)), every
        folded = []
        for i, (x, is_batched) in enumerate(zip(arrays, batched, strict=True)):
            if not shared[i]:
                x = x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
                x = x.reshape(-1, *x.shape[2:])
            folded.append(x)
        return [x.reshape(size, -1, *x.shape[1:]) for x in _call(half, *folded)], every

    return run(*arrays)
