"""The two-dimensional selective scan: four routes through an image, scanned and summed.

Either kernels read all four routes in place (see `fused.py`), or each route is a scan of its own.
Then too all arguments stay in image layout and a backward route is a scan with `reverse=True`, so
that no flipped copy of the image is made, and of transposed ones only those of the column routes.
"""

import functools
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..matmul import matmul
from ..platforms import by_platform
from ..selective_scan import ShapeError, selective_scan
from ..selective_scan.base import as_array, as_optional_array, expect_floating, expect_shape
from .patterns import ScanPattern, add_up, flatten, routes_of, unflatten

if TYPE_CHECKING:
    from .fused_kernels import FusedName

_NORM_EPSILON = 1e-5
_log = logging.getLogger("zzhnet_jax")


class _Routes(NamedTuple):
    """The arguments of k scans over one image."""

    u: Float[Array, "b h w d"]
    delta: Float[Array, "b h w k d"] | Float[Array, "b h w k r"]
    A: Float[Array, "k d n"]
    B: Float[Array, "b h w k n"]
    C: Float[Array, "b h w k n"]
    D: Float[Array, "k d"] | None
    delta_bias: Float[Array, "k d"] | None
    dt_proj: Float[Array, "k r d"] | None


def selective_scan_2d(
    u: Float[Array, "b h w d"],
    delta: Float[Array, "b h w 4 d"] | Float[Array, "b h w 4 r"],
    A: Float[Array, "4 d n"],
    B: Float[Array, "b h w 4 n"],
    C: Float[Array, "b h w 4 n"],
    D: Float[Array, "4 d"] | None = None,
    *,
    delta_bias: Float[Array, "4 d"] | None = None,
    dt_proj: Float[Array, "4 r d"] | None = None,
    delta_softplus: bool = False,
    pattern: ScanPattern = "cross",
    implementation: str | None = None,
) -> Float[Array, "b h w d"]:
    """Scans an image along the four routes of a pattern and sums the results.

    The same as `cross_scan`, a selective scan of each route and `cross_merge`; but step sizes and
    matrices are given in image layout. What computes them sees one pixel at a time, so it may as
    well do so before the image is flattened.

    With pattern "cascade", u is normalised over its channels, its rows are scanned (routes 0 and
    1, see `scan_lines`), the result is normalised and its columns are scanned (routes 2 and 3). A
    layer that projects the parameters of the columns from what the rows gave, as VMamba's does,
    calls `normalize_channels` and `scan_lines` itself.

    Args:
      u: image; any dtype that `selective_scan` takes.
      delta: step sizes of each route before bias and softplus; of low rank with `dt_proj`.
      A: diagonal of each route's state matrix.
      B: input matrices of each route.
      C: output matrices of each route.
      D: weights of the direct path.
      delta_bias: added to delta before the softplus.
      dt_proj: route k's step sizes are delta[..., k, :] @ dt_proj[k], if it is given. The largest
        operand is then made in the order in which it is read, and never turned or copied.
      delta_softplus: as in `selective_scan`.
      pattern: as in `cross_scan`.
      implementation: as in `selective_scan`. "pallas_tpu" and "pallas_gpu", and None on a TPU or a
        CUDA device, read the routes in place and sum them there, if the pattern is not "cascade"
        and, for a TPU, an image fits in its VMEM.

    Returns:
      The sum over the routes, taken in float32 at least, in u's dtype.

    Raises:
      ShapeError: shapes or dtypes do not fit together.
      UnavailableError: the named implementation does not exist or cannot run here.
      ValueError: there is no such pattern.

    Source: Liu et al., "VMamba: Visual State Space Model", 2024.
    """
    routes_of(pattern)
    arrays = _validated(4, u, delta, A, B, C, D, delta_bias, dt_proj)
    if pattern == "cascade":
        y = arrays.u
        for first, columns in ((0, False), (2, True)):
            pair = _select(arrays, slice(first, first + 2))._replace(u=normalize_channels(y))
            y = _scan_lines(pair, columns, delta_softplus, implementation)
        return y

    expect_floating(**arrays._asdict())
    options = dict(pattern=pattern, delta_softplus=bool(delta_softplus))
    return _run(
        arrays,
        implementation=implementation,
        fuse=_where_fused(arrays, pattern, implementation),
        **options,
    )


def _where_fused(
    arrays: _Routes, pattern: ScanPattern, implementation: str | None
) -> tuple["FusedName", ...]:
    """The kernels that are to scan all routes, each on its platform."""
    if implementation not in (None, "pallas_tpu", "pallas_gpu"):
        return ()
    from . import fused_kernels  # Pallas takes long to import

    shape = (*arrays.delta.shape[:-1], arrays.u.shape[-1])
    delta = jax.ShapeDtypeStruct(shape, arrays.delta.dtype)
    chosen = []
    for name, kernels in fused_kernels.KERNELS.items():
        if implementation is not None and (implementation != name or kernels.unavailable()):
            continue  # the scan of a single route says why
        reason = fused_kernels.unsupported(name, arrays.u, delta, *arrays[2:-1], pattern=pattern)
        _tell(name, reason)
        if reason is None:
            chosen.append(name)
    return tuple(chosen)


@functools.cache
def _tell(name: str, reason: str | None) -> None:
    """Logs what was decided, the first time it is."""
    what = "all routes in place" if reason is None else f"each route by itself: {reason}"
    _log.info("selective_scan_2d with %s runs %s", name, what)


@partial(jax.jit, static_argnames=("pattern", "delta_softplus", "implementation", "fuse"))
def _run(
    arrays: _Routes,
    *,
    pattern: ScanPattern,
    delta_softplus: bool,
    implementation: str | None,
    fuse: tuple["FusedName", ...],
) -> Float[Array, "b h w d"]:
    """The scan of validated arguments, of a pattern other than the cascade."""

    def together(name: "FusedName", *arrays: Any) -> Float[Array, "b h w d"]:
        from .fused import fused_scan

        y = fused_scan(*arrays, name=name, delta_softplus=delta_softplus, pattern=pattern)
        return y.astype(arrays[0].dtype)

    def one_by_one(*arrays: Any) -> Float[Array, "b h w d"]:
        return _scan_routes(_Routes(*arrays), pattern, delta_softplus, implementation)

    if not fuse:
        return one_by_one(*arrays)
    if implementation is not None:
        return together(fuse[0], *arrays)
    from .fused_kernels import KERNELS

    fused = {KERNELS[name].platform: partial(together, name) for name in fuse}
    return by_platform(*arrays, **fused, default=one_by_one)


def _scan_routes(
    arrays: _Routes, pattern: ScanPattern, delta_softplus: bool, implementation: str | None
) -> Float[Array, "b h w d"]:
    """One scan for each route."""
    height, width = arrays.u.shape[1:3]
    images = []
    for k, (columns, backward) in enumerate(routes_of(pattern)):

        def arrange(x: Array, columns: bool = columns) -> Array:
            return flatten(x, columns=columns)

        y = _scan_route(arrays, k, arrange, backward, delta_softplus, implementation)
        images.append(unflatten(y, height, width, columns=columns))
    return add_up(images).astype(arrays.u.dtype)


def scan_lines(
    u: Float[Array, "b h w d"],
    delta: Float[Array, "b h w 2 d"] | Float[Array, "b h w 2 r"],
    A: Float[Array, "2 d n"],
    B: Float[Array, "b h w 2 n"],
    C: Float[Array, "b h w 2 n"],
    D: Float[Array, "2 d"] | None = None,
    *,
    columns: bool,
    delta_bias: Float[Array, "2 d"] | None = None,
    dt_proj: Float[Array, "2 r d"] | None = None,
    delta_softplus: bool = False,
    implementation: str | None = None,
) -> Float[Array, "b h w d"]:
    """One pass of the cascade: every row (or column) is a sequence, scanned forward and backward.

    The backward result is summed in the order in which it was computed: pixel j of a row receives
    the backward output of pixel w - 1 - j. VMamba defines the cascade so; its weights rely on it.

    Args:
      u: image; the cascade passes it through `normalize_channels` first.
      delta: step sizes in image layout, of the forward and the backward scan.
      A: diagonals of their state matrices.
      B: their input matrices.
      C: their output matrices.
      D: weights of their direct paths.
      columns: scan columns instead of rows.
      delta_bias: added to delta before the softplus.
      dt_proj: as in `selective_scan_2d`.
      delta_softplus: as in `selective_scan`.
      implementation: as in `selective_scan`.

    Returns:
      The sum of both scans, taken in float32 at least, in u's dtype.

    Raises:
      ShapeError: shapes or dtypes do not fit together.
      UnavailableError: the named implementation does not exist or cannot run here.
    """
    arrays = _validated(2, u, delta, A, B, C, D, delta_bias, dt_proj)
    return _scan_lines(arrays, columns, delta_softplus, implementation)


def normalize_channels(x: Float[Array, "... c"]) -> Float[Array, "... c"]:
    """Layer normalisation over channels, without weights, as the cascade has it before each pass.

    Args:
      x: any floating dtype; mean and variance are taken in float32 at least.

    Returns:
      (x - mean) / sqrt(variance + 1e-5), in x's dtype.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(centred**2, axis=-1, keepdims=True)
    return (centred / jnp.sqrt(variance + _NORM_EPSILON)).astype(x.dtype)


def _scan_lines(
    arrays: _Routes, columns: bool, delta_softplus: bool, implementation: str | None
) -> Float[Array, "b h w d"]:
    def arrange(x: Float[Array, "b h w *c"]) -> Float[Array, "lines length *c"]:
        x = jnp.swapaxes(x, 1, 2) if columns else x
        return x.reshape(-1, *x.shape[2:])

    forward, backward = (
        _scan_route(arrays, k, arrange, bool(k), delta_softplus, implementation) for k in (0, 1)
    )
    b, h, w, d = arrays.u.shape
    y = (forward + backward[:, ::-1]).reshape((b, w, h, d) if columns else (b, h, w, d))
    return (jnp.swapaxes(y, 1, 2) if columns else y).astype(arrays.u.dtype)


def _scan_route(
    arrays: _Routes,
    k: int,
    arrange: Callable[[Array], Array],
    backward: bool,
    delta_softplus: bool,
    implementation: str | None,
) -> Array:
    """The scan of route k over sequences that `arrange` makes of an image, in a wide dtype."""
    u, delta, A, B, C, D, delta_bias, dt_proj = arrays
    wide = jnp.promote_types(u.dtype, jnp.float32)
    delta = arrange(delta[..., k, :])
    return selective_scan(
        arrange(u.astype(wide)),
        delta if dt_proj is None else matmul(delta, dt_proj[k]),
        A[k],
        arrange(B[..., k : k + 1, :]),
        arrange(C[..., k : k + 1, :]),
        None if D is None else D[k],
        delta_bias=None if delta_bias is None else delta_bias[k],
        delta_softplus=delta_softplus,
        reverse=backward,
        implementation=implementation,
    )


def _select(arrays: _Routes, routes: slice) -> _Routes:
    """Only some of the routes."""
    u, delta, A, B, C, D, delta_bias, dt_proj = arrays
    return _Routes(
        u=u,
        delta=delta[..., routes, :],
        A=A[routes],
        B=B[..., routes, :],
        C=C[..., routes, :],
        D=None if D is None else D[routes],
        delta_bias=None if delta_bias is None else delta_bias[routes],
        dt_proj=None if dt_proj is None else dt_proj[routes],
    )


def _validated(
    routes: int,
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    delta_bias: Array | None,
    dt_proj: Array | None,
) -> _Routes:
    """The arguments as arrays, their shapes checked; `selective_scan` checks their dtypes."""
    u, delta, A, B, C = (as_array(x) for x in (u, delta, A, B, C))
    D, delta_bias, dt_proj = (as_optional_array(x) for x in (D, delta_bias, dt_proj))
    if u.ndim != 4 or 0 in u.shape:
        raise ShapeError(f"u has shape {u.shape}: expected (b, h, w, d), all >= 1")
    *image, d = u.shape
    if A.ndim != 3 or A.shape[:2] != (routes, d) or A.shape[2] < 1:
        raise ShapeError(f"A has shape {A.shape}: expected ({routes}, {d}, d_state >= 1)")
    n = A.shape[2]
    if dt_proj is None:
        expect_shape("delta", delta, (*image, routes, d))
    else:
        rank = dt_proj.shape[1] if dt_proj.ndim == 3 else 1
        expect_shape("dt_proj", dt_proj, (routes, rank, d))
        expect_shape("delta", delta, (*image, routes, rank))
    expect_shape("B", B, (*image, routes, n))
    expect_shape("C", C, (*image, routes, n))
    expect_shape("D", D, (routes, d))
    expect_shape("delta_bias", delta_bias, (routes, d))
    return _Routes(u, delta, A, B, C, D, delta_bias, dt_proj)
