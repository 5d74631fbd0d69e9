"""Forward half of the Pallas scan for GPUs; `pallas_gpu` has the picture.

Time is cut in segments that run at once, and a segment in chunks that run one after another.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .base import Tile
from .pallas_gpu_block import (
    Block,
    Operands,
    Plan,
    call,
    chunk_steps,
    make_plan,
    put_state,
    take_state,
)


def forward(
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
    interpret: bool = False,
) -> tuple[Float[Array, "b l d"], Float[Array, "b d n"], Float[Array, "b k n d"]]:
    """y, the last state, and the states that the gradient needs; see `selective_scan`."""
    operands, start = prepare(u, delta, A, B, C, D, delta_bias, initial_state)
    plan = make_plan(operands, tile, delta_softplus=delta_softplus, reverse=reverse)
    out = scan(plan, operands, start, y=None, y_dtype=u.dtype, interpret=interpret)
    return out["y"], out["state"].swapaxes(1, 2), out["kept"]


def scan(
    plan: Plan,
    operands: Operands,
    start: Float[Array, "b n d"],
    *,
    y: Float[Array, "b l d"] | None,
    y_dtype: DTypeLike,
    interpret: bool,
) -> dict[str, Array]:
    """Runs the kernels.

    Args:
      plan: how the work is cut.
      operands: what is scanned.
      start: the state before the first step.
      y: what the output is added to, in place; None for nothing.
      y_dtype: dtype of the output.
      interpret: as for `call`.

    Returns:
      "y", the last "state" (b, n, d), and the "kept" states, (b, k, n, d).
    """
    starts = start[:, None]
    if plan.segments > 1:
        ends = call(
            _ends, plan, (operands,), segment_outputs(plan, operands.u), interpret=interpret
        )
        starts = combine(plan, operands.A, start, ends, interpret=interpret)
    every = kept_every(plan)
    outputs = {
        "y": (operands.u.shape, y_dtype),
        "state": (start.shape, jnp.float32),
        "kept": kept_output(plan, operands.u, every=every),
    }
    kernel = partial(_apply, every=every, add=y is not None)
    into = None if y is None else {"y": y}
    out: dict[str, Array] = call(
        kernel, plan, (operands, starts), outputs, into=into, interpret=interpret
    )
    return out


def kept_every(plan: Plan) -> int:
    """Chunks from one kept state to the next: what is kept is no larger than u in float32.

    Chunks of the gradient may be shorter; both powers of two, they come to the same steps.
    """
    return pl.next_power_of_2(pl.cdiv(plan.n, plan.steps))


def kept_states(length: int, d_state: int, tile: Tile | None) -> int:
    """States that are kept of a sequence; see `base.Kernel`."""
    steps = tile.steps if tile else chunk_steps(d_state)
    every = pl.next_power_of_2(pl.cdiv(d_state, steps))
    return pl.cdiv(pl.cdiv(length, steps), every)


def prepare(
    u: Float[Array, "b l d"],
    delta: Float[Array, "b l d"],
    A: Float[Array, "d n"],
    B: Float[Array, "b l g n"],
    C: Float[Array, "b l g n"],
    D: Float[Array, "d"] | None,
    delta_bias: Float[Array, "d"] | None,
    initial_state: Float[Array, "b d n"] | None,
) -> tuple[Operands, Float[Array, "b n d"]]:
    """The operands as the kernels take them, and the initial state."""
    (b, _, d), n = u.shape, A.shape[1]

    def as_float(x: Array | None, shape: tuple[int, ...]) -> Array:
        return jnp.zeros(shape, jnp.float32) if x is None else x.astype(jnp.float32)

    state = as_float(initial_state, (b, d, n)).swapaxes(1, 2)
    channels = (as_float(D, (d,)), as_float(delta_bias, (d,)))
    return Operands(u, delta, A.astype(jnp.float32).T, B, C, *channels), state


def states_within(
    plan: Plan, operands: Operands, kept: Float[Array, "b k n d"], *, interpret: bool
) -> Float[Array, "b k n d"]:
    """The state before every chunk, from those that were kept."""
    if kept.shape[1] == plan.total_chunks:
        return kept
    walk = replace(plan, chunks=kept_every(plan), segments=kept.shape[1])
    outputs = {"kept": kept_output(plan, operands.u, every=1)}
    kernel = partial(_apply, every=1)
    return call(kernel, walk, (operands, kept), outputs, interpret=interpret)["kept"]


def kept_output(plan: Plan, u: Array, *, every: int) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of the states before every so many chunks."""
    kept = pl.cdiv(plan.total_chunks, every)
    return (u.shape[0], kept, plan.n, plan.d), jnp.float32


def segment_outputs(plan: Plan, u: Array) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shapes and dtypes of what is known of each segment after walking it from zero."""
    b, s = u.shape[0], plan.segments
    return {
        "state": ((b, s, plan.n, plan.d), jnp.float32),
        "steps": ((b, s, plan.d), jnp.float32),
    }


def combine(
    plan: Plan,
    A: Float[Array, "n d"],
    start: Float[Array, "b n d"],
    ends: dict[str, Array],
    *,
    backward: bool = False,
    interpret: bool,
) -> Float[Array, "b s n d"]:
    """What enters each segment, from what enters the first one and what each adds of itself.

    With `backward` the segments are walked from the last to the first.
    """
    across = replace(plan, segments=plan.n)  # a program a state
    kernel = partial(_combine, count=plan.segments, backward=backward)
    inputs = (ends["state"], ends["steps"], A, start)
    outputs = {"starts": (ends["state"].shape, jnp.float32)}
    return call(kernel, across, inputs, outputs, interpret=interpret)["starts"]


def _combine(plan: Plan, inputs: Any, out: Any, *, count: int, backward: bool) -> None:
    states, steps, A, start = inputs
    block = Block(plan)
    n = block.segment
    a = block.load(A, n)

    def segment(i: Array, state: Float[Array, "c"]) -> Float[Array, "c"]:
        s = count - 1 - i if backward else i
        block.store(out["starts"], block.batch, s, n, value=state)
        decay = jnp.exp(block.load(steps, block.batch, s) * a)
        return decay * state + block.load(states, block.batch, s, n)

    lax.fori_loop(0, count, segment, block.load(start, block.batch, n))


def _ends(plan: Plan, inputs: tuple[Operands], out: Any) -> None:
    (operands,) = inputs
    block = Block(plan)
    bias = block.load(operands.delta_bias)

    def chunk(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        states, total = carry
        time = block.chunk_start(i)
        _, steps, driven = discretize(block, operands, bias, time)
        states, _ = _advance(block, operands, time, steps, driven, states, [])
        return states, total + sum(steps)

    zeros = jnp.zeros((plan.states, plan.channels), jnp.float32)
    states, total = lax.fori_loop(0, plan.chunks, chunk, (zeros, jnp.zeros(plan.channels)))
    block.store_states(out["state"], block.batch, block.segment, value=states)
    block.store(out["steps"], block.batch, block.segment, value=total)


def _apply(
    plan: Plan, inputs: tuple[Operands, Any], out: Any, *, every: int, add: bool = False
) -> None:
    operands, starts = inputs
    block = Block(plan)
    bias, D = block.load(operands.delta_bias), block.load(operands.D)

    def chunk(i: Array, states: Float[Array, "s c"]) -> Float[Array, "s c"]:
        time = block.chunk_start(i)
        index = block.segment * plan.chunks + i
        keep = (index % every == 0) & (time < plan.length)
        block.store_states(out["kept"], block.batch, index // every, value=states, when=keep)
        u, steps, driven = discretize(block, operands, bias, time)
        y = [D * x for x in u] if "y" in out else []
        if add:
            y = [x + so_far for x, so_far in zip(y, block.load_rows(out["y"], time), strict=True)]
        states, y = _advance(block, operands, time, steps, driven, states, y)
        if y:
            block.store_rows(out["y"], time, y)
        return states

    states = block.load_states(starts, block.batch, block.segment)
    states = lax.fori_loop(0, plan.chunks, chunk, states)
    if "state" in out:
        last = block.segment == plan.segments - 1
        block.store_states(out["state"], block.batch, value=states, when=last)


def discretize(
    block: Block, operands: Operands, bias: Float[Array, "c"], time: Array
) -> tuple[list[Array], list[Array], list[Array]]:
    """Rows of a chunk: u, the step sizes and their product."""
    u = block.load_rows(operands.u, time)
    steps = block.step_sizes(block.load_rows(operands.delta, time), bias, time)
    return u, steps, [step * x for step, x in zip(steps, u, strict=True)]


def _advance(
    block: Block,
    operands: Operands,
    time: Array,
    steps: list[Float[Array, "c"]],
    driven: list[Float[Array, "c"]],
    states: Float[Array, "s c"],
    y: list[Float[Array, "c"]],
) -> tuple[Float[Array, "s c"], list[Float[Array, "c"]]]:
    """Carries the states through a chunk, and adds C . state to the rows of y, if there are any."""

    def one_state(n: Array, carry: tuple[Array, list[Array]]) -> tuple[Array, list[Array]]:
        states, y = carry
        a, state = block.load(operands.A, n), take_state(states, n)
        B = block.load_scalars(operands.B, time, n)
        C = block.load_scalars(operands.C, time, n) if y else []
        trace = []
        for step, drive, b in zip(steps, driven, B, strict=True):
            state = jnp.exp(step * a) * state + drive * b
            trace.append(state)
        y = [total + c * h for total, c, h in zip(y, C, trace, strict=False)]
        return put_state(states, n, state), y

    return block.for_each_state(one_state, (states, y))
