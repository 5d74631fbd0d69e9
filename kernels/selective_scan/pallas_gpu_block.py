"""What the Pallas kernels for GPUs share: walking through time, and reading and writing rows of it.

`pallas_gpu_plan` says how the work is cut. Lengths and channels that do not divide are masked: a
step of size zero changes nothing, its decay is 1 and its drive 0.

Time below is counted in scan order; `Block.places` alone knows about `reverse`, and about the order
in which a route visits the pixels of an image.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from .base import output
from .pallas_gpu_math import LOG2_E, exp2, fma, softplus_of_log2
from .pallas_gpu_plan import Plan


class Block:
    """What one program sees of the arrays: its batch, group, channels and segment.

    With `whole` the second axis of the grid is none of time: a program walks the whole length.
    """

    def __init__(self, plan: Plan, *, whole: bool = False) -> None:
        self.plan = plan
        block, self.segment, self.batch = (pl.program_id(axis) for axis in range(3))
        self.group, self.part = block // plan.blocks, block % plan.blocks
        first = self.part * plan.channels
        width = plan.d // plan.groups
        self.inside = None
        if width % plan.channels:
            self.inside = first + lax.iota(jnp.int32, plan.channels) < width
        self.span = pl.ds(self.group * width + first, plan.channels)
        self.matrix = self.group if plan.image is None else jnp.int32(plan.image.group)
        self.first_chunk = jnp.int32(0) if whole else self.segment * plan.chunks
        self.chunks: Any = plan.chunks
        if plan.total_chunks % plan.chunks:
            self.chunks = jnp.minimum(plan.chunks, plan.total_chunks - self.first_chunk)

    def walk(
        self,
        fetch: Callable[[Array], Any],
        body: Callable[..., Any],
        carry: Any,
        *,
        back: bool,
        ahead: int = 2,
    ) -> Any:
        """Runs `carry = body(chunk, what fetch(chunk) read, carry)` over the segment's chunks.

        What a chunk reads is asked for while those before it are computed.

        Args:
          fetch: reads from the arrays, given the number of a chunk.
          body: computes.
          carry: what the first chunk is given.
          back: from the last chunk to the first.
          ahead: chunks whose reads are under way while one is computed. Memory takes about as long
            to answer as two of them; the registers have to hold what was read.
        """
        last = self.chunks - 1

        def number(i: Any) -> Array:
            return self.first_chunk + (last - i if back else i)

        return _read_ahead(
            self.chunks,
            lambda i: fetch(number(i)),
            lambda i, fetched, carry: body(number(i), fetched, carry),
            carry,
            tuple(fetch(number(jnp.minimum(i, last))) for i in range(ahead)),
        )

    def hold(self, refs: list[Any], initial: Callable[[Array], list[Array]]) -> list[Array]:
        """Rows of channels for each state that outlast a chunk, with their first values.

        They are held in registers, and returned, if there is one state; otherwise in memory, in
        `ref[batch, segment, state]`: registers cannot be indexed by a state that is known at run
        time only.
        """
        if self.plan.n == 1:
            return initial(jnp.int32(0))

        def begin(n: Array, _: None) -> None:
            self._write(refs, n, initial(n))

        lax.fori_loop(0, self.plan.n, begin, None)
        return []

    def each_state(
        self,
        refs: list[Any],
        held: list[Array],
        fetch: Callable[[Array], Any],
        first: Any,
        body: Callable[..., tuple[list[Array], Any]],
        carry: Any,
    ) -> tuple[list[Array], Any]:
        """Runs `rows, carry = body(n, what fetch(n) read, rows, carry)` for every state.

        Args:
          refs: as for `hold`.
          held: what `hold` or this returned; these rows are given to `body`, and its kept.
          fetch: reads what else a state needs, while the one before it is computed.
          first: what it read for the first state.
          body: computes.
          carry: what the first state is given.

        Returns:
          The rows, if they are in registers, and the last carry.
        """
        if self.plan.n == 1:
            return body(jnp.int32(0), first, held, carry)

        def read(n: Array) -> Any:
            return fetch(n), self._read(refs, n)

        def step(n: Array, fetched: tuple[Any, list[Array]], carry: Any) -> Any:
            rows, carry = body(n, *fetched, carry)
            self._write(refs, n, rows)
            return carry

        begun = (first, self._read(refs, jnp.int32(0)))
        return [], _read_ahead(self.plan.n, read, step, carry, (begun,))

    def write_held(self, refs: list[Any], held: list[Array]) -> None:
        """Writes the rows, if they are in registers."""
        self._write(refs[: len(held)], jnp.int32(0), held)

    def _read(self, refs: list[Any], n: Array) -> list[Array]:
        return [self.load(ref, self.batch, self.segment, n) for ref in refs]

    def _write(self, refs: list[Any], n: Array, rows: list[Array]) -> None:
        for ref, row in zip(refs, rows, strict=True):
            self.store(ref, self.batch, self.segment, n, value=row)

    def places(self, chunk: Array) -> list[Array]:
        """Where in the arrays each step of a chunk is; inside them even if it is past the end."""
        plan, start = self.plan, chunk * self.plan.steps
        if plan.stride is None or plan.ragged:
            times = (jnp.minimum(start + k, plan.length - 1) for k in range(plan.steps))
            return [self._place(time) for time in times]
        first = self._place(start)
        return [first + plan.stride * k for k in range(plan.steps)]

    def _place(self, time: Array) -> Array:
        image = self.plan.image
        time = self.plan.length - 1 - time if self.plan.reverse else time
        if image is None or not image.columns:
            return time
        return time % image.height * image.width + time // image.height

    def valid(self, chunk: Array) -> list[Any]:
        """For each step of a chunk, whether it is before the end; None if all are."""
        if not self.plan.ragged:
            return [None] * self.plan.steps
        return [chunk * self.plan.steps + k < self.plan.length for k in range(self.plan.steps)]

    def within(self, rows: list[Float[Array, "c"]], chunk: Array) -> list[Float[Array, "c"]]:
        """Rows of a chunk, zero past the end."""
        return [
            row if valid is None else jnp.where(valid, row, 0.0)
            for row, valid in zip(rows, self.valid(chunk), strict=True)
        ]

    def load(self, ref: Any, *index: Any, when: Any = None) -> Array:
        """The block's channels of `ref[*index]`, in its dtype; zero where there is nothing."""
        mask = self._mask(when)
        other = None if mask is None else 0.0
        return plgpu.load(_at(ref, *index, self.span), mask=mask, other=other)

    def store(self, ref: Any, *index: Any, value: Float[Array, "c"], when: Any = None) -> None:
        """Writes the block's channels of `ref[*index]`."""
        place = _at(ref, *index, self.span)
        plgpu.store(place, value.astype(ref.dtype), mask=self._mask(when))

    def _mask(self, when: Any) -> Any:
        if when is None:
            return self.inside
        when = jnp.broadcast_to(when, (self.plan.channels,))
        return when if self.inside is None else self.inside & when

    def load_rows(self, ref: Any, chunk: Array) -> list[Array]:
        """A chunk of an array over time, one row a step; anything past the end."""
        return [self.load(ref, self.batch, place) for place in self.places(chunk)]

    def store_rows(self, ref: Any, chunk: Array, rows: list[Float[Array, "c"]]) -> None:
        """Writes a chunk of an array over time; what is past the end is dropped."""
        for place, row, valid in zip(self.places(chunk), rows, self.valid(chunk), strict=True):
            self.store(ref, self.batch, place, value=row, when=valid)

    def load_matrix(self, ref: Any, chunk: Array, n: Array) -> list[Array]:
        """State n of the group's B or C at each step of a chunk; anything past the end."""
        places = self.places(chunk)
        return [plgpu.load(_at(ref, self.batch, place, self.matrix, n)) for place in places]

    def store_matrix(
        self, ref: Any, chunk: Array, n: Array, values: list[Float[Array, ""]]
    ) -> None:
        """Writes this program's partial sums for state n of the group's B or C."""
        for place, value, valid in zip(self.places(chunk), values, self.valid(chunk), strict=True):
            where = _at(ref, self.batch, self.group, self.part, n, place)
            plgpu.store(where, value, mask=valid)

    def step_sizes(
        self, raw: list[Array], bias: Float[Array, "c"], chunk: Array
    ) -> tuple[list[Float[Array, "c"]], list[Callable[[], Float[Array, "c"]]]]:
        """Step sizes of a chunk, zero past the end, and functions that give their slopes by raw."""
        if not self.plan.delta_softplus:
            steps = [delta.astype(jnp.float32) + bias for delta in raw]
            return self.within(steps, chunk), [lambda: jnp.ones_like(bias)] * len(raw)
        bias = bias * LOG2_E
        scaled = (self.fma(delta.astype(jnp.float32), jnp.float32(LOG2_E), bias) for delta in raw)
        pairs = [softplus_of_log2(x, interpret=self.plan.interpret) for x in scaled]
        return self.within([step for step, _ in pairs], chunk), [slope for _, slope in pairs]

    def fma(self, a: Any, b: Any, c: Any) -> Float[Array, "c"]:
        """The sum a b + c, rounded once."""
        return fma(a, b, c, interpret=self.plan.interpret)

    def decay(self, step: Float[Array, "c"], a: Float[Array, "c"]) -> Float[Array, "c"]:
        """The decay of a step, with log2(e) times A for `a`."""
        return exp2(step * a, interpret=self.plan.interpret)


def _read_ahead(
    count: Any,
    fetch: Callable[[Array], Any],
    body: Callable[..., Any],
    carry: Any,
    begun: tuple[Any, ...],
) -> Any:
    """Runs `carry = body(i, what fetch(i) read, carry)`, with the next ones' reads under way.

    Args:
      count: how often.
      fetch: reads.
      body: computes.
      carry: what the first is given.
      begun: what fetch read for the first ones, as many as are to be under way.
    """

    def step(i: Array, carry: tuple[tuple[Any, ...], Any]) -> tuple[tuple[Any, ...], Any]:
        (fetched, *under_way), carry = carry
        ahead = fetch(jnp.minimum(i + len(begun), count - 1))
        return (*under_way, ahead), body(i, fetched, carry)

    return lax.fori_loop(0, count, step, (begun, carry))[1]


def _at(ref: Any, *index: Any) -> Any:
    """`ref.at[index]`; the interpreter takes no plain integers."""
    return ref.at[tuple(jnp.int32(i) if isinstance(i, int) else i for i in index)]


def call(
    kernel: Callable[..., None],
    plan: Plan,
    inputs: Any,
    outputs: Any,
    *,
    into: dict[str, Array] | None = None,
) -> Any:
    """Runs a kernel over the whole grid.

    Args:
      kernel: called as `kernel(plan, inputs, outputs)`, with references for arrays.
      plan: how the work is cut.
      inputs: a tuple of arrays, the first u.
      outputs: (shape, dtype) of each result, a dictionary.
      into: arrays in whose place results of that name are written; the kernel finds there what they
        hold.
    """
    leaves, names = jax.tree.leaves(inputs), sorted(outputs)
    like, into = leaves[0], into or {}
    places = {len(leaves) + i: names.index(name) for i, name in enumerate(sorted(into))}
    function = kernel.func if isinstance(kernel, partial) else kernel

    def run(inputs: Any, _: Any, outputs: Any) -> None:
        kernel(plan, inputs, outputs)

    return pl.pallas_call(
        run,
        out_shape={name: output(*what, like=like) for name, what in outputs.items()},
        grid=(plan.groups * plan.blocks, plan.segments, like.shape[0]),
        compiler_params=plgpu.CompilerParams(num_warps=plan.warps, num_stages=1),
        input_output_aliases=places,
        interpret=plan.interpret,
        name=f"selective_scan{function.__name__}",
    )(inputs, into)
