"""The fused two-dimensional scan for GPUs: four routes, one kernel after another, over one image.

    u, y           (b, l, d) in image layout, l = h * w; a route reads a pixel's channels where they
                   lie, side by side whichever way it goes
    delta          an array like u for each route, so that none is cut out of another
    B, C           (b, l, 4, n)
    y              summed in float32; every route but the first adds to what it finds there

Each route is the scan of `selective_scan.pallas_gpu_forward`, with another order of time. No copy
of the image is made, transposed or other, and no result of a single route is ever written. Routes
cannot run at once, as they add to the same pixels; a route alone has enough programs for a GPU.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..matmul import matmul
from ..selective_scan.pallas_gpu_forward import kept_states, scan
from ..selective_scan.pallas_gpu_plan import ImageRoute, Operands, Plan, make_plan
from ..selective_scan.pallas_gpu_vjp import differentiate
from .frame import ROUTES, Frame
from .patterns import routes_of


def step_sizes(
    delta: Float[Array, "b h w 4 d"] | Float[Array, "b h w 4 r"],
    dt_proj: Float[Array, "4 r d"] | None,
) -> list[Float[Array, "b h w d"]]:
    """Step sizes of each route before bias and softplus."""
    parts = [delta[..., k, :] for k in range(ROUTES)]
    if dt_proj is None:
        return parts
    return [matmul(part, dt_proj[k]) for k, part in enumerate(parts)]


def kept_shape(frame: Frame) -> tuple[int, ...]:
    """Shape of the states that are kept of each route."""
    kept = kept_states(frame.height * frame.width, frame.states, None, line=frame.height)
    return frame.batch, ROUTES, kept, frame.states, frame.channels


def forward(frame: Frame, *arrays: Array) -> list[Array]:
    """Runs the forward kernels.

    Args:
      frame: sizes of the scan.
      arrays: u, the step sizes of each route, A, B, C, D and delta_bias.

    Returns:
      y in u's dtype, and the kept states, of `kept_shape`.
    """
    u = arrays[0]
    y, kept = None, []
    for k in range(ROUTES):
        operands, plan = _route(frame, k, arrays)
        out = scan(plan, operands, _no_state(frame), y=y, y_dtype=jnp.float32)
        y = out["y"]
        kept.append(out["kept"])
    assert y is not None
    return [y.reshape(u.shape).astype(u.dtype), jnp.stack(kept, 1)]


def backward(frame: Frame, *arrays: Array) -> list[Array]:
    """Runs the backward kernels.

    Args:
      frame: sizes of the scan.
      arrays: those of `forward`, the kept states, and the gradient of y.

    Returns:
      Gradients of u and the step sizes, in their shapes and dtypes; of B beside C,
      (b, h, w, 4, 2 n); of A, transposed, and below it the bias, (b, 4, n + 1, d); and of D, alike
      for all routes, (b, 1, d).
    """
    *given, kept, y_gradient = arrays
    u = given[0]
    y_gradient = y_gradient.reshape(frame.batch, -1, frame.channels)
    of_u, deltas, matrices, weights = None, [], [], []
    for k in range(ROUTES):
        operands, plan = _route(frame, k, tuple(given))
        out = differentiate(
            plan, operands, kept[:, k], y_gradient, _no_state(frame), of_u=of_u, u_dtype=jnp.float32
        )
        of_u = out["u"]
        deltas.append(out["delta"].reshape(u.shape))
        of_B, of_C = (out[name].sum((1, 2)) for name in ("B", "C"))  # groups, blocks of channels
        matrices.append(jnp.concatenate([of_B, of_C], 1).swapaxes(1, 2))
        of_A, of_bias = (out[name].sum(1) for name in ("A", "delta_bias"))  # segments
        weights.append(jnp.concatenate([of_A, of_bias[:, None]], 1))
        direct = out["D"].sum(1, keepdims=True)
    assert of_u is not None
    return [
        of_u.reshape(u.shape).astype(u.dtype),
        *deltas,
        jnp.stack(matrices, 2).reshape(*u.shape[:3], ROUTES, -1),
        jnp.stack(weights, 1),
        direct,
    ]


def _route(frame: Frame, k: int, arrays: tuple[Array, ...]) -> tuple[Operands, Plan]:
    """What the kernels take for route k."""
    u, *deltas, A, B, C, D, delta_bias = arrays
    pixels = (frame.batch, frame.height * frame.width)
    operands = Operands(
        u=u.reshape(*pixels, -1),
        delta=deltas[k].reshape(*pixels, -1),
        A=A[k].T,
        B=B.reshape(*pixels, ROUTES, -1),
        C=C.reshape(*pixels, ROUTES, -1),
        D=D[k],
        delta_bias=delta_bias[k],
    )
    route = routes_of(frame.pattern)[k]
    plan = make_plan(
        operands,
        None,
        delta_softplus=frame.delta_softplus,
        reverse=route.backward,
        image=ImageRoute(k, frame.height, frame.width, route.columns),
        interpret=frame.interpret,
    )
    return operands, plan


def _no_state(frame: Frame) -> Float[Array, "b n d"]:
    return jnp.zeros((frame.batch, frame.states, frame.channels), jnp.float32)
