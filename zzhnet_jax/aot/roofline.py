"""The least time that a program can take on a chip, from what it computes, moves and sends."""

from dataclasses import dataclass

from .chips import Chip
from .program_costs import Collective, ProgramCosts

_NARROW = ("bf16", "f16", "f8", "s8", "u8")


@dataclass(frozen=True)
class Roofline:
    """Seconds of one run for each resource, as if each worked at its peak.

    Attributes:
      compute: matrix products and convolutions.
      memory: traffic with main memory.
      communication: what a device sends to others.
    """

    compute: float
    memory: float
    communication: float

    @property
    def seconds(self) -> float:
        """The least time if all three overlap perfectly."""
        return max(self.compute, self.memory, self.communication)

    @property
    def limit(self) -> str:
        """The resource that takes longest."""
        times = {
            "compute": self.compute,
            "memory bandwidth": self.memory,
            "communication": self.communication,
        }
        return max(times, key=lambda name: times[name])


def roofline(costs: ProgramCosts, chip: Chip) -> Roofline:
    """Divides what one device does by the peaks of its chip."""
    compute = sum(
        count / (chip.narrow_flops if dtype.startswith(_NARROW) else chip.wide_flops)
        for dtype, count in costs.flops.items()
    )
    communication = sum(
        exchange.times * exchange.sent_bytes / send_rate(exchange, chip)
        for exchange in costs.collectives
    )
    return Roofline(compute, costs.memory_bytes / chip.memory_rate, communication)


def send_rate(exchange: Collective, chip: Chip) -> float:
    """Bytes a second that each device can send in an exchange.

    Within a host, or a TPU slice, that is the links' rate; a group of GPUs of several hosts is as
    fast as the network.
    """
    if chip.network_rate is None:
        return chip.link_rate
    hosts = {device // chip.host_devices for device in exchange.group}
    return chip.link_rate if len(hosts) == 1 else chip.network_rate
