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
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .base import Tile
from .pallas_gpu_block import Block, call
from .pallas_gpu_forward import combine, prepare, segment_outputs, states_within
from .pallas_gpu_math import LOG2_E
from .pallas_gpu_plan import Operands, Plan, make_plan


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
    plan = make_plan(
        operands, tile, delta_softplus=delta_softplus, reverse=reverse, interpret=interpret
    )
    after = state_gradient.astype(jnp.float32).swapaxes(1, 2)
    out = differentiate(plan, operands, kept, y_gradient, after, of_u=None, u_dtype=u.dtype)

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
        as_given(out["initial_state"][:, 0].swapaxes(1, 2), initial_state),
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

    Returns:
      What `_outputs` lists, by name.
    """
    states = states_within(plan, operands, kept)
    entering = after[:, None]
    if plan.segments > 1:
        outputs = segment_outputs(plan, operands.u)
        ends = call(_ends, plan, (operands, y_gradient), outputs)
        entering = combine(plan, operands.A, after, ends, backward=True)
    kernel = partial(_gradients, add=of_u is not None)
    into = None if of_u is None else {"u": of_u}
    inputs = (operands, states, y_gradient, entering)
    outputs = _outputs(plan, operands, u_dtype)
    out: dict[str, Array] = call(kernel, plan, inputs, outputs, into=into)
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
        "initial_state": ((b, s, n, d), jnp.float32),
    }


def _ends(plan: Plan, inputs: tuple[Operands, Any], out: Any) -> None:
    operands, y_gradient = inputs
    block = Block(plan)
    bias, zero = block.load(operands.delta_bias), jnp.zeros(plan.channels, jnp.float32)
    rows = [out["state"]]

    def of_state(chunk: Array, n: Array) -> dict[str, Any]:
        return {"A": block.load(operands.A, n), "C": block.load_matrix(operands.C, chunk, n)}

    def fetch(chunk: Array) -> dict[str, Any]:
        return {
            "first": of_state(chunk, jnp.int32(0)),
            "delta": block.load_rows(operands.delta, chunk),
            "of_y": block.load_rows(y_gradient, chunk),
        }

    def body(chunk: Array, fetched: Any, carry: tuple[Any, Array]) -> tuple[Any, Array]:
        held, total = carry
        steps, _ = block.step_sizes(fetched["delta"], bias, chunk)
        of_y = _of_y(block, fetched, chunk)

        def pass_on(n: Array, known: Any, row: list[Array], _: None) -> tuple[list[Array], None]:
            a, (q,) = known["A"] * LOG2_E, row
            for step, c, dy in reversed(list(zip(steps, known["C"], of_y, strict=True))):
                q = block.decay(step, a) * block.fma(c.astype(jnp.float32), dy, q)
            return [q], None

        held, _ = block.each_state(
            rows, held, partial(of_state, chunk), fetched["first"], pass_on, None
        )
        return held, total + sum(steps)

    held = block.hold(rows, lambda n: [zero])
    held, total = block.walk(fetch, body, (held, zero), back=True)
    block.write_held(rows, held)
    block.store(out["steps"], block.batch, block.segment, value=total)


def _of_y(block: Block, fetched: dict[str, Any], chunk: Array) -> list[Float[Array, "c"]]:
    return block.within([x.astype(jnp.float32) for x in fetched["of_y"]], chunk)


def _gradients(plan: Plan, inputs: tuple[Operands, Any, Any, Any], out: Any, *, add: bool) -> None:
    operands, states, y_gradient, entering = inputs
    block = Block(plan)
    here = (block.batch, block.segment)
    bias, D = block.load(operands.delta_bias), block.load(operands.D)
    zero = jnp.zeros(plan.channels, jnp.float32)
    rows = [out["initial_state"], out["A"]]

    def of_state(chunk: Array, n: Array) -> dict[str, Any]:
        return {
            "A": block.load(operands.A, n),
            "state": block.load(states, block.batch, chunk, n),
            "B": block.load_matrix(operands.B, chunk, n),
            "C": block.load_matrix(operands.C, chunk, n),
        }

    def fetch(chunk: Array) -> dict[str, Any]:
        arrays = {"u": operands.u, "delta": operands.delta, "of_y": y_gradient}
        arrays |= {"so_far": out["u"]} if add else {}
        of_rows = {name: block.load_rows(x, chunk) for name, x in arrays.items()}
        return of_rows | {"first": of_state(chunk, jnp.int32(0))}

    def body(chunk: Array, fetched: Any, carry: tuple[list[Array], Array, Array]) -> Any:
        held, of_D, of_bias = carry
        u = [x.astype(jnp.float32) for x in fetched["u"]]
        of_y = _of_y(block, fetched, chunk)
        steps, slopes = block.step_sizes(fetched["delta"], bias, chunk)
        driven = [step * x for step, x in zip(steps, u, strict=True)]

        def add_state(n: Array, known: Any, row: list[Array], carry: Any) -> Any:
            (q, of_A), (of_driven, of_step) = row, carry
            found = _of_state(block, known, steps, driven, of_y, q, of_A, of_driven, of_step)
            block.store_matrix(out["B"], chunk, n, found.B)
            block.store_matrix(out["C"], chunk, n, found.C)
            return [found.passed, found.A], (found.driven, found.step)

        zeros = [zero] * plan.steps
        held, (of_driven, of_step) = block.each_state(
            rows, held, partial(of_state, chunk), fetched["first"], add_state, (zeros, zeros)
        )
        of_delta = [
            block.fma(y, z, x) * slope()
            for x, y, z, slope in zip(of_step, of_driven, u, slopes, strict=True)
        ]
        direct = [D * dy for dy in of_y]
        if add:
            known = zip(of_y, fetched["so_far"], strict=True)
            direct = [block.fma(D, dy, so_far) for dy, so_far in known]
        of_u = [block.fma(x, y, z) for x, y, z in zip(of_driven, steps, direct, strict=True)]
        block.store_rows(out["u"], chunk, of_u)
        block.store_rows(out["delta"], chunk, of_delta)
        for x, dy in zip(u, of_y, strict=True):
            of_D = block.fma(x, dy, of_D)
        return held, of_D, of_bias + sum(block.within(of_delta, chunk))

    held = block.hold(rows, lambda n: [block.load(entering, *here, n), zero])
    held, of_D, of_bias = block.walk(fetch, body, (held, zero, zero), back=True, ahead=1)
    block.write_held(rows, held)
    block.store(out["D"], *here, value=of_D)
    block.store(out["delta_bias"], *here, value=of_bias)


class _OfState(NamedTuple):
    """What one state of a chunk gives to the gradients; lists have an entry a step.

    A, driven and step are sums over what came before and this.
    """

    B: list[Float[Array, ""]]
    C: list[Float[Array, ""]]
    A: Float[Array, "c"]
    driven: list[Float[Array, "c"]]
    step: list[Float[Array, "c"]]
    passed: Float[Array, "c"]


def _of_state(
    block: Block,
    known: dict[str, Any],
    steps: list[Float[Array, "c"]],
    driven: list[Float[Array, "c"]],
    of_y: list[Float[Array, "c"]],
    q: Float[Array, "c"],
    of_A: Float[Array, "c"],
    of_driven: list[Float[Array, "c"]],
    of_step: list[Float[Array, "c"]],
) -> _OfState:
    """Walks the state through the chunk, and what reaches it back."""
    a, state = known["A"], known["state"]
    B, C = ([x.astype(jnp.float32) for x in known[name]] for name in "BC")
    decays, carried, of_C = [], [], []
    for step, drive, b, dy in zip(steps, driven, B, of_y, strict=True):
        decays.append(block.decay(step, a * LOG2_E))
        carried.append(decays[-1] * state)
        state = block.fma(drive, b, carried[-1])
        of_C.append(jnp.sum(dy * state))
    of_B, of_driven, of_step = [], list(of_driven), list(of_step)
    for k in reversed(range(len(steps))):
        reaching = block.fma(C[k], of_y[k], q)
        of_B.append(jnp.sum(reaching * driven[k]))
        of_driven[k] = block.fma(reaching, B[k], of_driven[k])
        of_exponent = reaching * carried[k]
        of_step[k] = block.fma(of_exponent, a, of_step[k])
        of_A = block.fma(of_exponent, steps[k], of_A)
        q = decays[k] * reaching
    return _OfState(of_B[::-1], of_C, of_A, of_driven, of_step, q)
