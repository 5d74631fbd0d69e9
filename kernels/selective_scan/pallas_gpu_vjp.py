"""Gradient of the Pallas scan for GPUs: each thread walks its channels back in time.

With l_t the gradient reaching state t from everything after it and its own output,

    l_t = C_t y'_t + q_{t+1},    q_t = decay_t l_t

q_t being what it passes on to state t - 1: a recurrence like the states', run the other way. So:

    states    the state before every chunk, where the forward pass kept fewer than those
    ends      each segment from q = 0 after it: q before it, and the sum of its step sizes
    combine   q after each segment, as for the states
    gradients each chunk recomputes its states forward, then walks back

Sums over the channels of a group (gradients of B and C) and over time and batch (of A, D and
delta_bias) are written as one partial sum a program and added by XLA: the same bits every time.

Memory traffic in bytes a value of u, float32: 20 with one segment (u, delta, y' read; gradients of
u and delta written), 32 with several; 16 n / `channels` more for the partial sums of B and C, and
at most 8 n / `steps` for the states of the chunks.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .base import Tile
from .pallas_gpu_block import Block, Operands, Plan, call, make_plan, put_state, take_state
from .pallas_gpu_forward import combine, discretize, prepare, segment_outputs, states_within


def backward(
    u: Float[Array, "b l d"],
    delta: Float[Array, "b l d"],
    A: Float[Array, "d n"],
    B: Float[Array, "b l g n"],
    C: Float[Array, "b l g n"],
    D: Float[Array, "d"] | None,
    delta_bias: Float[Array, "d"] | None,
    initial_state: Float[Array, "b d n"] | None,
    kept: Float[Array, "b k n d"],
    y_gradient: Float[Array, "b l d"],
    state_gradient: Float[Array, "b d n"],
    *,
    delta_softplus: bool,
    reverse: bool,
    tile: Tile | None = None,
    interpret: bool = False,
) -> tuple[Array | None, ...]:
    """The gradient of each operand, None for those that are None; see `selective_scan`."""
    operands, _ = prepare(u, delta, A, B, C, D, delta_bias, initial_state)
    plan = make_plan(operands, tile, delta_softplus=delta_softplus, reverse=reverse, backward=True)
    after = state_gradient.astype(jnp.float32).swapaxes(1, 2)
    out = differentiate(
        plan, operands, kept, y_gradient, after, of_u=None, u_dtype=u.dtype, interpret=interpret
    )

    def as_given(x: Array, operand: Array | None) -> Array | None:
        return None if operand is None else x.astype(operand.dtype)

    return (
        out["u"],
        out["delta"],
        as_given(out["A"].sum((0, 1)).T, A),
        as_given(jnp.moveaxis(out["B"].sum(2), -1, 1), B),
        as_given(jnp.moveaxis(out["C"].sum(2), -1, 1), C),
        as_given(out["D"].sum((0, 1)), D),
        as_given(out["delta_bias"].sum((0, 1)), delta_bias),
        as_given(out["initial_state"].swapaxes(1, 2), initial_state),
    )


def differentiate(
    plan: Plan,
    operands: Operands,
    kept: Float[Array, "b k n d"],
    y_gradient: Float[Array, "b l d"],
    after: Float[Array, "b n d"],
    *,
    of_u: Float[Array, "b l d"] | None,
    u_dtype: DTypeLike,
    interpret: bool,
) -> dict[str, Array]:
    """Runs the kernels.

    Args:
      plan: how the work is cut.
      operands: what was scanned.
      kept: the states that were kept.
      y_gradient: gradient of y.
      after: gradient of the last state.
      of_u: what u's gradient is added to, in place; None for nothing.
      u_dtype: dtype of u's gradient.
      interpret: as for `call`.

    Returns:
      What `_outputs` lists, by name.
    """
    states = states_within(plan, operands, kept, interpret=interpret)
    entering = after[:, None]
    if plan.segments > 1:
        outputs = segment_outputs(plan, operands.u)
        ends = call(_ends, plan, (operands, y_gradient), outputs, interpret=interpret)
        entering = combine(plan, operands.A, after, ends, backward=True, interpret=interpret)
    kernel = partial(_gradients, add=of_u is not None)
    into = None if of_u is None else {"u": of_u}
    inputs = (operands, states, y_gradient, entering)
    outputs = _outputs(plan, operands, u_dtype)
    out: dict[str, Array] = call(kernel, plan, inputs, outputs, into=into, interpret=interpret)
    return out


def _outputs(
    plan: Plan, operands: Operands, u_dtype: DTypeLike
) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shapes and dtypes of what `_gradients` writes; B and C with time last, as it writes them."""
    b, s, n, d = operands.u.shape[0], plan.segments, plan.n, plan.d
    of_matrix = ((b, plan.groups, plan.blocks, n, plan.length), jnp.float32)
    of_channel = ((b, s, d), jnp.float32)
    return {
        "u": (operands.u.shape, u_dtype),
        "delta": (operands.delta.shape, operands.delta.dtype),
        "A": ((b, s, n, d), jnp.float32),
        "B": of_matrix,
        "C": of_matrix,
        "D": of_channel,
        "delta_bias": of_channel,
        "initial_state": ((b, n, d), jnp.float32),
    }


def _ends(plan: Plan, inputs: tuple[Operands, Any], out: Any) -> None:
    operands, y_gradient = inputs
    block = Block(plan)
    bias = block.load(operands.delta_bias)

    def chunk(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        passed, total = carry
        time = block.chunk_start(plan.chunks - 1 - i)
        steps = block.step_sizes(block.load_rows(operands.delta, time), bias, time)
        of_y = block.load_rows(y_gradient, time)

        def one_state(n: Array, passed: Float[Array, "s c"]) -> Float[Array, "s c"]:
            a, q = block.load(operands.A, n), take_state(passed, n)
            C = block.load_scalars(operands.C, time, n)
            for step, c, dy in reversed(list(zip(steps, C, of_y, strict=True))):
                q = jnp.exp(step * a) * (c * dy + q)
            return put_state(passed, n, q)

        return block.for_each_state(one_state, passed), total + sum(steps)

    zeros = jnp.zeros((plan.states, plan.channels), jnp.float32)
    passed, total = lax.fori_loop(0, plan.chunks, chunk, (zeros, jnp.zeros(plan.channels)))
    block.store_states(out["state"], block.batch, block.segment, value=passed)
    block.store(out["steps"], block.batch, block.segment, value=total)


def _gradients(plan: Plan, inputs: tuple[Operands, Any, Any, Any], out: Any, *, add: bool) -> None:
    operands, states, y_gradient, entering = inputs
    block = Block(plan)
    here = (block.batch, block.segment)
    bias, D = block.load(operands.delta_bias), block.load(operands.D)

    def chunk(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        passed, of_D, of_bias = carry
        index = plan.chunks - 1 - i
        time = block.chunk_start(index)
        u, steps, driven = discretize(block, operands, bias, time)
        of_y = block.load_rows(y_gradient, time)
        before = jnp.minimum(block.segment * plan.chunks + index, plan.total_chunks - 1)

        def one_state(n: Array, carry: tuple[Array, list[Array], list[Array]]) -> Any:
            passed, of_driven, of_step = carry
            a, q = block.load(operands.A, n), take_state(passed, n)
            state = block.load(states, block.batch, before, n)
            B = block.load_scalars(operands.B, time, n)
            C = block.load_scalars(operands.C, time, n)
            decays, carried, of_C = [], [], []
            for step, drive, b, dy in zip(steps, driven, B, of_y, strict=True):
                decays.append(jnp.exp(step * a))
                carried.append(decays[-1] * state)
                state = carried[-1] + drive * b
                of_C.append(jnp.sum(dy * state))
            of_A, of_B = jnp.zeros(plan.channels), [jnp.float32(0)] * plan.steps
            of_driven, of_step = list(of_driven), list(of_step)
            for k in reversed(range(plan.steps)):
                reaching = C[k] * of_y[k] + q
                of_B[k] = jnp.sum(reaching * driven[k])
                of_driven[k] += reaching * B[k]
                of_exponent = reaching * carried[k]
                of_step[k] += of_exponent * a
                of_A += of_exponent * steps[k]
                q = decays[k] * reaching
            block.store_scalars(out["B"], time, n, of_B)
            block.store_scalars(out["C"], time, n, of_C)
            # The first chunk finds nothing there yet; n rows in registers would be too many.
            so_far = jnp.where(i == 0, 0.0, block.load(out["A"], *here, n, when=i > 0))
            block.store(out["A"], *here, n, value=so_far + of_A)
            return put_state(passed, n, q), of_driven, of_step

        zeros = [jnp.zeros(plan.channels)] * plan.steps
        passed, of_driven, of_step = block.for_each_state(one_state, (passed, zeros, zeros))
        of_delta = [x + y * z for x, y, z in zip(of_step, of_driven, u, strict=True)]
        if plan.delta_softplus:
            raw = block.load_rows(operands.delta, time)
            slopes = (jax.nn.sigmoid(x + bias) for x in raw)
            of_delta = [x * slope for x, slope in zip(of_delta, slopes, strict=True)]
        of_u = [D * x + y * z for x, y, z in zip(of_y, of_driven, steps, strict=True)]
        if add:
            of_u = [x + y for x, y in zip(of_u, block.load_rows(out["u"], time), strict=True)]
        block.store_rows(out["u"], time, of_u)
        block.store_rows(out["delta"], time, of_delta)
        of_D += sum(x * y for x, y in zip(u, of_y, strict=True))
        of_bias += sum(block.within(of_delta, time))
        return passed, of_D, of_bias

    zeros = jnp.zeros(plan.channels)
    first = (block.load_states(entering, *here), zeros, zeros)
    passed, of_D, of_bias = lax.fori_loop(0, plan.chunks, chunk, first)
    block.store(out["D"], *here, value=of_D)
    block.store(out["delta_bias"], *here, value=of_bias)
    start = block.segment == 0
    block.store_states(out["initial_state"], block.batch, value=passed, when=start)
