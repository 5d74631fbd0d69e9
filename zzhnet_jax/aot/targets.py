"""Slices of accelerators, by name, as devices that programs can be compiled for and not run on.

    v5e:4x4         16 chips of a TPU v5e slice
    v5p:2x4x4       32 chips of a TPU v5p slice
    cuda:h100:8     one host with 8 H100s
    cuda:h100:64    8 hosts with 8 each

TPU programs are compiled by libtpu, GPU programs by XLA's CUDA plugin; both are ordinary wheels and
neither looks for hardware. Everything that depends on them stands here.
"""

import importlib.util
import os
import re
from dataclasses import dataclass
from functools import cached_property

import jax
from jax.experimental import topologies

from zzhnet_jax.errors import UserError

from .chips import CHIPS, Chip, chip_named
from .gpu_texts import GPU_TEXTS

# Read by libtpu when it is loaded: without them it looks for a TPU for minutes, and only one
# process of the machine could use it.
_TPU_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
# Read by XLA when the plugin is loaded: both would need a GPU to time candidates on.
_GPU_XLA_FLAGS = ("--xla_gpu_autotune_level=0", "--xla_gpu_enable_triton_gemm=false")

_TPU_FORM = re.compile(r"(?P<chip>[a-z0-9]+):(?P<shape>\d+(x\d+){1,2})")
_GPU_FORM = re.compile(r"cuda:(?P<chip>[a-z0-9]+)(:(?P<count>\d+))?")
_AXES = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}

TARGETS_HELP = "v5e:4x4, v6e:2x4, v4:2x2x1, v5p:2x2x4, tpu7x:2x2x1, cuda:h100:8, cuda:a100:16"


class TargetError(UserError):
    """A target that does not exist, or whose compiler is not installed."""


@dataclass(frozen=True)
class Target:
    """Accelerators to compile for.

    Attributes:
      text: how the user named them.
      chip: what each of them is.
      shape: chips along each axis of a TPU slice; (hosts, GPUs of each) for GPUs.
    """

    text: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def platform(self) -> str:
        """JAX's name of the platform."""
        return "tpu" if self.chip.name in _AXES else "cuda"

    @cached_property
    def devices(self) -> list[jax.Device]:
        """The devices, for a mesh; the compiler is loaded when they are first asked for.

        Raises:
          TargetError: the compiler is not installed, or there is no such slice.
        """
        if jax.config.jax_platforms is None:  # type: ignore[attr-defined]
            # What is traced needs some device for its constants; the real ones stay free.
            jax.config.update("jax_platforms", "cpu")
        return _tpu_devices(self) if self.platform == "tpu" else _gpu_devices(self)


def parse_target(text: str) -> Target:
    """Reads a target such as "v5e:4x4" or "cuda:h100:8"; loads nothing.

    Raises:
      TargetError: no such chip or form; the message names what there is.
    """
    if match := _GPU_FORM.fullmatch(text):
        chip = chip_named(match["chip"])
        count = int(match["count"] or 1)
        if chip is not None and chip.name in GPU_TEXTS and _fills_hosts(count, chip):
            hosts = max(count // chip.host_devices, 1)
            return Target(text, chip, (hosts, count // hosts))
    elif match := _TPU_FORM.fullmatch(text):
        chip = chip_named(match["chip"])
        shape = tuple(int(size) for size in match["shape"].split("x"))
        if chip is not None and len(shape) == _AXES.get(chip.name) and min(shape) > 0:
            return Target(text, chip, shape)
    tpus = ", ".join(
        f"{chip.name}:{'x'.join('ABC'[: _AXES[chip.name]])}" for chip in CHIPS if chip.name in _AXES
    )
    gpus = ", ".join(f"cuda:{name}:N" for name in GPU_TEXTS)
    raise TargetError(
        f"target {text!r}: it must be one of {tpus} with chips along each axis, or {gpus} with"
        " N GPUs, up to 8 or a multiple of 8"
    )


def _fills_hosts(count: int, chip: Chip) -> bool:
    return 0 < count <= chip.host_devices or (count > 0 and count % chip.host_devices == 0)


def _require(target: Target, remedy: str, *modules: str) -> None:
    if not any(map(importlib.util.find_spec, modules)):
        raise TargetError(
            f"target {target.text!r} needs {modules[0]}, which is not installed: {remedy}"
        )


def _tpu_devices(target: Target) -> list[jax.Device]:
    _require(target, "pip install libtpu==0.0.42.1, or `make aot`, which has it", "libtpu")
    for name, value in _TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    name = f"{target.chip.name}:{'x'.join(map(str, target.shape))}"
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:  # of several types, all of them libtpu's refusal of the shape
        reason = str(error).splitlines()[0]
        raise TargetError(f"target {target.text!r}: libtpu has no such slice ({reason})") from None


def _gpu_devices(target: Target) -> list[jax.Device]:
    remedy = (
        "pip install --no-deps jax-cuda12-plugin==VERSION jax-cuda12-pjrt==VERSION with the version"
        " of jax, or `make aot`, which has them"
    )
    _require(target, remedy, "jax_cuda12_plugin", "jax_cuda13_plugin")
    flags = os.environ.get("XLA_FLAGS", "").split()
    missing = [flag for flag in _GPU_XLA_FLAGS if flag not in flags]
    os.environ["XLA_FLAGS"] = " ".join([*flags, *missing])
    hosts, each = target.shape
    description = topologies.get_topology_desc(
        platform="cuda",
        topology_name=target.chip.name,
        target_config=GPU_TEXTS[target.chip.name],
        topology=f"1x{hosts}x{each}",
    )
    return list(description.devices)
