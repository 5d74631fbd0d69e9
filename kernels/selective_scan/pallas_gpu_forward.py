"""Forward half of the Pallas scan for GPUs; `pallas_gpu` has the picture.

Time is cut in segments that run at once, and a segment in chunks that run one after another.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .base import Tile
from .pallas_gpu_block import Block, call
from .pallas_gpu_math import LOG2_E
from .pallas_gpu_plan import Operands, Plan, chunk_steps, make_plan


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
    plan = make_plan(
        operands, tile, delta_softplus=delta_softplus, reverse=reverse, interpret=interpret
    )
    out = scan(plan, operands, start, y=None, y_dtype=u.dtype)
    return out["y"], out["state"].swapaxes(1, 2), out["kept"]


def scan(
    plan: Plan,
    operands: Operands,
    start: Float[Array, "b n d"],
    *,
    y: Float[Array, "b l d"] | None,
    y_dtype: DTypeLike,
) -> dict[str, Array]:
    """Runs the kernels.

    Args:
      plan: how the work is cut.
      operands: what is scanned.
      start: the state before the first step.
      y: what the output is added to, in place; None for nothing.
      y_dtype: dtype of the output.

    Returns:
      "y", the last "state" (b, n, d), and the "kept" states, (b, k, n, d).
    """
    starts = start[:, None]
    if plan.segments > 1:
        ends = call(_ends, plan, (operands,), segment_outputs(plan, operands.u))
        starts = combine(plan, operands.A, start, ends)
    every = kept_every(plan)
    outputs = {
        "y": (operands.u.shape, y_dtype),
        "states": segment_outputs(plan, operands.u)["state"],
        "kept": kept_output(plan, operands.u, every=every),
    }
    kernel = partial(_apply, every=every, add=y is not None)
    into = None if y is None else {"y": y}
    out = call(kernel, plan, (operands, starts), outputs, into=into)
    return {"y": out["y"], "state": out["states"][:, -1], "kept": out["kept"]}


def kept_every(plan: Plan) -> int:
    """Chunks from one kept state to the next: what is kept is no larger than u in float32."""
    return pl.cdiv(plan.n, plan.steps)


def kept_states(length: int, d_state: int, tile: Tile | None, *, line: int | None = None) -> int:
    """States that are kept of a sequence, or of an image with lines of that many pixels.

    See `base.Kernel`.
    """
    steps = tile.steps if tile else chunk_steps(line or length)
    return pl.cdiv(pl.cdiv(length, steps), pl.cdiv(d_state, steps))


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
    plan: Plan, operands: Operands, kept: Float[Array, "b k n d"]
) -> Float[Array, "b k n d"]:
    """The state before every chunk, from those that were kept."""
    if kept.shape[1] == plan.total_chunks:
        return kept
    walk = replace(plan, chunks=kept_every(plan), segments=kept.shape[1])
    outputs = {
        "states": segment_outputs(walk, operands.u)["state"],
        "kept": kept_output(plan, operands.u, every=1),
    }
    within: Array = call(partial(_apply, every=1), walk, (operands, kept), outputs)["kept"]
    return within


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
) -> Float[Array, "b s n d"]:
    """What enters each segment, from what enters the first one and what each adds of itself.

    With `backward` the segments are walked from the last to the first.
    """
    # The segments are steps of a sequence; a program walks those of one state.
    across = replace(
        plan, length=plan.segments, chunks=pl.cdiv(plan.segments, plan.steps), segments=plan.n,
        reverse=backward, image=None,
    )  # fmt: skip
    inputs = (ends["state"], ends["steps"], A, start)
    outputs = {"starts": (ends["state"].shape, jnp.float32)}
    starts: Array = call(_combine, across, inputs, outputs)["starts"]
    return starts


def _combine(plan: Plan, inputs: Any, out: Any) -> None:
    states, steps, A, start = inputs
    block = Block(plan, whole=True)
    n = block.segment
    a = block.load(A, n) * LOG2_E

    def fetch(chunk: Array) -> Any:
        ends = [block.load(states, block.batch, place, n) for place in block.places(chunk)]
        return block.load_rows(steps, chunk), ends

    def body(chunk: Array, fetched: Any, state: Float[Array, "c"]) -> Float[Array, "c"]:
        places, valid = block.places(chunk), block.valid(chunk)
        for place, inside, step, end in zip(places, valid, *fetched, strict=True):
            block.store(out["starts"], block.batch, place, n, value=state, when=inside)
            state = block.fma(block.decay(step, a), state, end)
        return state

    block.walk(fetch, body, block.load(start, block.batch, n), back=False)


def _ends(plan: Plan, inputs: tuple[Operands], out: Any) -> None:
    (operands,) = inputs
    block = Block(plan)
    bias, zero = block.load(operands.delta_bias), jnp.zeros(plan.channels, jnp.float32)
    rows = [out["state"]]

    def body(chunk: Array, fetched: Any, carry: tuple[Any, Array]) -> tuple[Any, Array]:
        held, total = carry
        steps, _ = block.step_sizes(fetched["delta"], bias, chunk)
        held, _ = _advance(block, operands, rows, chunk, fetched, steps, held, [])
        return held, total + sum(steps)

    fetch = partial(_fetch, block, operands, with_C=False)
    held = block.hold(rows, lambda n: [zero])
    held, total = block.walk(fetch, body, (held, zero), back=False)
    block.write_held(rows, held)
    block.store(out["steps"], block.batch, block.segment, value=total)


def _apply(
    plan: Plan, inputs: tuple[Operands, Any], out: Any, *, every: int, add: bool = False
) -> None:
    operands, starts = inputs
    block = Block(plan)
    bias, D = block.load(operands.delta_bias), block.load(operands.D)
    rows, with_y = [out["states"]], "y" in out

    def body(chunk: Array, fetched: Any, held: list[Array]) -> list[Array]:
        def keep(n: Array, state: Array) -> None:
            due = None if every == 1 else chunk % every == 0
            block.store(out["kept"], block.batch, chunk // every, n, value=state, when=due)

        steps, _ = block.step_sizes(fetched["delta"], bias, chunk)
        y = [D * u for u in fetched["u"]] if with_y else []
        if add:
            known = zip(fetched["u"], fetched["so_far"], strict=True)
            y = [block.fma(D, u.astype(jnp.float32), so_far) for u, so_far in known]
        held, y = _advance(block, operands, rows, chunk, fetched, steps, held, y, keep)
        if with_y:
            block.store_rows(out["y"], chunk, y)
        return held

    so_far = out["y"] if add else None
    fetch = partial(_fetch, block, operands, with_C=with_y, so_far=so_far)
    held = block.hold(rows, lambda n: [block.load(starts, block.batch, block.segment, n)])
    block.write_held(rows, block.walk(fetch, body, held, back=False))


def _fetch(
    block: Block, operands: Operands, chunk: Array, *, with_C: bool, so_far: Any = None
) -> dict[str, Any]:
    """What a chunk reads ahead."""
    first = _of_state(block, operands, chunk, jnp.int32(0), with_C=with_C)
    rows = {name: block.load_rows(getattr(operands, name), chunk) for name in ("u", "delta")}
    if so_far is not None:
        rows["so_far"] = block.load_rows(so_far, chunk)
    return rows | {"first": first}


def _of_state(
    block: Block, operands: Operands, chunk: Array, n: Array, *, with_C: bool
) -> dict[str, Any]:
    """What a state of a chunk reads."""
    names = ("B", "C") if with_C else ("B",)
    matrices = {name: block.load_matrix(getattr(operands, name), chunk, n) for name in names}
    return matrices | {"A": block.load(operands.A, n)}


def _advance(
    block: Block,
    operands: Operands,
    rows: list[Any],
    chunk: Array,
    fetched: dict[str, Any],
    steps: list[Float[Array, "c"]],
    held: list[Float[Array, "c"]],
    y: list[Float[Array, "c"]],
    keep: Callable[[Array, Array], None] | None = None,
) -> tuple[list[Float[Array, "c"]], list[Float[Array, "c"]]]:
    """Carries the states through a chunk, and adds C . state to the rows of y, if there are any."""
    driven = [step * u for step, u in zip(steps, fetched["u"], strict=True)]

    def body(n: Array, known: dict[str, Any], row: list[Array], y: list[Array]) -> Any:
        (state,) = row
        if keep:
            keep(n, state)
        a, trace = known["A"] * LOG2_E, []
        for step, drive, b in zip(steps, driven, known["B"], strict=True):
            state = block.fma(block.decay(step, a), state, drive * b.astype(jnp.float32))
            trace.append(state)
        y = [
            block.fma(c.astype(jnp.float32), h, total)
            for total, c, h in zip(y, known.get("C", []), trace, strict=False)
        ]
        return [state], y

    fetch = partial(_of_state, block, operands, chunk, with_C=bool(y))
    return block.each_state(rows, held, fetch, fetched["first"], body, y)
