"""Triton kernels of the scan's gradient; see `triton_kernels` and, for the maths, `pallas_gpu_vjp`.

Names: `of_x` is the gradient of x, `entering` what passes from later tiles into the end of a tile.
"""

import triton
import triton.language as tl

from .triton_kernels import channels, compose, moved, places, states, step_sizes


@triton.jit
def adjoints(
    decay: tl.tensor, of_output: tl.tensor, entering: tl.tensor, T: tl.constexpr
) -> tl.tensor:
    """What each step of a tile passes on to the state before it."""
    last = tl.arange(0, T)[:, None] == T - 1
    drive = decay * tl.where(last, of_output + entering[None], of_output)
    return tl.associative_scan((decay, drive), 0, compose, reverse=True)[1]


@triton.jit
def adjoint_ends(
    delta: tl.tensor, A: tl.tensor, C: tl.tensor, delta_bias: tl.tensor, of_y: tl.tensor,
    passed: tl.tensor, steps: tl.tensor,
    L: tl.constexpr, D: tl.constexpr, N: tl.constexpr, G: tl.constexpr,
    T: tl.constexpr, BD: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
) -> None:  # fmt: skip
    """What each tile of itself passes on to the state before it, and its sum of step sizes."""
    group, channel, inside = channels(D, G, BD)
    row, k, valid = places(L, T, REVERSE)
    mask = valid[:, None] & inside[None]
    tile = channel[None] + (k * D)[:, None]
    here = row * D
    bias = tl.load(delta_bias + channel, inside, 0.0)
    step = step_sizes(tl.load(delta + here + tile, mask, 0.0).to(tl.float32), bias, mask, SOFTPLUS)
    dy = tl.load(of_y + here + tile, mask, 0.0).to(tl.float32)
    so_far = tl.cumsum(step, 0)
    out = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(steps + out * D + channel, tl.sum(step, 0), inside)
    for n in range(N):
        a = tl.load(A + n * D + channel, inside, 0.0)
        c = tl.load(C + (row * G + group) * N + n + k * (G * N), valid, 0.0).to(tl.float32)
        first = tl.sum(tl.exp(so_far * a[None]) * dy * c[:, None], 0)
        tl.store(passed + (out * N + n) * D + channel, first, inside)


@triton.jit
def gradients(
    u: tl.tensor, delta: tl.tensor, A: tl.tensor, B: tl.tensor, C: tl.tensor, skip: tl.tensor,
    delta_bias: tl.tensor, starts: tl.tensor, entering: tl.tensor, of_y: tl.tensor,
    of_u: tl.tensor, of_delta: tl.tensor, of_A: tl.tensor, of_B: tl.tensor, of_C: tl.tensor,
    of_D: tl.tensor, of_bias: tl.tensor,
    L: tl.constexpr, D: tl.constexpr, N: tl.constexpr, G: tl.constexpr,
    T: tl.constexpr, BD: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of a tile.

    Of B and C one partial sum a block of channels, (b, blocks, n, l); of A, D and delta_bias one a
    tile, (b, tiles, n, d) and (b, tiles, d).
    """
    group, channel, inside = channels(D, G, BD)
    row, k, valid = places(L, T, REVERSE)
    mask = valid[:, None] & inside[None]
    tile = channel[None] + (k * D)[:, None]
    here = row * D
    bias = tl.load(delta_bias + channel, inside, 0.0)
    step = step_sizes(tl.load(delta + here + tile, mask, 0.0).to(tl.float32), bias, mask, SOFTPLUS)
    x = tl.load(u + here + tile, mask, 0.0).to(tl.float32)
    dy = tl.load(of_y + here + tile, mask, 0.0).to(tl.float32)
    driven = step * x
    of_driven, of_step = tl.zeros_like(x), tl.zeros_like(x)
    batch = tl.program_id(2).to(tl.int64)
    this = batch * tl.num_programs(0) + tl.program_id(0)
    part = (batch * tl.num_programs(1) + tl.program_id(1)) * N
    for n in range(N):
        a = tl.load(A + n * D + channel, inside, 0.0)
        matrix = (row * G + group) * N + n
        b = tl.load(B + matrix + k * (G * N), valid, 0.0).to(tl.float32)
        c = tl.load(C + matrix + k * (G * N), valid, 0.0).to(tl.float32)
        edge = (this * N + n) * D + channel
        start = tl.load(starts + edge, inside, 0.0)
        later = tl.load(entering + edge, inside, 0.0)
        decay = tl.exp(step * a[None])
        after = states(decay, driven * b[:, None], start, T)
        of_output = c[:, None] * dy
        passed = adjoints(decay, of_output, later, T)
        reaching = of_output + moved(passed, later, T, -1)
        of_exponent = passed * moved(after, start, T, 1)
        of_driven += reaching * b[:, None]
        of_step += of_exponent * a[None]
        time = (part + n) * L + (row - batch * L)
        tl.store(of_B + time + k, tl.sum(reaching * driven, 1), valid)
        tl.store(of_C + time + k, tl.sum(after * dy, 1), valid)
        tl.store(of_A + edge, tl.sum(of_exponent * step, 0), inside)
    of_step += x * of_driven
    if SOFTPLUS:
        of_step *= tl.sigmoid(tl.load(delta + here + tile, mask, 0.0).to(tl.float32) + bias[None])
    of_x = tl.load(skip + channel, inside, 0.0)[None] * dy + step * of_driven
    tl.store(of_u + here + tile, of_x.to(of_u.dtype.element_ty), mask)
    tl.store(of_delta + here + tile, of_step.to(of_delta.dtype.element_ty), mask)
    tl.store(of_D + this * D + channel, tl.sum(x * dy, 0), inside)
    tl.store(of_bias + this * D + channel, tl.sum(tl.where(mask, of_step, 0.0), 0), inside)
