"""Selective scan for TPUs (Pallas on Mosaic).

    grid        (sequences, channel blocks, time blocks): the last runs in scan order, one after
                another; the others are parallel
    VMEM        the states, across all time blocks; 8 steps at a time of step sizes and drives
    HBM         u, delta and y as they come, (b, l, d), read and written once; one state a chunk

Every iteration advances 8 time steps. Those are computed one after another in the state layout of
`pallas_tpu_block`, an instruction for 8 x 128 channels, while the step sizes, B and C of the next
8 steps are made ready in the vector layout; the two interleave to keep all units of the core busy.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from .base import Kernel, Tile, output
from .pallas_tpu_block import (
    Block,
    Matrices,
    Ref,
    States,
    Vectors,
    exchange_rows,
    load_states,
    matrices_rows,
    sweep,
    take_states,
    vectors_rows,
)
from .pallas_tpu_call import prepare
from .pallas_tpu_plan import LANES, MAX_STATES, SUBLANES, Plan, kept_states
from .pallas_tpu_vjp import backward
from .partition import differentiable


def unavailable() -> str | None:
    """Why the kernel cannot run on this machine, or None if it can."""
    platform = jax.default_backend()
    return None if platform == "tpu" else f"it needs a TPU, and JAX runs on {platform} here"


def unsupported(*operands: Array | jax.ShapeDtypeStruct | None) -> str | None:
    """Why the kernel cannot take these eight operands, by shape and dtype, or None if it can."""
    if any(x is not None and x.dtype == jnp.float64 for x in operands):
        return "it has no float64"
    A = operands[2]
    assert A is not None
    if A.shape[1] > MAX_STATES:
        return f"d_state is {A.shape[1]}: it takes at most {MAX_STATES}"
    return None


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
    interpret: Any = False,
) -> tuple[Float[Array, "b l d"], Float[Array, "b d n"], Float[Array, "b k n d"]]:
    """The first half of a `base.Kernel`: y, the last state, and the state before each chunk."""
    layout, x = prepare(
        (u, delta, A, B, C, D, delta_bias, initial_state),
        delta_softplus=delta_softplus, reverse=reverse, tile=tile, interpreted=bool(interpret),
    )  # fmt: skip
    plan = layout.plan
    y_dtype = jnp.float32 if u.dtype == jnp.float16 else u.dtype
    of_states = (plan.batch, plan.d_state, plan.channels)
    kept_shape = (plan.batch, plan.kept, plan.d_state, plan.channels)
    at = layout.specs(plan.steps, flipped=reverse)
    y, last, kept = pl.pallas_call(
        partial(_kernel, plan),
        grid=(plan.batch // plan.sequences, plan.channel_blocks, -(-plan.length // plan.steps)),
        in_specs=[at.sequence, at.sequence, at.A, at.matrices, at.channels, at.channels, at.state],
        out_specs=[at.sequence, at.state, at.kept],
        out_shape=[
            output((plan.batch, plan.length, plan.channels), y_dtype, like=x.u),
            output(of_states, jnp.float32, like=x.u),
            output(kept_shape, jnp.float32, like=x.u),
        ],
        scratch_shapes=_scratch(plan),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="selective_scan_forward",
    )(x.u, x.delta, x.A, x.matrices, x.D, x.delta_bias, x.initial_state)
    return layout.narrow(y), jnp.swapaxes(layout.narrow(last), 1, 2), layout.narrow(kept)


pallas_tpu_scan = differentiable(Kernel(forward, backward, kept_states))


def _scratch(plan: Plan) -> list[Any]:
    """States, decay rates and the buffers between the two layouts; two of what is made ahead."""

    def rows(count: int) -> Any:
        return pltpu.VMEM((count, LANES), jnp.float32)

    state = pltpu.VMEM((plan.states, plan.slots, LANES), jnp.float32)
    return [
        state,
        state,
        rows(vectors_rows(plan.slots, 2)),
        rows(vectors_rows(plan.slots, 2)),
        rows(matrices_rows(plan)),
        rows(vectors_rows(plan.slots)),
        rows(exchange_rows(plan)),
    ]


def _kernel(
    plan: Plan,
    u_ref: Ref,
    delta_ref: Ref,
    A_ref: Ref,
    matrices_ref: Ref,
    D_ref: Ref,
    bias_ref: Ref,
    start_ref: Ref,
    y_ref: Ref,
    last_ref: Ref,
    kept_ref: Ref,
    state: Ref,
    rate: Ref,
    step_buffer: Ref,
    driven_buffer: Ref,
    matrices_buffer: Ref,
    y_buffer: Ref,
    exchange: Ref,
) -> None:
    """One block of `plan.steps` time steps; the buffers are described in `_scratch`."""
    turn, turns = pl.program_id(2), pl.num_programs(2)
    time = turns - 1 - turn if plan.reverse else turn
    block = Block(plan, plan.steps, time, pl.program_id(1))
    step, driven = Vectors(step_buffer, plan.slots), Vectors(driven_buffer, plan.slots)
    matrices, y = Matrices(matrices_buffer, plan), Vectors(y_buffer, plan.slots)

    @pl.when(turn == 0)
    def _start() -> None:
        load_states(block, lambda _, lanes: A_ref[:, lanes], exchange, rate, math.log2(math.e))
        load_states(block, lambda i, lanes: start_ref[i, :, lanes], exchange, state)

    def discretize(slot: int, group: Array, at: Array | int) -> None:
        _, lanes = block.lanes(slot)
        _, size = block.step_size(block.vector(delta_ref, slot, group), bias_ref[:, lanes])
        drive = size * block.vector(u_ref, slot, group)
        step.put_slot(block.clear(size, slot, group), slot, at)
        driven.put_slot(block.clear(drive, slot, group), slot, at)

    def place(group: Array, index: int) -> Array:
        """Half of the buffer for B and C that a set of a group uses: they alternate."""
        return (group * plan.state_sets + index) & 1

    def vectors_ready(group: Array, at: Array | int) -> list[Callable[[], None]]:
        return [partial(discretize, slot, group, at) for slot in range(plan.slots)]

    def matrices_ready(group: Array, index: int) -> list[Callable[[], None]]:
        at = place(group, index)
        return matrices.spread(block, matrices_ref, group, index * plan.set_states, at)

    def advance(group: Array, index: int, parts: list[Callable[[], None]]) -> None:
        """Eight steps of a set of states; y is summed over the sets."""
        first, at = index * plan.set_states, place(group, index)

        def one(row: Array | int, h: list[States]) -> list[States]:
            size, drive = step.by_step(row, group & 1), driven.by_step(row, group & 1)
            total = y.by_step(row) if first else 0.0
            for i, x in enumerate(h):
                drives = drive * matrices.by_step(0, i, row, at)
                h[i] = jnp.exp2(size * rate[first + i]) * x + drives
                total = total + h[i] * matrices.by_step(1, i, row, at)
            y.put_step(total, row)
            return h

        states = range(first, first + plan.set_states)
        h = sweep(block, one, [state[n] for n in states], parts=parts)
        for n, x in zip(states, h, strict=True):
            state[n] = x

    def finish(group: Array) -> None:
        for slot in range(plan.slots):
            sequence, lanes = block.lanes(slot)
            rows = pl.ds(block.first_row(group), SUBLANES)
            direct = D_ref[:, lanes] * block.vector(u_ref, slot, group)
            y_ref[sequence, rows, lanes] = (y.by_slot(slot) + direct).astype(y_ref.dtype)

    def iteration(group: Array, _: None) -> None:
        ahead = jnp.minimum(group + 1, block.row_groups - 1)
        for index in range(plan.state_sets):
            last = index + 1 == plan.state_sets
            parts = matrices_ready(ahead, 0) if last else matrices_ready(group, index + 1)
            if last:
                parts = vectors_ready(ahead, (group + 1) & 1) + parts
            advance(group, index, parts)
        finish(group)

    chunks = plan.steps // plan.chunk
    groups = plan.chunk // SUBLANES

    def chunk(i: Array, _: None) -> None:
        place = chunks - 1 - i if plan.reverse else i
        for slot, x in enumerate(take_states(block, state, exchange)):
            sequence, lanes = block.lanes(slot)
            kept_ref[sequence, place, :, lanes] = x
        jax.lax.fori_loop(i * groups, (i + 1) * groups, iteration, None)

    for part in vectors_ready(jnp.int32(0), 0) + matrices_ready(jnp.int32(0), 0):
        part()
    jax.lax.fori_loop(0, chunks, chunk, None)

    @pl.when(turn == turns - 1)
    def _end() -> None:
        for slot, x in enumerate(take_states(block, state, exchange)):
            sequence, lanes = block.lanes(slot)
            last_ref[sequence, :, lanes] = x
