"""Which kernels scan all routes of an image, on which platform, and what they can take."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..selective_scan import pallas_gpu, pallas_tpu
from . import fused_gpu, fused_tpu, fused_tpu_vjp
from .frame import ROUTES, Frame, frame_of, vmem_capacity
from .patterns import ScanPattern

IMAGE = "bhwd"  # axes of an image

FusedName = Literal["pallas_tpu", "pallas_gpu"]


class Kernels(NamedTuple):
    """A fused scan of a platform.

    Attributes:
      platform: as `lax.platform_dependent` names it.
      unavailable: says why it cannot run on this machine, or returns None if it can.
      most_states: the largest d_state.
      steps: from delta and dt_proj or None to the step sizes as the kernels take them.
      step_axes: their axes.
      forward: from a frame and the operands to y and the kept states.
      backward: from those, the kept states and y's gradient to the gradients; see `fused_gpu`.
      kept_shape: of the kept states.
      in_vmem: whether an image must fit in a TPU's VMEM.
    """

    platform: str
    unavailable: Callable[[], str | None]
    most_states: int
    steps: Callable[[Array, Array | None], list[Array]]
    step_axes: tuple[str, ...]
    forward: Callable[..., list[Array]]
    backward: Callable[..., list[Array]]
    kept_shape: Callable[[Frame], tuple[int, ...]]
    in_vmem: bool


KERNELS: dict[FusedName, Kernels] = {
    "pallas_tpu": Kernels(
        "tpu",
        pallas_tpu.unavailable,
        fused_tpu.MAX_STATES,
        fused_tpu.step_sizes,
        ("bhwkd",),
        fused_tpu.forward,
        fused_tpu_vjp.backward,
        fused_tpu.kept_shape,
        in_vmem=True,
    ),
    "pallas_gpu": Kernels(
        "cuda",
        pallas_gpu.unavailable,
        pallas_gpu.MOST_STATES,
        fused_gpu.step_sizes,
        (IMAGE,) * ROUTES,
        fused_gpu.forward,
        fused_gpu.backward,
        fused_gpu.kept_shape,
        in_vmem=False,
    ),
}


def unsupported(
    name: FusedName,
    u: Array | jax.ShapeDtypeStruct,
    delta: Array | jax.ShapeDtypeStruct,
    A: Array | jax.ShapeDtypeStruct,
    *others: Array | jax.ShapeDtypeStruct | None,
    pattern: ScanPattern,
) -> str | None:
    """Why the kernels cannot take the operands of `fused_scan`, or None if they can."""
    kernels = KERNELS[name]
    if any(x is not None and x.dtype == jnp.float64 for x in (u, delta, A, *others)):
        return "it has no float64"
    if A.shape[2] > kernels.most_states:
        return f"d_state is {A.shape[2]}: it takes at most {kernels.most_states}"
    frame = frame_of(u, A.shape[2], pattern)
    narrow = 3 * (u.dtype == jnp.bfloat16) + 2 * (delta.dtype == jnp.bfloat16)
    needed, capacity = fused_tpu_vjp.backward_vmem(frame, narrow), vmem_capacity()
    if kernels.in_vmem and needed > capacity:
        return (
            f"a {frame.height} x {frame.width} image takes {needed / 2**20:.0f} MiB of VMEM, of"
            f" which there are {capacity / 2**20:.0f}"
        )
    return None
