"""Peak figures of accelerators, as their makers publish them.

Nothing reaches its peaks. They say which resource a program must wait for, and what share of the
machine a measured step uses.
"""

from dataclasses import dataclass

import jax

_CLOUD_TPU = "Google Cloud TPU documentation, system architecture"


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts them: a TPU chip (of TPU7x, half of one) or a GPU.

    Attributes:
      name: what `--target` calls it.
      kinds: beginnings of the `device_kind` by which JAX knows it.
      narrow_flops: multiply-adds of matrix products of bfloat16 a second, times two.
      wide_flops: the same for float32 operands at JAX's default precision: on TPU they are rounded
        to bfloat16, on GPU to TensorFloat-32.
      memory_bytes: size of its memory.
      memory_rate: bytes a second between it and its memory.
      link_rate: bytes a second that it sends to its neighbours (TPU) or to GPUs of its host.
      network_rate: bytes a second that it sends to other hosts; None where `link_rate` holds.
      host_devices: devices of a host, beyond which `network_rate` holds.
      source: where these figures are published.
    """

    name: str
    kinds: tuple[str, ...]
    narrow_flops: float
    wide_flops: float
    memory_bytes: float
    memory_rate: float
    link_rate: float
    source: str
    network_rate: float | None = None
    host_devices: int = 8


def _tpu(
    name: str,
    kinds: tuple[str, ...],
    *,
    teraflops: float,
    memory: float,
    gigabytes_per_second: float,
    both_ways: float,
    page: str,
) -> Chip:
    return Chip(
        name,
        kinds,
        narrow_flops=teraflops * 1e12,
        wide_flops=teraflops * 1e12,
        memory_bytes=memory,
        memory_rate=gigabytes_per_second * 1e9,
        link_rate=both_ways / 2 * 1e9,
        source=f"{_CLOUD_TPU}: {page}",
    )


def _gpu(
    name: str,
    kind: str,
    *,
    teraflops: tuple[float, float],
    memory: float,
    gigabytes_per_second: float,
    both_ways: float,
    network_gigabits: float,
    source: str,
) -> Chip:
    return Chip(
        name,
        (kind,),
        narrow_flops=teraflops[0] * 1e12,
        wide_flops=teraflops[1] * 1e12,
        memory_bytes=memory,
        memory_rate=gigabytes_per_second * 1e9,
        link_rate=both_ways / 2 * 1e9,
        source=source,
        network_rate=network_gigabits / 8 * 1e9,
    )


CHIPS: tuple[Chip, ...] = (
    _tpu(
        "v4",
        ("TPU v4",),
        teraflops=275,
        memory=32 * 2**30,
        gigabytes_per_second=1200,
        both_ways=600,
        page="TPU v4 (interconnect: 6 links of 50 GB/s each way, Jouppi et al. 2023)",
    ),
    _tpu(
        "v5e",
        ("TPU v5 lite", "TPU v5e"),
        teraflops=197,
        memory=16e9,
        gigabytes_per_second=819,
        both_ways=400,
        page="TPU v5e",
    ),
    _tpu(
        "v5p",
        ("TPU v5p", "TPU v5"),
        teraflops=459,
        memory=95e9,
        gigabytes_per_second=2765,
        both_ways=1200,
        page="TPU v5p",
    ),
    _tpu(
        "v6e",
        ("TPU v6 lite", "TPU v6e"),
        teraflops=918,
        memory=32e9,
        gigabytes_per_second=1638,
        both_ways=800,
        page="TPU v6e",
    ),
    _tpu(
        "tpu7x",
        ("TPU7x", "TPU v7x"),
        teraflops=2307 / 2,
        memory=96 * 2**30,
        gigabytes_per_second=7380 / 2,
        both_ways=1200 / 2,
        page="TPU7x, halved: JAX sees two devices in a chip",
    ),
    _gpu(
        "a100",
        "NVIDIA A100",
        teraflops=(312, 156),
        memory=80e9,
        gigabytes_per_second=2039,
        both_ways=600,
        network_gigabits=200,
        source="NVIDIA A100 80GB SXM datasheet; DGX A100 datasheet for the network",
    ),
    _gpu(
        "h100",
        "NVIDIA H100",
        teraflops=(989.4, 494.7),
        memory=80e9,
        gigabytes_per_second=3350,
        both_ways=900,
        network_gigabits=400,
        source="NVIDIA H100 SXM datasheet, without sparsity; DGX H100 datasheet for the network",
    ),
    _gpu(
        "b200",
        "NVIDIA B200",
        teraflops=(2250, 1125),
        memory=180e9,
        gigabytes_per_second=7700,
        both_ways=1800,
        network_gigabits=400,
        source="NVIDIA HGX B200 datasheet, without sparsity; DGX B200 datasheet for the network",
    ),
)


def chip_named(name: str) -> Chip | None:
    """The chip that `--target` calls by this name."""
    return next((chip for chip in CHIPS if chip.name == name), None)


def chip_of(device: jax.Device) -> Chip | None:
    """The chip that a device is; None where its figures are not known, as for CPUs."""
    for chip in CHIPS:
        if device.device_kind.startswith(chip.kinds):
            return chip
    return None
