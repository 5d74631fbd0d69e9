"""The scan as Pallas kernels for GPUs (Triton backend): each thread walks a channel in time.

    time      |-- segment 0 --|-- segment 1 --| ...     at once, by different programs
    ends      each segment from a zero state: its last state, and the sum of its step sizes
    combine   the state before each segment; a segment multiplies a state by exp(A sum of steps)
    apply     each segment from its true state: y, and the states that the gradient starts from

Where sequences and channels fill the GPU there is one segment, and only `apply` runs.
`pallas_gpu_plan` says how the work is cut, `pallas_gpu_vjp` has the gradient.

Memory traffic in bytes a value of u, float32, without B and C (8 n / channels of a group):
12 with one segment (u and delta read, y written), 20 with several, and at most 4 for the states
that are kept.
"""

from typing import Any

import jax
import jax.numpy as jnp

from .base import Kernel, KernelScan
from .pallas_gpu_forward import forward, kept_states
from .pallas_gpu_vjp import backward
from .partition import differentiable

MOST_STATES = 64  # of a channel: as many are compiled and tested


def unavailable() -> str | None:
    """Says why the kernel cannot run on this machine, or returns None if it can."""
    if jax.default_backend() == "gpu":
        return None
    return f"it needs a CUDA device, and JAX runs on {jax.default_backend()} here"


def unsupported(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, delta_bias: Any, initial_state: Any
) -> str | None:
    """Says why the kernel cannot take these operands, or returns None if it can."""
    operands = (u, delta, A, B, C, D, delta_bias, initial_state)
    if any(x is not None and x.dtype == jnp.float64 for x in operands):
        return "its arithmetic is float32, and an operand is float64"
    if A.shape[1] > MOST_STATES:
        return f"it takes up to {MOST_STATES} states of a channel, and d_state is {A.shape[1]}"
    return None


pallas_gpu_scan: KernelScan = differentiable(Kernel(forward, backward, kept_states))
