"""Triton kernels of the scan, and what they share with those of its gradient.

Imported only where Triton is: `triton_gpu` has the picture and the calls. Every program works on
one tile, T time steps by BD channels of one group, held in registers; states are taken one after
another. Time is in scan order inside a tile, and REVERSE turns the places in memory around.

Constants: L length, D channels, N states, G groups, T and BD the tile. A is (n, d).
"""

import triton
import triton.language as tl


@triton.jit
def compose(
    decay_1: tl.tensor, drive_1: tl.tensor, decay_2: tl.tensor, drive_2: tl.tensor
) -> tuple[tl.tensor, ...]:
    """Composition of two maps h -> decay h + drive, the first one first."""
    return decay_1 * decay_2, decay_2 * drive_1 + drive_2


@triton.jit
def softplus(x: tl.tensor) -> tl.tensor:
    """log(1 + exp(x)); in float32 that is x itself from torch's threshold 20 on.

    log(1 + e) = 2 artanh(e / (2 + e)) as a series, for e in [0, 1]: the hardware's logarithm has an
    absolute error, and steps near zero need a relative one.
    """
    e = tl.exp(-tl.abs(x))
    z = e / (2 + e)
    s = z * z
    series = 1 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s * (1 / 11 + s / 13)))))
    return tl.maximum(x, 0.0) + 2 * z * series


@triton.jit
def channels(D: tl.constexpr, G: tl.constexpr, BD: tl.constexpr) -> tuple[tl.tensor, ...]:
    """Group of this program, its channels, and which of them are in the group."""
    blocks: tl.constexpr = (D // G + BD - 1) // BD
    group = tl.program_id(1) // blocks
    within = tl.program_id(1) % blocks * BD + tl.arange(0, BD)
    return group, group * (D // G) + within, within < D // G


@triton.jit
def places(L: tl.constexpr, T: tl.constexpr, REVERSE: tl.constexpr) -> tuple[tl.tensor, ...]:
    """First row of this program's tile among all rows of (batch, time), the others relative to it.

    Also which of them are steps of the sequence.
    """
    start = tl.program_id(0) * T
    k = tl.arange(0, T)
    batch = tl.program_id(2).to(tl.int64)
    if REVERSE:
        return batch * L + (L - 1 - start), -k, start + k < L
    return batch * L + start, k, start + k < L


@triton.jit
def step_sizes(
    raw: tl.tensor, bias: tl.tensor, mask: tl.tensor, SOFTPLUS: tl.constexpr
) -> tl.tensor:
    """Step sizes of a tile; zero, which changes nothing, where there is no step."""
    step = raw + bias[None]
    if SOFTPLUS:
        step = softplus(step)
    return tl.where(mask, step, 0.0)


@triton.jit
def moved(x: tl.tensor, edge: tl.tensor, T: tl.constexpr, BY: tl.constexpr) -> tl.tensor:
    """Row k becomes row k + BY, with BY 1 or -1; `edge` fills the row left free."""
    k = tl.broadcast_to(tl.arange(0, T)[:, None], x.shape)
    source = tl.minimum(tl.maximum(k - BY, 0), T - 1)
    return tl.where(k == (0 if BY == 1 else T - 1), edge[None], tl.gather(x, source, 0))


@triton.jit
def states(decay: tl.tensor, drive: tl.tensor, start: tl.tensor, T: tl.constexpr) -> tl.tensor:
    """The state after each step of a tile, from the state before it."""
    first = tl.arange(0, T)[:, None] == 0
    drive = tl.where(first, drive + decay * start[None], drive)
    return tl.associative_scan((decay, drive), 0, compose)[1]


@triton.jit
def ends(
    u: tl.tensor, delta: tl.tensor, A: tl.tensor, B: tl.tensor, delta_bias: tl.tensor,
    state: tl.tensor, steps: tl.tensor,
    L: tl.constexpr, D: tl.constexpr, N: tl.constexpr, G: tl.constexpr,
    T: tl.constexpr, BD: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
) -> None:  # fmt: skip
    """Each tile from a zero state: its last state (b, tiles, n, d), and its sum of step sizes.

    A step's share in the last state decays by exp(A times the sum of the steps after it), which
    takes one running sum for all states and no scan.
    """
    group, channel, inside = channels(D, G, BD)
    row, k, valid = places(L, T, REVERSE)
    mask = valid[:, None] & inside[None]
    tile = channel[None] + (k * D)[:, None]
    here = row * D
    bias = tl.load(delta_bias + channel, inside, 0.0)
    step = step_sizes(tl.load(delta + here + tile, mask, 0.0).to(tl.float32), bias, mask, SOFTPLUS)
    driven = step * tl.load(u + here + tile, mask, 0.0).to(tl.float32)
    after = tl.cumsum(moved(step, tl.zeros_like(bias), T, -1), 0, reverse=True)
    out = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(steps + out * D + channel, tl.sum(step, 0), inside)
    for n in range(N):
        a = tl.load(A + n * D + channel, inside, 0.0)
        b = tl.load(B + (row * G + group) * N + n + k * (G * N), valid, 0.0).to(tl.float32)
        last = tl.sum(tl.exp(after * a[None]) * driven * b[:, None], 0)
        tl.store(state + (out * N + n) * D + channel, last, inside)


@triton.jit
def combine(
    state: tl.tensor, steps: tl.tensor, A: tl.tensor, start: tl.tensor,
    starts: tl.tensor, last: tl.tensor,
    TILES: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    T: tl.constexpr, BD: tl.constexpr, BACKWARD: tl.constexpr,
) -> None:  # fmt: skip
    """What enters each tile, and what leaves the last one, T tiles at a time.

    `state` and `steps` are what each tile adds of itself and its sum of step sizes, `start` what
    enters the first. BACKWARD goes from the last tile to the first.
    """
    n, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(0) * BD + tl.arange(0, BD)
    inside = channel < D
    a = tl.load(A + n * D + channel, inside, 0.0)
    carry = tl.load(start + (batch * N + n) * D + channel, inside, 0.0)
    for first in range(0, TILES, T):
        t = first + tl.arange(0, T)
        mask = (t < TILES)[:, None] & inside[None]
        place = batch * TILES + ((TILES - 1 - t) if BACKWARD else t)
        sums = tl.load(steps + (place * D)[:, None] + channel[None], mask, 0.0)
        tile = ((place * N + n) * D)[:, None] + channel[None]
        after = states(tl.exp(sums * a[None]), tl.load(state + tile, mask, 0.0), carry, T)
        tl.store(starts + tile, moved(after, carry, T, 1), mask)
        carry = tl.sum(tl.where(tl.arange(0, T)[:, None] == T - 1, after, 0.0), 0)
    tl.store(last + (batch * N + n) * D + channel, carry, inside)


@triton.jit
def outputs(
    u: tl.tensor, delta: tl.tensor, A: tl.tensor, B: tl.tensor, C: tl.tensor, skip: tl.tensor,
    delta_bias: tl.tensor, starts: tl.tensor,
    y: tl.tensor,
    L: tl.constexpr, D: tl.constexpr, N: tl.constexpr, G: tl.constexpr,
    T: tl.constexpr, BD: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
) -> None:  # fmt: skip
    """Each tile from its true state: y. `skip` is the scan's D."""
    group, channel, inside = channels(D, G, BD)
    row, k, valid = places(L, T, REVERSE)
    mask = valid[:, None] & inside[None]
    tile = channel[None] + (k * D)[:, None]
    here = row * D
    x = tl.load(u + here + tile, mask, 0.0).to(tl.float32)
    bias = tl.load(delta_bias + channel, inside, 0.0)
    step = step_sizes(tl.load(delta + here + tile, mask, 0.0).to(tl.float32), bias, mask, SOFTPLUS)
    driven = step * x
    total = x * tl.load(skip + channel, inside, 0.0)[None]
    this = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    for n in range(N):
        a = tl.load(A + n * D + channel, inside, 0.0)
        matrix = (row * G + group) * N + n
        b = tl.load(B + matrix + k * (G * N), valid, 0.0).to(tl.float32)
        c = tl.load(C + matrix + k * (G * N), valid, 0.0).to(tl.float32)
        start = tl.load(starts + (this * N + n) * D + channel, inside, 0.0)
        after = states(tl.exp(step * a[None]), driven * b[:, None], start, T)
        total += c[:, None] * after
    tl.store(y + here + tile, total.to(y.dtype.element_ty), mask)
