"""Gradient of the TPU kernel of the selective scan.

    grid        as forward, but the time blocks are chunks and run against the scan order
    VMEM        all states and decays of one chunk, recomputed from the state kept before it
    HBM         u, delta and y's gradient read once, the gradients of u and delta written once

With r_t the gradient that reaches state t, from its own output and from everything after it,

    r_t = C_t y'_t + q_{t+1},    q_t = decay_t r_t

is a recurrence like the states', run the other way. Gradients of A, D and the bias are summed
within a program, those of B and C over its channels; XLA adds what the programs give.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from .base import Tile, output
from .pallas_tpu_block import (
    Block,
    Matrices,
    Ref,
    States,
    Vector,
    Vectors,
    exchange_rows,
    load_states,
    matrices_rows,
    sweep,
    take_states,
    vectors_rows,
)
from .pallas_tpu_call import accepted, prepare
from .pallas_tpu_plan import LANES, SUBLANES, Plan


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
    interpret: Any = False,
) -> tuple[Array | None, ...]:
    """The second half of a `base.Kernel`: gradients of the eight operands, None for None."""
    operands = (u, delta, A, B, C, D, delta_bias, initial_state)
    layout, x = prepare(
        operands, delta_softplus=delta_softplus, reverse=reverse, tile=tile,
        interpreted=bool(interpret),
    )  # fmt: skip
    plan = layout.plan
    at = layout.specs(plan.chunk, flipped=not reverse)
    batch_blocks = plan.batch // plan.sequences
    d, n = plan.channels, plan.d_state

    def total(shape: tuple[int, ...]) -> tuple[pl.BlockSpec, jax.ShapeDtypeStruct]:
        """A gradient that the programs of one batch block sum over their time blocks."""
        spec = pl.BlockSpec((1, *shape, plan.block_channels), lambda b, c, t: (b, 0, c))
        return spec, output((batch_blocks, *shape, d), jnp.float32, like=x.u)

    of_matrices = pl.BlockSpec(
        (plan.sequences, 1, plan.chunk, plan.columns),
        lambda b, c, t: (b, c, t if reverse else plan.kept - 1 - t, 0),
    )
    (A_spec, A_shape), (vectors_spec, vectors_shape) = total((n,)), total((2,))
    results = pl.pallas_call(
        partial(_kernel, plan),
        grid=(batch_blocks, plan.channel_blocks, plan.kept),
        in_specs=[
            *(at.sequence, at.sequence, at.A, at.matrices, at.channels, at.channels),
            *(at.kept, at.sequence, at.state),
        ],
        out_specs=[at.sequence, at.sequence, A_spec, of_matrices, vectors_spec, at.state],
        out_shape=[
            output(x.u.shape, x.u.dtype, like=x.u),
            output(x.delta.shape, x.delta.dtype, like=x.u),
            A_shape,
            output(
                (plan.batch, plan.channel_blocks, plan.length, plan.columns), jnp.float32, like=x.u
            ),
            vectors_shape,
            output((plan.batch, n, d), jnp.float32, like=x.u),
        ],
        scratch_shapes=_scratch(plan),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="selective_scan_backward",
    )(
        *(x.u, x.delta, x.A, x.matrices, x.D, x.delta_bias, layout.widen(kept)),
        *(layout.widen(accepted(y_gradient)), layout.widen(jnp.swapaxes(state_gradient, 1, 2))),
    )
    of_u, of_delta, of_A, of_matrices_, of_vectors, of_state = results
    of_D, of_bias = layout.narrow(of_vectors.sum(0))
    gradients = (
        layout.narrow(of_u),
        layout.narrow(of_delta),
        layout.narrow(of_A.sum(0)).T,
        *plan.unpack_matrices(of_matrices_),
        of_D,
        of_bias,
        jnp.swapaxes(layout.narrow(of_state), 1, 2),
    )
    return tuple(
        None if of is None else g.astype(of.dtype)
        for of, g in zip(operands, gradients, strict=True)
    )


def _scratch(plan: Plan) -> list[Any]:
    """In the order of `_kernel`'s arguments."""

    def rows(count: int) -> Any:
        return pltpu.VMEM((count, LANES), jnp.float32)

    groups, states = plan.chunk // SUBLANES, plan.set_states
    a_state = pltpu.VMEM((plan.states, plan.slots, LANES), jnp.float32)
    of_chunk = rows(vectors_rows(plan.slots, groups))
    return [
        *[a_state] * 4,
        *[of_chunk] * 5,
        rows(matrices_rows(plan)),
        rows(vectors_rows(plan.slots, (groups + 1) * states)),
        pltpu.VMEM((plan.chunk * states, plan.slots, LANES), jnp.float32),
        rows(vectors_rows(plan.slots, states)),
        pltpu.VMEM((2, plan.slots * SUBLANES, LANES), jnp.float32),
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
    kept_ref: Ref,
    of_y_ref: Ref,
    of_last_ref: Ref,
    of_u_ref: Ref,
    of_delta_ref: Ref,
    of_A_ref: Ref,
    of_matrices_ref: Ref,
    of_vectors_ref: Ref,
    of_state_ref: Ref,
    A: Ref,
    start: Ref,
    passed_on: Ref,
    of_A: Ref,
    step_buffer: Ref,
    driven_buffer: Ref,
    of_y_buffer: Ref,
    of_step_buffer: Ref,
    of_driven_buffer: Ref,
    matrices_buffer: Ref,
    states_buffer: Ref,
    decays: Ref,
    reaching_buffer: Ref,
    of_vectors: Ref,
    exchange: Ref,
) -> None:
    """One chunk. Buffers named `_buffer` are `Vectors`; decays (step and state, slots, 128)."""
    turn, turns = pl.program_id(2), pl.num_programs(2)
    time = turn if plan.reverse else turns - 1 - turn
    block = Block(plan, plan.chunk, time, pl.program_id(1))
    step, driven, of_y, of_step, of_driven, states, reaching = (
        Vectors(ref, plan.slots)
        for ref in (
            *(step_buffer, driven_buffer, of_y_buffer, of_step_buffer, of_driven_buffer),
            *(states_buffer, reaching_buffer),
        )
    )
    matrices = Matrices(matrices_buffer, plan)

    @pl.when(turn == 0)
    def _start() -> None:
        load_states(block, lambda _, lanes: A_ref[:, lanes], exchange, A)
        load_states(block, lambda i, lanes: of_last_ref[i, :, lanes], exchange, passed_on)
        of_A[...] = jnp.zeros_like(of_A)
        of_vectors[...] = jnp.zeros_like(of_vectors)

    load_states(block, lambda i, lanes: kept_ref[i, 0, :, lanes], exchange, start)

    def discretize(slot: int, group: Array) -> None:
        _, lanes = block.lanes(slot)
        _, size = block.step_size(block.vector(delta_ref, slot, group), bias_ref[:, lanes])
        drive = size * block.vector(u_ref, slot, group)
        step.put_slot(block.clear(size, slot, group), slot, group)
        driven.put_slot(block.clear(drive, slot, group), slot, group)
        of_y.put_slot(block.clear(block.vector(of_y_ref, slot, group), slot, group), slot, group)

    def recompute(first: int, group: Array) -> None:
        """States and decays of 8 steps; states of group i are at i + 1, those before it at i."""
        ahead = jnp.minimum(group + 1, block.row_groups - 1)
        parts = matrices.spread(block, matrices_ref, ahead, first, (group + 1) & 1, sides=1)
        if first == 0:
            parts = [partial(discretize, slot, ahead) for slot in range(plan.slots)] + parts

        def one(row: Array | int, h: list[States]) -> list[States]:
            size, drive = step.by_step(row, group), driven.by_step(row, group)
            for i, x in enumerate(h):
                decay = jnp.exp2(size * (A[first + i] * math.log2(math.e)))
                h[i] = decay * x + drive * matrices.by_step(0, i, row, group & 1)
                decays[(group * SUBLANES + row) * plan.set_states + i] = decay
                states.put_step(h[i], row, (group + 1) * plan.set_states + i)
            return h

        before = [
            states.by_step(block.last_row, group * plan.set_states + i)
            for i in range(plan.set_states)
        ]
        sweep(block, one, before, parts=parts)

    def differentiate(first: int, group: Array) -> None:
        """The adjoint recurrence over 8 steps."""
        indices = list(enumerate(range(first, first + plan.set_states)))
        ahead = jnp.maximum(group - 1, 0)
        parts = matrices.spread(block, matrices_ref, ahead, first, (group + 1) & 1)

        def one(
            row: Array | int, carry: tuple[list[States], list[States]]
        ) -> tuple[list[States], list[States]]:
            q, sums = carry
            size, gradient = step.by_step(row, group), of_y.by_step(row, group)
            to_drive, to_step = (
                (of_driven.by_step(row, group), of_step.by_step(row, group)) if first else (0, 0)
            )
            for i, n in indices:
                r = gradient * matrices.by_step(1, i, row, group & 1) + q[i]
                reaching.put_step(r, row, i)
                to_drive = to_drive + r * matrices.by_step(0, i, row, group & 1)
                q[i] = r * decays[(group * SUBLANES + row) * plan.set_states + i]
                of_exponent = q[i] * previous(row, group, i)
                to_step = to_step + of_exponent * A[n]
                sums[i] = sums[i] + of_exponent * size
            of_driven.put_step(to_drive, row, group)
            of_step.put_step(to_step, row, group)
            return q, sums

        q, sums = sweep(
            block, one, ([passed_on[n] for _, n in indices], [of_A[n] for _, n in indices]),
            backward=True, parts=parts,
        )  # fmt: skip
        for i, n in indices:
            passed_on[n], of_A[n] = q[i], sums[i]

    def previous(row: Array | int, group: Array, i: int) -> States:
        """State i before a step: in the row before, or the last row of the group before."""
        before = row + 1 if plan.reverse else row - 1
        inside = (0 <= before) & (before < SUBLANES)
        place = (group + jnp.where(inside, 1, 0)) * plan.set_states + i
        return states.by_step(jnp.where(inside, before, block.last_row), place)

    def sum_channels(first: int, group: Array) -> None:
        """Gradients of B and C, for the states of a set."""
        rows = pl.ds(block.first_row(group), SUBLANES)
        lane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, plan.columns), 1)
        for sequence in range(plan.sequences):
            result = of_matrices_ref[sequence, 0, rows] if first else jnp.zeros(lane.shape)
            for i in range(plan.set_states):
                of_B = _products(plan, sequence, reaching, i, driven, group)
                state_place = (group + 1) * plan.set_states + i
                of_C = _products(plan, sequence, states, state_place, of_y, group)
                for side, by_group in enumerate((of_B, of_C)):
                    for k, x in enumerate(by_group):
                        column = plan.column(side, k, first + i)
                        total = jnp.sum(x, axis=1, keepdims=True)
                        result = jnp.where(lane == column, total, result)
            of_matrices_ref[sequence, 0, rows] = result

    def finish(slot: int, group: Array) -> None:
        """Gradients of u and delta, and what D and the bias get from a slot."""
        sequence, lanes = block.lanes(slot)
        rows = pl.ds(block.first_row(group), SUBLANES)
        u = block.vector(u_ref, slot, group)
        raw, _ = block.step_size(block.vector(delta_ref, slot, group), bias_ref[:, lanes])
        gradient, to_drive = of_y.by_slot(slot, group), of_driven.by_slot(slot, group)
        to_u = to_drive * step.by_slot(slot, group) + D_ref[:, lanes] * gradient
        to_delta = to_drive * u + of_step.by_slot(slot, group)
        if plan.delta_softplus:
            to_delta = to_delta * jax.nn.sigmoid(raw)
        of_u_ref[sequence, rows, lanes] = to_u.astype(of_u_ref.dtype)
        of_delta_ref[sequence, rows, lanes] = to_delta.astype(of_delta_ref.dtype)
        mine = slice(slot * SUBLANES, (slot + 1) * SUBLANES)
        of_vectors[0, mine] += block.clear(gradient * u, slot, group)
        of_vectors[1, mine] += block.clear(to_delta, slot, group)

    def of_set(first: int) -> None:
        """All there is to do for one set of states."""
        for i in range(plan.set_states):
            states.put_step(start[first + i], block.last_row, i)
        ready = matrices.spread(block, matrices_ref, jnp.int32(0), first, 0, sides=1)
        if first == 0:
            ready += [partial(discretize, slot, jnp.int32(0)) for slot in range(plan.slots)]
        for part in ready:
            part()
        jax.lax.fori_loop(0, block.row_groups, lambda group, _: recompute(first, group), None)

        def iteration(i: Array, _: None) -> None:
            group = block.row_groups - 1 - i
            differentiate(first, group)
            sum_channels(first, group)
            if first + plan.set_states == plan.states:
                for slot in range(plan.slots):
                    finish(slot, group)

        last = jnp.int32(block.row_groups - 1)
        for part in matrices.spread(block, matrices_ref, last, first, last & 1):
            part()
        jax.lax.fori_loop(0, block.row_groups, iteration, None)

    for first in range(0, plan.states, plan.set_states):
        of_set(first)

    @pl.when(turn == turns - 1)
    def _end() -> None:
        for slot, x in enumerate(take_states(block, passed_on, exchange)):
            sequence, lanes = block.lanes(slot)
            of_state_ref[sequence, :, lanes] = x
        _sum_slots(block, take_states(block, of_A, exchange), of_A_ref)
        for which in range(2):
            sums = [
                jnp.sum(
                    of_vectors[which, slot * SUBLANES : (slot + 1) * SUBLANES], 0, keepdims=True
                )
                for slot in range(plan.slots)
            ]
            _sum_slots(block, sums, of_vectors_ref, pl.ds(which, 1))


def _sum_slots(block: Block, parts: list[Array], ref: Ref, rows: Any = slice(None)) -> None:
    """Stores what the slots of each tile sum to over the sequences."""
    tiles = block.plan.tiles
    for tile in range(tiles):
        _, lanes = block.lanes(tile)
        ref[0, rows, lanes] = sum(parts[tile + tiles :: tiles], parts[tile])


def _products(
    plan: Plan, sequence: int, x: Vectors, x_group: Array | int, y: Vectors, y_group: Array
) -> list[Vector]:
    """X y of a sequence, summed over its tiles, for each group of channels of the block."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
    totals: list[Any] = [0.0] * plan.block_groups
    for tile in range(plan.tiles):
        slot = sequence * plan.tiles + tile
        product = x.by_slot(slot, x_group) * y.by_slot(slot, y_group)
        for k, first, end in plan.groups_of_tile(tile):
            whole = (first, end) == (0, LANES)
            mine = product if whole else jnp.where((lane >= first) & (lane < end), product, 0.0)
            totals[k] = totals[k] + mine
    return totals
