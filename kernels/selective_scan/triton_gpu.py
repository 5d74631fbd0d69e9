"""The scan as Triton kernels, called through jax-triton: every tile of time at once.

    time      |-- tile 0 --|-- tile 1 --| ...   each a program of its own, T steps by BD channels
    ends      each tile from a zero state: its last state, and the sum of its step sizes
    combine   the state before each tile, which is kept; a parallel prefix over tiles
    outputs   each tile from its true state: a parallel prefix over its steps, and y

Made for long sequences with few channels, where walking through time leaves a GPU idle. The kernels
are in `triton_kernels`, those of the gradient in `triton_kernels_vjp`; Triton is imported when they
are first used.

Memory traffic in bytes a value of u, float32, without B and C (8 n / channels of a group):
20 forward and 12 n / T for the states between tiles.
"""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from .base import Kernel, KernelScan
from .partition import differentiable
from .triton_gpu_forward import forward, kept_states
from .triton_gpu_vjp import backward

MOST_STATES = 64  # beyond it the partial sums of gradients outgrow the scan's operands


def unavailable() -> str | None:
    """Says why the kernel cannot run on this machine, or returns None if it can."""
    missing = [x for x in ("triton", "jax_triton") if importlib.util.find_spec(x) is None]
    if missing:
        names = " and ".join(missing).replace("_", "-")
        return f'{names} not installed: pip install "zzhnet-jax[triton]"'
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


triton_scan: KernelScan = differentiable(Kernel(forward, backward, kept_states))
