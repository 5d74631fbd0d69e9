"""Gradient of the TPU kernel of the selective scan.

    grid        as forward, but the time blocks are chunks and run against the scan order
    VMEM        all states of one chunk, recomputed from the state kept before it
    HBM         u, delta and y's gradient read once, the gradients of u and delta written once

Gradients of A, D and the bias are summed within a program, those of B and C over its channels; XLA
adds what the programs give.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from .base import Tile, output
from .pallas_tpu_call import accepted, prepare
from .pallas_tpu_vjp_kernel import gradient_kernel, gradient_scratch


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
        partial(gradient_kernel, plan),
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
                (plan.batch, plan.channel_blocks, plan.padded_length, plan.columns),
                jnp.float32,
                like=x.u,
            ),
            vectors_shape,
            output((plan.batch, n, d), jnp.float32, like=x.u),
        ],
        scratch_shapes=gradient_scratch(plan),
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
