"""Selective scan for TPUs (Pallas on Mosaic).

    grid        (sequences, channel blocks, time blocks): the last runs in scan order, one after
                another; the others are parallel
    VMEM        the states, across all time blocks; 8 steps at a time of step sizes and drives
    HBM         u, delta and y as they come, (b, l, d), read and written once; one state a chunk

A block of time is worked off in chunks, each in two phases. First, in the vector layout of
`pallas_tpu_block`: step sizes with their softplus, and B and C spread over the lanes. Then, in the
state layout: 8 time steps an iteration, one after another, an instruction for 8 x 128 channels.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from .base import Kernel, Tile, output
from .pallas_tpu_block import Block, Ref, States, repeat, step_size, sweep
from .pallas_tpu_buffers import (
    Matrices,
    Set,
    Vectors,
    exchange_rows,
    load_set,
    load_states,
    matrices_rows,
    replace,
    store_set,
    take_states,
    vectors_rows,
)
from .pallas_tpu_call import lay_out, prepare
from .pallas_tpu_plan import LANES, MAX_COLUMNS, MAX_STATES, SUBLANES, Plan, kept_states
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
    u, _, A, B, *_ = operands
    assert u is not None and A is not None and B is not None
    if A.shape[1] > MAX_STATES:
        return f"d_state is {A.shape[1]}: it takes at most {MAX_STATES}"
    columns = lay_out(u.shape, A.shape[1], B.shape[2]).plan.columns
    if columns > MAX_COLUMNS:
        return f"a block has {columns} columns of B and C: it takes at most {MAX_COLUMNS}"
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
    """In the order of `_kernel`'s arguments."""

    def rows(count: int) -> Any:
        return pltpu.VMEM((count, LANES), jnp.float32)

    a_state = pltpu.VMEM((plan.states, plan.slots, LANES), jnp.float32)
    of_chunk = rows(vectors_rows(plan.slots, plan.chunk // SUBLANES))
    return [
        *[a_state] * 2,
        *[of_chunk] * 3,
        rows(matrices_rows(plan)),
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
    y_buffer: Ref,
    matrices_buffer: Ref,
    exchange: Ref,
) -> None:
    """One block of `plan.steps` time steps; `rate` is A in powers of two."""
    turn, turns, channel = pl.program_id(2), pl.num_programs(2), pl.program_id(1)
    chunks = plan.steps // plan.chunk
    first_chunk = (turns - 1 - turn if plan.reverse else turn) * chunks
    step, driven, y = (Vectors(x, plan.slots) for x in (step_buffer, driven_buffer, y_buffer))
    matrices = Matrices(matrices_buffer, plan)
    beside = plan.part == SUBLANES

    @pl.when(turn == 0)
    def _start() -> None:
        block = Block(plan, first_chunk, channel)
        load_states(block, lambda _, lanes: A_ref[:, lanes], exchange, rate, math.log2(math.e))
        load_states(block, lambda i, lanes: start_ref[i, :, lanes], exchange, state)

    def make_ready(block: Block, first: int, start: Array, count: int) -> None:
        """Step sizes, those times u, B and C of some steps, in the state layout."""
        matrices.spread(block, matrices_ref, first, start, count)
        for slot in range(plan.slots if first == 0 else 0):
            _, lanes = block.lanes(slot)
            delta = block.vector(delta_ref, slot, start, count)
            _, size = step_size(block, delta, bias_ref[:, lanes])
            drive = size * block.vector(u_ref, slot, start, count)
            step.put_slot(block.clear(size, slot, start), slot, start)
            driven.put_slot(block.clear(drive, slot, start), slot, start)

    def finish(block: Block, start: Array, count: int) -> None:
        """Writes y of some steps."""
        for slot in range(plan.slots):
            sequence, lanes = block.lanes(slot)
            direct = D_ref[:, lanes] * block.vector(u_ref, slot, start, count)
            total = y.by_slot(slot, start, count) + direct
            y_ref[sequence, block.rows(start, count), lanes] = total.astype(y_ref.dtype)

    def advance(block: Block, first: int, group: Array) -> None:
        """Eight steps of a set of states; y is summed over the sets.

        Beside them, where registers are left for it, y of the 8 steps before is written. The first
        8 of a chunk have none before them: they write what is in the buffer to their own place,
        and the next 8 correct it.
        """
        if beside and first + plan.set_states == plan.states:
            before = jnp.clip(group + (1 if plan.reverse else -1), 0, block.groups - 1)
            finish(block, before * SUBLANES, SUBLANES)

        def one(row: int | Array, h: Set) -> Set:
            size, drive = step.by_step(row, group), driven.by_step(row, group)

            def one_state(i: int | Array, carry: tuple[Set, States]) -> tuple[Set, States]:
                h, total = carry
                drives = drive * matrices.by_step(0, i, row, group)
                x = jnp.exp2(size * rate[first + i]) * h[i] + drives
                total = total + x * matrices.by_step(1, i, row, group)
                return replace(h, i, x), total

            total = y.by_step(row, group) if first else jnp.zeros_like(size)
            h, total = repeat(block, plan.set_states, one_state, (h, total))
            y.put_step(total, row, group)
            return h

        store_set(sweep(block, one, load_set(block, state, first)), state, first)

    def of_chunk(i: Array, _: None) -> None:
        place = chunks - 1 - i if plan.reverse else i
        block = Block(plan, first_chunk + place, channel, place * plan.chunk)
        for slot, x in enumerate(take_states(block, state, exchange)):
            sequence, lanes = block.lanes(slot)
            kept_ref[sequence, place, :, lanes] = x
        for first in range(0, plan.states, plan.set_states):
            block.in_pieces(partial(make_ready, block, first))
            block.in_scan_order(partial(advance, block, first))
        if beside:
            finish(block, jnp.int32(0 if plan.reverse else plan.chunk - SUBLANES), SUBLANES)
        else:
            block.in_pieces(partial(finish, block))

    jax.lax.fori_loop(0, chunks, of_chunk, None)

    @pl.when(turn == turns - 1)
    def _end() -> None:
        block = Block(plan, first_chunk, channel)
        for slot, x in enumerate(take_states(block, state, exchange)):
            sequence, lanes = block.lanes(slot)
            last_ref[sequence, :, lanes] = x
