"""A computation that depends on the platform, traced for one of them where that is known."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import lax

Result = TypeVar("Result")


def by_platform(
    *operands: Any, default: Callable[..., Result], **branches: Callable[..., Result]
) -> Result:
    """Calls the branch of the platform that the program is for.

    `lax.platform_dependent` traces every branch and its gradient, in a network's training step a
    third of all tracing. Inside `jax.set_mesh`, of devices or of a topology, only theirs is traced,
    and stays whatever the program is lowered for; elsewhere the platform is not known before that.

    Args:
      *operands: what the branches take.
      default: runs where no branch is for the platform.
      **branches: by platform, as `lax.platform_dependent` names them: "cpu", "tpu", "cuda".

    Returns:
      What the branch gives.
    """
    platform = _known_platform()
    if platform is None:
        return lax.platform_dependent(*operands, default=default, **branches)
    return branches.get(platform, default)(*operands)


def _known_platform() -> str | None:
    """Of the devices of the mesh in context, or None if there is none."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return None
    if device.platform == "gpu":  # programs are lowered for the maker's own platform
        return "cuda" if device.device_kind.startswith("NVIDIA") else "rocm"
    return device.platform
