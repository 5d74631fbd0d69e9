"""The selective scan as its users call it: validate, choose an implementation, call it, cast.

A new implementation is one more file and one more line in `IMPLEMENTATIONS`; the tests run for
everything listed there.
"""

from functools import partial
from typing import Any, Literal, overload

import jax
from jaxtyping import Array, Float

from .associative import associative_scan
from .base import (
    Implementation,
    ShapeError,
    UnavailableError,
    as_array,
    as_optional_array,
    expect_floating,
    state_dtype,
    validate,
)
from .chunked import chunked_scan
from .reference import recurrence, sequential_scan

IMPLEMENTATIONS: dict[str, Implementation] = {
    "sequential": Implementation(sequential_scan),
    "associative": Implementation(associative_scan),
    "chunked": Implementation(chunked_scan),
}

# Runs everywhere, and on CPUs is the fastest to run and to compile at every shape in
# benchmarks/selective_scan.py.
DEFAULT_IMPLEMENTATION = "chunked"


def available_implementations() -> tuple[str, ...]:
    """Names of the implementations that can run on this machine."""
    return tuple(name for name, item in IMPLEMENTATIONS.items() if item.unavailable() is None)


@overload
def selective_scan(
    u: Float[Array, "b l d"],
    delta: Float[Array, "b l d"],
    A: Float[Array, "d n"],
    B: Float[Array, "b l g n"],
    C: Float[Array, "b l g n"],
    D: Float[Array, "d"] | None = None,
    *,
    delta_bias: Float[Array, "d"] | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    initial_state: Float[Array, "b d n"] | None = None,
    return_final_state: Literal[False] = False,
    implementation: str | None = None,
) -> Float[Array, "b l d"]: ...


@overload
def selective_scan(
    u: Float[Array, "b l d"],
    delta: Float[Array, "b l d"],
    A: Float[Array, "d n"],
    B: Float[Array, "b l g n"],
    C: Float[Array, "b l g n"],
    D: Float[Array, "d"] | None = None,
    *,
    delta_bias: Float[Array, "d"] | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    initial_state: Float[Array, "b d n"] | None = None,
    return_final_state: Literal[True],
    implementation: str | None = None,
) -> tuple[Float[Array, "b l d"], Float[Array, "b d n"]]: ...


def selective_scan(
    u: Float[Array, "b l d"],
    delta: Float[Array, "b l d"],
    A: Float[Array, "d n"],
    B: Float[Array, "b l g n"],
    C: Float[Array, "b l g n"],
    D: Float[Array, "d"] | None = None,
    *,
    delta_bias: Float[Array, "d"] | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    initial_state: Float[Array, "b d n"] | None = None,
    return_final_state: bool = False,
    implementation: str | None = None,
) -> Float[Array, "b l d"] | tuple[Float[Array, "b l d"], Float[Array, "b d n"]]:
    """Linear recurrence whose coefficients depend on the input (the S6 operator of Mamba).

        h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t
        y_t = C_t . h_t + D u_t

    with delta_t the step size after bias and softplus. Channel k * (d / g) + j uses group k of B
    and C. Differentiable in every array, the initial state included, and from both results; works
    under jit, vmap, jax.checkpoint, and with batch or channels sharded over a mesh.

    Args:
      u: input; bfloat16, float16, float32 or float64.
      delta: step sizes before bias and softplus.
      A: diagonal of the state matrix of each channel; usually negative.
      B: input matrix of each time step and group.
      C: output matrix of each time step and group.
      D: weight of the direct path from u to y; None leaves that path out.
      delta_bias: added to delta before the softplus.
      delta_softplus: apply log(1 + exp(.)) to the step sizes; the identity above 20, as in torch.
      reverse: run from the last time step to the first; y keeps the order of u.
      initial_state: state before the first step in scan order; zeros if None.
      return_final_state: also return the state after the last step in scan order.
      implementation: one of `available_implementations()`, or None for the best one here.

    Returns:
      y in u's dtype; with `return_final_state` also the state, in the dtype of the arithmetic:
      float64 if any array is float64, else float32.

    Raises:
      ShapeError: shapes or dtypes do not fit together.
      UnavailableError: the named implementation does not exist or cannot run here.

    Source: Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023,
      algorithm 2 and section 3.3.
    """
    u, delta, A, B, C = (as_array(x) for x in (u, delta, A, B, C))
    D, delta_bias, initial_state = (as_optional_array(x) for x in (D, delta_bias, initial_state))
    validate(u, delta, A, B, C, D, delta_bias, initial_state)
    y, state = _run(
        *(u, delta, A, B, C, D, delta_bias, initial_state),
        implementation=choose_implementation(implementation),
        delta_softplus=bool(delta_softplus),
        reverse=bool(reverse),
    )
    return (y, state) if return_final_state else y


@partial(jax.jit, static_argnames=("implementation", "delta_softplus", "reverse"))
def _run(
    u: Float[Array, "b l d"],
    *others: Any,
    implementation: str,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Float[Array, "b l d"], Float[Array, "b d n"]]:
    """Calls an implementation; compiled, so that a call outside of any jit is fast too."""
    scan = IMPLEMENTATIONS[implementation].scan
    y, state = scan(u, *others, delta_softplus=delta_softplus, reverse=reverse)
    return y.astype(u.dtype), state


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


def choose_implementation(name: str | None) -> str:
    """The name of an implementation that can run here.

    Raises:
      UnavailableError: `name` is given and that implementation does not exist or cannot run.
    """
    if name is None:
        return DEFAULT_IMPLEMENTATION
    known = IMPLEMENTATIONS.get(name)
    reason = "there is none of that name" if known is None else known.unavailable()
    if reason is not None:
        available = ", ".join(available_implementations())
        raise UnavailableError(
            f"implementation {name!r} cannot run here: {reason}; available: {available}"
        )
    return name


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
