"""The gradient kernel of the selective scan on TPUs: one chunk of one block of channels.

With r_t the gradient that reaches state t, from its own output and from everything after it,

    r_t = C_t y'_t + q_{t+1},    q_t = decay_t r_t

is a recurrence like the states', run the other way. The states of a chunk are computed again from
the one kept before it, a set of them at a time; then the recurrence goes back over them.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from .pallas_tpu_block import Block, Ref, States, Vector, repeat, step_size, sweep
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
from .pallas_tpu_math import logistic
from .pallas_tpu_plan import LANES, SUBLANES, Plan


def gradient_scratch(plan: Plan) -> list[Any]:
    """In the order of `gradient_kernel`'s arguments."""

    def rows(count: int) -> Any:
        return pltpu.VMEM((count, LANES), jnp.float32)

    groups, states = plan.chunk // SUBLANES, plan.set_states
    a_state = pltpu.VMEM((plan.states, plan.slots, LANES), jnp.float32)
    return [
        *[a_state] * 4,
        *[rows(vectors_rows(plan.slots, groups))] * 5,
        rows(matrices_rows(plan)),
        rows(vectors_rows(plan.slots, (groups + 1) * states)),
        rows(vectors_rows(plan.slots, states)),
        pltpu.VMEM((2, plan.slots, SUBLANES, LANES), jnp.float32),
        rows(exchange_rows(plan)),
    ]


def gradient_kernel(
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
    rate: Ref,
    start_state: Ref,
    passed_on: Ref,
    of_A: Ref,
    step_buffer: Ref,
    driven_buffer: Ref,
    of_y_buffer: Ref,
    of_step_buffer: Ref,
    of_driven_buffer: Ref,
    matrices_buffer: Ref,
    states_buffer: Ref,
    reaching_buffer: Ref,
    of_vectors: Ref,
    exchange: Ref,
) -> None:
    """One chunk. `rate` is A in powers of two; buffers named `_buffer` are for `Vectors`."""
    turn, turns = pl.program_id(2), pl.num_programs(2)
    block = Block(plan, turn if plan.reverse else turns - 1 - turn, pl.program_id(1))
    step, driven, of_y, of_step, of_driven, states, reaching = (
        Vectors(ref, plan.slots)
        for ref in (
            *(step_buffer, driven_buffer, of_y_buffer, of_step_buffer, of_driven_buffer),
            *(states_buffer, reaching_buffer),
        )
    )
    matrices = Matrices(matrices_buffer, plan)
    # Groups lie in `states` in the order of time, and with them the state before the first one.
    shift, first_place = (0, block.groups) if plan.reverse else (1, 0)
    last_row, back = (0, 1) if plan.reverse else (SUBLANES - 1, -1)
    beside = plan.part == SUBLANES

    @pl.when(turn == 0)
    def _start() -> None:
        load_states(block, lambda _, lanes: A_ref[:, lanes], exchange, rate, math.log2(math.e))
        load_states(block, lambda i, lanes: of_last_ref[i, :, lanes], exchange, passed_on)
        of_A[...] = jnp.zeros_like(of_A)
        of_vectors[...] = jnp.zeros_like(of_vectors)

    def make_ready(first: int, start: Array, count: int) -> None:
        """Step sizes, those times u, the gradient of y, B and C of some steps."""
        matrices.spread(block, matrices_ref, first, start, count)
        for slot in range(plan.slots if first == 0 else 0):
            _, lanes = block.lanes(slot)
            delta = block.vector(delta_ref, slot, start, count)
            _, size = step_size(block, delta, bias_ref[:, lanes])
            drive = size * block.vector(u_ref, slot, start, count)
            gradient = block.vector(of_y_ref, slot, start, count)
            for to, x in ((step, size), (driven, drive), (of_y, gradient)):
                to.put_slot(block.clear(x, slot, start), slot, start)

    def place(group: Array, i: int | Array) -> Array:
        """Where `states` has a state of a group."""
        return (group + shift) * plan.set_states + i

    def recompute(first: int, group: Array) -> None:
        """States of 8 steps of a set."""

        def one(row: int | Array, h: Set) -> Set:
            size, drive = step.by_step(row, group), driven.by_step(row, group)

            def one_state(i: int | Array, h: Set) -> Set:
                drives = drive * matrices.by_step(0, i, row, group)
                x = jnp.exp2(size * rate[first + i]) * h[i] + drives
                states.put_step(x, row, place(group, i))
                return replace(h, i, x)

            return repeat(block, plan.set_states, one_state, h)

        store_set(sweep(block, one, load_set(block, start_state, first)), start_state, first)

    def previous(row: int | Array, group: Array, i: int | Array) -> States:
        """A state one step earlier in scan order: in the row before, or in the group before."""
        before = row + back
        inside = (0 <= before) & (before < SUBLANES)
        if isinstance(before, int):
            before, group = (before, group) if inside else (last_row, group + back)
        else:
            group = jnp.where(inside, group, group + back)
            before = jnp.where(inside, before, last_row)
        return states.by_step(before, place(group, i))

    def differentiate(first: int, group: Array, part: int | Array) -> None:
        """The adjoint recurrence over the steps of a part of a group, state by state."""
        start = part * plan.part

        def one_state(i: int | Array, totals: tuple[Set, Set]) -> tuple[Set, Set]:
            def one(r: int | Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
                q, sums, to_drive, to_step = carry
                row = start + r
                size, gradient = step.by_step(row, group), of_y.by_step(row, group)
                reaches = gradient * matrices.by_step(1, i, row, group) + q
                reaching.put_step(reaches, row, i)
                drives = reaches * matrices.by_step(0, i, row, group)
                passes = reaches * jnp.exp2(size * rate[first + i])
                of_exponent = passes * previous(row, group, i)
                to_drive = replace(to_drive, r, to_drive[r] + drives)
                to_step = replace(to_step, r, to_step[r] + of_exponent * rate[first + i])
                return passes, sums + of_exponent * size, to_drive, to_step

            carry = (passed_on[first + i], of_A[first + i], *totals)
            q, sums, *totals_ = sweep(block, one, carry, backward=True, count=plan.part)
            passed_on[first + i], of_A[first + i] = q, sums
            return tuple(totals_)

        zeros = [jnp.zeros((plan.slots, LANES), jnp.float32)] * plan.part
        none = zeros if plan.unrolled else jnp.stack(zeros)
        to_drive, to_step = repeat(block, plan.set_states, one_state, (none, none))
        for r in range(plan.part):
            # `to_step` is in powers of two, as `rate` is.
            for of, x in ((of_driven, to_drive[r]), (of_step, to_step[r] * math.log(2))):
                x = x + of.by_step(start + r, group) if first else x
                of.put_step(x, start + r, group)

    def adjoint(first: int, group: Array) -> None:
        """All that is known of 8 steps of a set once the recurrence has come to them.

        Sums over channels wait for the whole recurrence. Where it is short, that of the 8 steps to
        which it came before is their company. Those to which it comes first have none before them:
        they sum what is in the buffer to their own place, and the next 8 correct it.
        """
        if beside:
            before = group + (-1 if plan.reverse else 1)
            sum_channels(first, jnp.clip(before, 0, block.groups - 1))
            differentiate(first, group, 0)
        else:
            parts = SUBLANES // plan.part
            block.in_order(parts, partial(differentiate, first, group), backward=True)
            sum_channels(first, group)

    def sum_channels(first: int, group: Array) -> None:
        """Gradients of B and C of 8 steps, for the states of a set."""
        rows = block.rows(group * SUBLANES, SUBLANES)
        lane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, plan.columns), 1)
        for sequence in range(plan.sequences):
            factors = [
                [
                    x.by_slot(sequence * plan.tiles + t, group * SUBLANES, SUBLANES)
                    for x in (driven, of_y)
                ]
                for t in range(plan.tiles)
            ]

            def one_state(
                i: int | Array, result: Array, sequence: int = sequence, factors: Any = factors
            ) -> Array:
                for side, (x, at) in enumerate(((reaching, i), (states, place(group, i)))):
                    products = [
                        x.by_slot(sequence * plan.tiles + t, at * SUBLANES, SUBLANES)
                        * factors[t][side]
                        for t in range(plan.tiles)
                    ]
                    for k, total in enumerate(_by_group(plan, products)):
                        column = plan.column(side, k, first + i)
                        total = jnp.sum(total, axis=1, keepdims=True)
                        result = jnp.where(lane == column, total, result)
                return result

            result = (
                of_matrices_ref[sequence, 0, rows] if first else jnp.zeros(lane.shape, jnp.float32)
            )
            result = repeat(block, plan.set_states, one_state, result)
            of_matrices_ref[sequence, 0, rows] = result

    def finish(start: Array, count: int) -> None:
        """Gradients of u and delta of some steps, and their part in those of D and the bias."""
        for slot in range(plan.slots):
            sequence, lanes = block.lanes(slot)
            rows = block.rows(start, count)
            u = block.vector(u_ref, slot, start, count)
            delta = block.vector(delta_ref, slot, start, count)
            raw = delta + bias_ref[:, lanes]
            gradient, to_drive, to_step, size = (
                x.by_slot(slot, start, count) for x in (of_y, of_driven, of_step, step)
            )
            to_u = to_drive * size + D_ref[:, lanes] * gradient
            to_delta = to_drive * u + to_step
            if plan.delta_softplus:
                to_delta = to_delta * logistic(raw)
            of_u_ref[sequence, rows, lanes] = to_u.astype(of_u_ref.dtype)
            of_delta_ref[sequence, rows, lanes] = to_delta.astype(of_delta_ref.dtype)
            for which, x in enumerate((gradient * u, to_delta)):
                x = block.clear(x, slot, start).reshape(-1, SUBLANES, LANES)
                of_vectors[which, slot] += jnp.sum(x, axis=0)

    load_states(block, lambda i, lanes: kept_ref[i, 0, :, lanes], exchange, start_state)
    for first in range(0, plan.states, plan.set_states):
        block.in_pieces(partial(make_ready, first))
        for i, x in enumerate(load_set(block, start_state, first)):
            states.put_step(x, last_row, first_place * plan.set_states + i)
        block.in_scan_order(partial(recompute, first))
        block.in_scan_order(partial(adjoint, first), backward=True)
        if beside:
            sum_channels(first, jnp.int32(block.groups - 1 if plan.reverse else 0))
    block.in_pieces(finish)

    @pl.when(turn == turns - 1)
    def _end() -> None:
        for slot, x in enumerate(take_states(block, passed_on, exchange)):
            sequence, lanes = block.lanes(slot)
            of_state_ref[sequence, :, lanes] = x
        _sum_slots(block, take_states(block, of_A, exchange), of_A_ref)
        for which in range(2):
            rows = [
                jnp.sum(of_vectors[which, slot], axis=0, keepdims=True)
                for slot in range(plan.slots)
            ]
            _sum_slots(block, rows, of_vectors_ref, pl.ds(which, 1))


def _sum_slots(block: Block, parts: list[Array], ref: Ref, rows: Any = slice(None)) -> None:
    """Stores what the slots of each tile sum to over the sequences."""
    tiles = block.plan.tiles
    for tile in range(tiles):
        _, lanes = block.lanes(tile)
        ref[0, rows, lanes] = sum(parts[tile + tiles :: tiles], parts[tile])


def _by_group(plan: Plan, products: list[Vector]) -> list[Vector]:
    """Sums of the tiles of a block, one sum for each group of channels."""
    totals: list[Any] = [0.0] * plan.block_groups
    for tile, product in enumerate(products):
        lane = jax.lax.broadcasted_iota(jnp.int32, product.shape, 1)
        for k, first, end in plan.groups_of_tile(tile):
            whole = (first, end) == (0, LANES)
            mine = product if whole else jnp.where((lane >= first) & (lane < end), product, 0.0)
            totals[k] = totals[k] + mine
    return totals
