"""Chunked scan: the length is cut in chunks, and inside one, all that can be done at once is.

    time         |---- chunk 0 ----|---- chunk 1 ----| ...   one after another, in scan order
    in a chunk   step sizes, decay and drive of all steps    at once, vectorised
                 states: the recurrence over the steps       a loop (CPU) or a parallel prefix
                 y = C . state of all steps                  at once, vectorised
    kept         the state before each chunk                 where the gradient starts from

The gradient walks the chunks the other way, recomputes the states of one chunk at a time and runs
the adjoint recurrence over them, so no array of size length x d_state exists, forward or backward.

Inside, the state axis stands before the channels, (b, t, n, g, p): channels are contiguous, every
operation vectorises over them, and at d_state 1 the state axis vanishes in compilation. Sums are
written as folded additions or products with ones: XLA's CPU backend hands plain reductions of such
arrays to library calls that take ten times as long.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .base import compose, state_dtype, step_size, zeros

# Values (batch x steps x channels x d_state) in one chunk. On a CPU a chunk should stay in the
# cache; an accelerator needs enough of them to keep its cores busy.
_CPU_CHUNK_VALUES = 2**19
_ACCELERATOR_CHUNK_VALUES = 2**22


class _Options(NamedTuple):
    """What is fixed at trace time."""

    chunk: int
    delta_softplus: bool
    reverse: bool


class _Operands(NamedTuple):
    """The arrays of a scan, or of one chunk of it.

    In a chunk everything is in the dtype of the arithmetic, and the channels of u and delta are
    split in groups. In the whole scan u and delta are as they were given: XLA would copy them if
    they had a group axis of size 1.
    """

    u: Float[Array, "b l d"] | Float[Array, "b t g p"]
    delta: Float[Array, "b l d"] | Float[Array, "b t g p"]
    A: Float[Array, "n g p"]
    B: Float[Array, "b l n g"]
    C: Float[Array, "b l n g"]
    D: Float[Array, "g p"] | None
    delta_bias: Float[Array, "g p"] | None


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
        delta = step_size(delta, delta_bias, delta_softplus=False, dtype=dtype)
        delta_bias = None
    chunk = chunk_length(length, b * d * n) if chunk is None else min(chunk, length)
    padding = -length % chunk
    grouped = (groups, d // groups)
    operands = _Operands(
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

    y, state = _scan(_Options(chunk, delta_softplus, reverse), operands, state)
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
    options: _Options, operands: _Operands, state: Float[Array, "b n g p"]
) -> tuple[Float[Array, "b l d"], Float[Array, "b n g p"]]:
    """Gives y in u's dtype and the last state, from the state before the first step."""
    y, state, _ = _forward(options, operands, state)
    return y, state


def _forward(
    options: _Options, operands: _Operands, state: Float[Array, "b n g p"]
) -> tuple[Float[Array, "b l d"], Float[Array, "b n g p"], Float[Array, "k b n g p"]]:
    """As `_scan`, and the state before each of the k chunks."""
    chunks = operands.u.shape[1] // options.chunk

    def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        state, y, kept = carry
        index = chunks - 1 - i if options.reverse else i
        x = _take_chunk(operands, index, options)
        kept = lax.dynamic_update_index_in_dim(kept, state, index, 0)
        step, decay = _discretize(x, options)
        drive = (step * x.u)[:, :, None] * x.B[..., None]
        states = _recurrence(decay, drive, state, reverse=options.reverse)
        y_chunk = _sum_states(states * x.C[..., None])
        if x.D is not None:
            y_chunk = y_chunk + x.D * x.u
        return _last(states, reverse=options.reverse), _put_chunk(y, y_chunk, index, options), kept

    kept = zeros((chunks, *state.shape), state.dtype, like=state)
    state, y, kept = lax.fori_loop(0, chunks, body, (state, jnp.zeros_like(operands.u), kept))
    return y, state, kept


def _scan_forward(
    options: _Options, operands: _Operands, state: Float[Array, "b n g p"]
) -> tuple[tuple[Array, Array], tuple[_Operands, Array]]:
    y, state, kept = _forward(options, operands, state)
    return (y, state), (operands, kept)


def _scan_backward(
    options: _Options,
    residuals: tuple[_Operands, Float[Array, "k b n g p"]],
    cotangents: tuple[Float[Array, "b l d"], Float[Array, "b n g p"]],
) -> tuple[_Operands, Float[Array, "b n g p"]]:
    operands, kept = residuals
    y_gradient, state_gradient = cotangents
    chunks = kept.shape[0]
    whole = operands._replace(u=y_gradient)

    def body(i: Array, carry: tuple[Array, _Operands]) -> tuple[Array, _Operands]:
        carried, total = carry
        index = i if options.reverse else chunks - 1 - i
        x = _take_chunk(operands, index, options)
        y_chunk = _take_chunk(whole, index, options).u
        carried, part = _chunk_gradient(x, kept[index], y_chunk, carried, options)
        return carried, _Operands(
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


def _chunk_gradient(
    x: _Operands,
    start: Float[Array, "b n g p"],
    y_gradient: Float[Array, "b t g p"],
    carried: Float[Array, "b n g p"],
    options: _Options,
) -> tuple[Float[Array, "b n g p"], _Operands]:
    """Gradient of one chunk.

    With l_t the gradient reaching state t from everything after it and its own output,

        l_t = C_t y'_t + q_{t+1},    q_t = decay_t l_t

    q_t being what it passes on to state t - 1: a recurrence like the states', run the other way.

    Args:
      x: the chunk's operands.
      start: state before the chunk.
      y_gradient: gradient of its y.
      carried: gradient of the state after the chunk that comes from later chunks.
      options: as in `_scan`.

    Returns:
      Gradient of `start`, and of the operands.
    """
    reverse = options.reverse
    step, decay = _discretize(x, options)
    driven = step * x.u
    states = _recurrence(decay, driven[:, :, None] * x.B[..., None], start, reverse=reverse)

    from_output = y_gradient[:, :, None] * x.C[..., None]
    passed_on = _recurrence(decay, decay * from_output, carried, reverse=not reverse)
    reaching = from_output + _previous(passed_on, carried, reverse=not reverse)
    of_exponent = passed_on * _previous(states, start, reverse=reverse)

    of_driven = _sum_states(reaching * x.B[..., None])
    of_step = x.u * of_driven + _sum_states(of_exponent * x.A)
    if options.delta_softplus:
        raw = x.delta if x.delta_bias is None else x.delta + x.delta_bias
        of_step = of_step * jax.nn.sigmoid(raw)
    of_u = step * of_driven
    if x.D is not None:
        of_u = of_u + x.D * y_gradient
    return _last(passed_on, reverse=not reverse), _Operands(
        u=of_u,
        delta=of_step,
        A=_sum_steps(of_exponent * step[:, :, None]),
        B=_sum_channels(reaching, driven),
        C=_sum_channels(states, y_gradient),
        D=None if x.D is None else _sum_steps(x.u * y_gradient),
        delta_bias=None if x.delta_bias is None else _sum_steps(of_step),
    )


def _discretize(
    x: _Operands, options: _Options
) -> tuple[Float[Array, "b t g p"], Float[Array, "b t n g p"]]:
    """Step sizes and decays of a chunk."""
    step = step_size(x.delta, x.delta_bias, delta_softplus=options.delta_softplus, dtype=x.A.dtype)
    return step, jnp.exp(step[:, :, None] * x.A)


def _recurrence(
    decay: Float[Array, "b t n g p"],
    drive: Float[Array, "b t n g p"],
    state: Float[Array, "b n g p"],
    *,
    reverse: bool,
) -> Float[Array, "b t n g p"]:
    """Every state of h_t = decay_t h_{t-1} + drive_t, from the state before the first step."""
    return lax.platform_dependent(
        decay,
        drive,
        state,
        cpu=partial(recurrence_by_step, reverse=reverse),
        default=partial(recurrence_by_prefix, reverse=reverse),
    )


def recurrence_by_step(
    decay: Float[Array, "b t n g p"],
    drive: Float[Array, "b t n g p"],
    state: Float[Array, "b n g p"],
    *,
    reverse: bool,
) -> Float[Array, "b t n g p"]:
    """The recurrence as a loop that turns the drives into the states in place."""
    steps = decay.shape[1]
    take = partial(lax.dynamic_index_in_dim, axis=1, keepdims=False, allow_negative_indices=False)

    def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        state, rows = carry
        t = steps - 1 - i if reverse else i
        state = take(decay, t) * state + take(rows, t)
        rows = lax.dynamic_update_index_in_dim(rows, state, t, 1, allow_negative_indices=False)
        return state, rows

    return lax.fori_loop(0, steps, body, (state, drive))[1]


def recurrence_by_prefix(
    decay: Float[Array, "b t n g p"],
    drive: Float[Array, "b t n g p"],
    state: Float[Array, "b n g p"],
    *,
    reverse: bool,
) -> Float[Array, "b t n g p"]:
    """The recurrence as a parallel prefix, for machines with many cores."""
    decays, states = lax.associative_scan(compose, (decay, drive), reverse=reverse, axis=1)
    return decays * state[:, None] + states


def _previous(
    states: Float[Array, "b t n g p"], start: Float[Array, "b n g p"], *, reverse: bool
) -> Float[Array, "b t n g p"]:
    """The state before each step: the states one step later in scan order, `start` first."""
    start = start[:, None]
    parts = (states[:, 1:], start) if reverse else (start, states[:, :-1])
    return jnp.concatenate(parts, axis=1)


def _last(states: Float[Array, "b t n g p"], *, reverse: bool) -> Float[Array, "b n g p"]:
    return states[:, 0] if reverse else states[:, -1]


def _take_chunk(operands: _Operands, index: Array, options: _Options) -> _Operands:
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
    whole: Float[Array, "b l ..."], part: Float[Array, "b t ..."], index: Array, options: _Options
) -> Float[Array, "b l ..."]:
    """`whole` with chunk `index` replaced, in its own shape and dtype."""
    part = part.reshape(*part.shape[:2], *whole.shape[2:]).astype(whole.dtype)
    start = index * options.chunk
    return lax.dynamic_update_slice_in_dim(whole, part, start, 1, allow_negative_indices=False)


def _add(total: Array | None, part: Array | None) -> Array | None:
    return None if total is None or part is None else total + part


def _sum_states(x: Float[Array, "b t n g p"]) -> Float[Array, "b t g p"]:
    """Sum over the state axis, by folding it in half until one is left."""
    size = x.shape[2]
    if size == 1:
        return x[:, :, 0]
    half = size // 2
    total = _sum_states(x[:, :, :half] + x[:, :, half : 2 * half])
    return total + x[:, :, -1] if size % 2 else total


def _sum_steps(x: Float[Array, "b t ..."]) -> Float[Array, "..."]:
    """Sum over batch and steps, as a product with ones."""
    rows = x.shape[0] * x.shape[1]
    ones = jnp.ones(rows, x.dtype)
    total = jnp.dot(ones, x.reshape(rows, -1), precision=lax.Precision.HIGHEST)
    return total.reshape(x.shape[2:])


def _sum_channels(
    x: Float[Array, "b t n g p"], y: Float[Array, "b t g p"]
) -> Float[Array, "b t n g"]:
    """Sum of x y over the channels of each group."""
    return jnp.einsum("btngp,btgp->btng", x, y, precision=lax.Precision.HIGHEST)


def _pad_steps(x: Float[Array, "b l ..."], steps: int, value: float = 0) -> Float[Array, "b l ..."]:
    if steps == 0:
        return x
    widths = [(0, steps if axis == 1 else 0) for axis in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)
