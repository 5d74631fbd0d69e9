"""Chunked scan: the length is cut in chunks, and only the state before each of them is kept.

    time         |---- chunk 0 ----|---- chunk 1 ----| ...   one after another, in scan order
    in a chunk   on a CPU step by step, the state in its first-level cache    chunked_steps.py
                 on an accelerator all steps at once                          chunked_wide.py
    kept         the state before each chunk, where the gradient starts from

The gradient walks the chunks the other way, recomputes the states of one chunk at a time and runs
the adjoint recurrence over them, so no array of size length x d_state exists, forward or backward.

Inside, the state axis stands before the channels, (b, t, n, g, p): channels are contiguous, every
operation vectorises over them, and at d_state 1 the state axis vanishes in compilation.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from ..platforms import by_platform
from . import base, chunked_steps, chunked_wide
from .base import state_dtype, zeros
from .chunked_base import Operands, Options

# Values (batch x steps x channels x d_state) in one chunk. On a CPU a chunk should stay in the
# second-level cache; an accelerator needs enough of them to keep its cores busy.
_CPU_CHUNK_VALUES = 2**16
_ACCELERATOR_CHUNK_VALUES = 2**22

# From so many states on, a CPU takes the gradient of a chunk step by step too.
_CPU_MANY_STATES = 4


def chunked_scan(
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
    chunk: int | None = None,
) -> tuple[Float[Array, "b l d"], Float[Array, "b d n"]]:
    """The scan chunk by chunk; see `selective_scan` for the arguments.

    `chunk` is the number of steps in a chunk; None leaves it to `chunk_length`.
    """
    (b, length, d), n, groups = u.shape, A.shape[1], B.shape[2]
    dtype = state_dtype(u, delta, A, B, C, D, delta_bias, initial_state)
    if delta_bias is not None and not delta_softplus:
        # Then zero is a step of size zero, as the padding below needs it to be.
        delta = base.step_size(delta, delta_bias, delta_softplus=False, dtype=dtype)
        delta_bias = None
    chunk = chunk_length(length, b * d * n) if chunk is None else min(chunk, length)
    padding = -length % chunk
    grouped = (groups, d // groups)
    operands = Operands(
        u=_pad_steps(u, padding),
        # A step of size zero changes nothing: its decay is 1 and its drive 0.
        delta=_pad_steps(delta, padding, -jnp.inf if delta_softplus else 0),
        A=A.astype(dtype).T.reshape(n, *grouped),
        B=_pad_steps(B, padding).astype(dtype).swapaxes(2, 3),
        C=_pad_steps(C, padding).astype(dtype).swapaxes(2, 3),
        D=None if D is None else D.astype(dtype).reshape(grouped),
        delta_bias=None if delta_bias is None else delta_bias.astype(dtype).reshape(grouped),
    )
    if initial_state is None:
        initial_state = zeros((b, d, n), dtype, like=u)
    state = initial_state.astype(dtype).swapaxes(1, 2).reshape(b, n, *grouped)

    y, state = _scan(Options(chunk, delta_softplus, reverse), operands, state)
    return y[:, :length], state.reshape(b, n, d).swapaxes(1, 2)


def chunk_length(length: int, values: int) -> int:
    """Number of steps in a chunk.

    As many as fit the platform's budget, but at least the square root of the length, so that the
    states kept between chunks stay few; and if some count near that divides the length, one that
    does, for then nothing need be padded.

    Args:
      length: steps in the whole scan.
      values: values in the state, batch x channels x d_state.
    """
    on_cpu = jax.default_backend() == "cpu"
    budget = _CPU_CHUNK_VALUES if on_cpu else _ACCELERATOR_CHUNK_VALUES
    longest = max(1, budget // values, math.isqrt(length))
    fewest = -(-length // longest)
    for chunks in range(fewest, min(2 * fewest, length) + 1):
        if length % chunks == 0:
            return length // chunks
    return -(-length // fewest)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(
    options: Options, operands: Operands, state: Float[Array, "b n g p"]
) -> tuple[Float[Array, "b l d"], Float[Array, "b n g p"]]:
    """Gives y in u's dtype and the last state, from the state before the first step."""
    y, state, _ = _forward(options, operands, state)
    return y, state


def _forward(
    options: Options, operands: Operands, state: Float[Array, "b n g p"]
) -> tuple[Float[Array, "b l d"], Float[Array, "b n g p"], Float[Array, "k b n g p"]]:
    """As `_scan`, and the state before each of the k chunks."""
    chunks = operands.u.shape[1] // options.chunk

    def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        state, y, kept = carry
        index = chunks - 1 - i if options.reverse else i
        x = _take_chunk(operands, index, options)
        kept = lax.dynamic_update_index_in_dim(kept, state, index, 0)
        y_chunk, state = by_platform(
            x,
            state,
            cpu=partial(chunked_steps.outputs, options=options),
            default=partial(chunked_wide.outputs, options=options),
        )
        if x.D is not None:
            y_chunk = y_chunk + x.D * x.u
        return state, _put_chunk(y, y_chunk, index, options), kept

    kept = zeros((chunks, *state.shape), state.dtype, like=state)
    state, y, kept = lax.fori_loop(0, chunks, body, (state, jnp.zeros_like(operands.u), kept))
    return y, state, kept


def _scan_forward(
    options: Options, operands: Operands, state: Float[Array, "b n g p"]
) -> tuple[tuple[Array, Array], tuple[Operands, Array]]:
    y, state, kept = _forward(options, operands, state)
    # Kept by those who compute everything else again, see `zzhnet_jax.models.functional`.
    y, kept = (checkpoint_name(array, "scan_states") for array in (y, kept))
    return (y, state), (operands, kept)


@partial(jax.jit, static_argnums=0)
def _scan_backward(
    options: Options,
    residuals: tuple[Operands, Float[Array, "k b n g p"]],
    cotangents: tuple[Float[Array, "b l d"], Float[Array, "b n g p"]],
) -> tuple[Operands, Float[Array, "b n g p"]]:
    operands, kept = residuals
    y_gradient, state_gradient = cotangents
    chunks = kept.shape[0]
    whole = operands._replace(u=y_gradient)
    on_cpu = chunked_steps if kept.shape[2] >= _CPU_MANY_STATES else chunked_wide

    def body(i: Array, carry: tuple[Array, Operands]) -> tuple[Array, Operands]:
        carried, total = carry
        index = i if options.reverse else chunks - 1 - i
        x = _take_chunk(operands, index, options)
        y_chunk = _take_chunk(whole, index, options).u
        carried, part = by_platform(
            x,
            kept[index],
            y_chunk,
            carried,
            cpu=partial(on_cpu.gradient, options=options),
            default=partial(chunked_wide.gradient, options=options),
        )
        return carried, Operands(
            u=_put_chunk(total.u, part.u, index, options),
            delta=_put_chunk(total.delta, part.delta, index, options),
            A=total.A + part.A,
            B=_put_chunk(total.B, part.B, index, options),
            C=_put_chunk(total.C, part.C, index, options),
            D=_add(total.D, part.D),
            delta_bias=_add(total.delta_bias, part.delta_bias),
        )

    total = jax.tree.map(jnp.zeros_like, operands)
    state_gradient, total = lax.fori_loop(0, chunks, body, (state_gradient, total))
    return total, state_gradient


_scan.defvjp(_scan_forward, _scan_backward)


def _take_chunk(operands: Operands, index: Array, options: Options) -> Operands:
    """The operands of chunk `index`."""
    grouped = operands.A.shape[1:]

    def take(x: Float[Array, "b l ..."]) -> Float[Array, "b t ..."]:
        start = index * options.chunk
        x = lax.dynamic_slice_in_dim(x, start, options.chunk, 1, allow_negative_indices=False)
        return x.astype(operands.A.dtype)

    def take_channels(x: Float[Array, "b l d"]) -> Float[Array, "b t g p"]:
        return take(x).reshape(x.shape[0], options.chunk, *grouped)

    u, delta, _, B, C, _, _ = operands
    return operands._replace(u=take_channels(u), delta=take_channels(delta), B=take(B), C=take(C))


def _put_chunk(
    whole: Float[Array, "b l ..."], part: Float[Array, "b t ..."], index: Array, options: Options
) -> Float[Array, "b l ..."]:
    """`whole` with chunk `index` replaced, in its own shape and dtype."""
    part = part.reshape(*part.shape[:2], *whole.shape[2:]).astype(whole.dtype)
    start = index * options.chunk
    return lax.dynamic_update_slice_in_dim(whole, part, start, 1, allow_negative_indices=False)


def _add(total: Array | None, part: Array | None) -> Array | None:
    return None if total is None or part is None else total + part


def _pad_steps(x: Float[Array, "b l ..."], steps: int, value: float = 0) -> Float[Array, "b l ..."]:
    if steps == 0:
        return x
    widths = [(0, steps if axis == 1 else 0) for axis in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)
