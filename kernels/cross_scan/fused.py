"""The fused two-dimensional scan as JAX sees it: when it can run, its gradient, vmap and meshes.

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
from .frame import ROUTES, Frame, arrange, join_routes, vmem_capacity
from .fused_tpu import forward
from .fused_tpu_vjp import backward, backward_vmem
from .patterns import ScanPattern

MAX_STATES = 16  # as many states of a group of lines as the registers hold

# Axes of the arrays: b h w d, k routes, n states, l lines; m = 2 n, p = n + 1.
_OPERANDS = ("bhwd", "bhwkd", "kdn", "bhwkn", "bhwkn", "kd", "kd")
_WEIGHTS = (2, 5, 6)  # A, D and delta_bias: operands that all images share
_FORWARD = ("bhwd", "bknld")
_BACKWARD = ("bhwd", "bhwkd", "bhwkm", "bkpd", "bod")


def unavailable() -> str | None:
    """Why the kernel cannot run on this machine, or None if it can."""
    platform = jax.default_backend()
    return None if platform == "tpu" else f"it needs a TPU, and JAX runs on {platform} here"


def unsupported(
    u: Array | jax.ShapeDtypeStruct,
    delta: Array | jax.ShapeDtypeStruct,
    A: Array | jax.ShapeDtypeStruct,
    *others: Array | jax.ShapeDtypeStruct | None,
    pattern: ScanPattern,
) -> str | None:
    """Why the kernel cannot take the operands of `fused_scan`, or None if it can."""
    if any(x is not None and x.dtype == jnp.float64 for x in (u, delta, A, *others)):
        return "it has no float64"
    if A.shape[2] > MAX_STATES:
        return f"d_state is {A.shape[2]}: it takes at most {MAX_STATES}"
    frame = frame_of((*u.shape, A.shape[2]), pattern)
    narrow = 3 * (u.dtype == jnp.bfloat16) + 2 * (delta.dtype == jnp.bfloat16)
    needed, capacity = backward_vmem(frame, narrow), vmem_capacity()
    if needed > capacity:
        return (
            f"a {frame.height} x {frame.width} image takes {needed / 2**20:.0f} MiB of VMEM, of"
            f" which there are {capacity / 2**20:.0f}"
        )
    return None


def fused_scan(
    u: Float[Array, "b h w d"],
    delta: Float[Array, "b h w 4 d"],
    A: Float[Array, "4 d n"],
    B: Float[Array, "b h w 4 n"],
    C: Float[Array, "b h w 4 n"],
    D: Float[Array, "4 d"] | None,
    delta_bias: Float[Array, "4 d"] | None,
    *,
    delta_softplus: bool,
    pattern: ScanPattern,
    interpret: Any = False,
) -> Float[Array, "b h w d"]:
    """The scan of an image along four routes, summed; see `selective_scan_2d`.

    `interpret` is handed to `pallas_call`; it must be hashable. y is in u's dtype or a wider one.
    """
    nothing = jnp.zeros(A.shape[:2], jnp.float32)
    weights = (nothing if x is None else x for x in (D, delta_bias))
    small = (x.astype(jnp.float32) for x in (A, B, C, *weights))
    options = _Options(pattern, delta_softplus, interpret)
    return _scan(options, *varying_alike(_accepted(u), _accepted(delta), *small))


def frame_of(
    sizes: tuple[int, ...],
    pattern: ScanPattern,
    delta_softplus: bool = True,
    interpret: Any = False,
) -> Frame:
    """The frame of a scan with sizes (b, h, w, d, n)."""
    b, h, w, d, n = sizes
    return Frame(b, h, w, d, n, pattern, delta_softplus, interpret)


def _accepted(x: Array) -> Array:
    """`x` in a dtype that Mosaic takes: it has no float16."""
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


@dataclass(frozen=True)
class _Options:
    """What is fixed at trace time."""

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
    n = residuals[2].shape[2]
    u, delta, matrices, weights, direct = _call(
        _Half(options, True, declared_axes()), *residuals, y_gradient
    )
    weights, direct = jnp.sum(weights, 0), jnp.sum(direct, 0)
    A, delta_bias = weights[:, :n].swapaxes(1, 2), weights[:, n]
    D = jnp.broadcast_to(direct, delta_bias.shape)
    return u, delta, A, matrices[..., :n], matrices[..., n:], D, delta_bias


_scan.defvjp(_scan_forward, _scan_backward)


@dataclass(frozen=True)
class _Half:
    """The forward or the backward half of the kernel, as a function from arrays to arrays.

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
        if self.backward:
            return (*_OPERANDS, _FORWARD[1], _FORWARD[0]), _BACKWARD
        return _OPERANDS, _FORWARD

    def results(self, *arrays: Array) -> list[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the results."""
        u, delta, A, *_ = arrays
        b, h, w, d = u.shape
        n = A.shape[2]
        if not self.backward:
            starts = self.frame(*arrays).starts_shape
            return [jax.ShapeDtypeStruct(*x) for x in ((u.shape, u.dtype), (starts, jnp.float32))]
        shapes = ((b, h, w, ROUTES, 2 * n), (b, ROUTES, n + 1, d), (b, 1, d))
        images = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (u, delta)]
        return images + [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def frame(self, *arrays: Array) -> Frame:
        """The sizes of the scan."""
        options = self.options
        sizes = (*arrays[0].shape, arrays[2].shape[2])
        return frame_of(sizes, options.pattern, options.delta_softplus, options.interpret)

    def __call__(self, *arrays: Array) -> list[Array]:
        """Runs the half."""
        frame = self.frame(*arrays)
        inputs = arrange(frame, *arrays[: len(_OPERANDS)])
        image = arrays[0].shape
        if not self.backward:
            y, starts = forward(frame, inputs)
            return [y.reshape(image), starts]
        starts, y_gradient = arrays[len(_OPERANDS) :]
        of = backward(frame, inputs, starts, y_gradient.reshape(inputs.u.shape))
        matrices = of.matrices.reshape(*image[:3], ROUTES, -1)
        return [of.u.reshape(image), join_routes(frame, of.delta), matrices, of.weights, of.direct]

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
        if any(batched[i] for i in _WEIGHTS):

            def one(i: Array) -> list[Array]:
                pairs = zip(arrays, batched, strict=True)
                return _call(half, *(x[i] if is_batched else x for x, is_batched in pairs))

            return lax.map(one, jnp.arange(size)), every
        folded = []
        for i, (x, is_batched) in enumerate(zip(arrays, batched, strict=True)):
            if i not in _WEIGHTS:
                x = x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
                x = x.reshape(-1, *x.shape[2:])
            folded.append(x)
        return [x.reshape(size, -1, *x.shape[1:]) for x in _call(half, *folded)], every

    return run(*arrays)
