"""One step of the selective scan, for recurrent use."""

from jaxtyping import Array, Float

from .base import ShapeError, as_array, as_optional_array, expect_floating, state_dtype, validate
from .reference import recurrence


def selective_scan_step(
    state: Float[Array, "b d n"],
    u_t: Float[Array, "b d"],
    delta_t: Float[Array, "b d"],
    A: Float[Array, "d n"],
    B_t: Float[Array, "b g n"],
    C_t: Float[Array, "b g n"],
    D: Float[Array, "d"] | None = None,
    *,
    delta_bias: Float[Array, "d"] | None = None,
    delta_softplus: bool = False,
) -> tuple[Float[Array, "b d n"], Float[Array, "b d"]]:
    """One time step of `selective_scan`, for recurrent use.

    Args:
      state: state before this step; zeros (b, d, n) before the first.
      u_t: input of this step.
      delta_t: step size of this step before bias and softplus.
      A: as in `selective_scan`.
      B_t: input matrix of this step.
      C_t: output matrix of this step.
      D: as in `selective_scan`.
      delta_bias: as in `selective_scan`.
      delta_softplus: as in `selective_scan`.

    Returns:
      The state after this step in the dtype of the arithmetic, and y_t in u_t's dtype.

    Raises:
      ShapeError: shapes or dtypes do not fit together.
    """
    state, u_t, delta_t, A, B_t, C_t = (as_array(x) for x in (state, u_t, delta_t, A, B_t, C_t))
    D, delta_bias = as_optional_array(D), as_optional_array(delta_bias)
    expect_floating(
        state=state, u_t=u_t, delta_t=delta_t, A=A, B_t=B_t, C_t=C_t, D=D, delta_bias=delta_bias
    )
    _check_step_shapes(state, u_t, delta_t, A, B_t, C_t)
    validate(u_t[:, None], delta_t[:, None], A, B_t[:, None], C_t[:, None], D, delta_bias, state)
    dtype = state_dtype(state, u_t, delta_t, A, B_t, C_t, D, delta_bias)
    new_state, y_t = recurrence(
        *(state.astype(dtype), u_t, delta_t, A, B_t, C_t, D, delta_bias),
        delta_softplus=delta_softplus,
    )
    return new_state, y_t.astype(u_t.dtype)


def _check_step_shapes(
    state: Array, u_t: Array, delta_t: Array, A: Array, B_t: Array, C_t: Array
) -> None:
    """Checks the numbers of axes, and whatever `validate` would report with a length of 1 in it."""
    expected = dict(state=3, u_t=2, delta_t=2, A=2, B_t=3, C_t=3)
    arrays = dict(state=state, u_t=u_t, delta_t=delta_t, A=A, B_t=B_t, C_t=C_t)
    for name, axes in expected.items():
        if arrays[name].ndim != axes:
            raise ShapeError(f"{name} has shape {arrays[name].shape}: expected {axes} axes")
    for name, array, wanted in (
        ("delta_t", delta_t, u_t.shape),
        ("B_t", B_t, (u_t.shape[0], B_t.shape[1], A.shape[1])),
        ("C_t", C_t, B_t.shape),
        ("state", state, (*u_t.shape, A.shape[1])),
    ):
        if array.shape != wanted:
            raise ShapeError(f"{name} has shape {array.shape}: expected {wanted}")
