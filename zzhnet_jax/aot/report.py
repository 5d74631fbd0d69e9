"""What a program takes of each device, in lines for people."""

from .compile import Description

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def quantity(value: float, unit: str) -> str:
    """Three significant digits with a decimal prefix: 1.23 GB."""
    for factor, prefix in _PREFIXES:
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def duration(seconds: float) -> str:
    """Three significant digits in s, ms or us."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def cost_lines(description: Description) -> list[str]:
    """Memory, communication, operations and the least time of a step, per device."""
    memory, costs, times = description.memory, description.costs, description.roofline
    room = ""
    if description.chip is not None:
        room = f" of {quantity(description.chip.memory_bytes, 'B')}: it " + (
            "fits" if description.fits else "does NOT fit"
        )
    exchanged = [
        f"{kind} {quantity(size, 'B')}" for kind, size in costs.collective_bytes.items() if size > 0
    ]
    sent = sum(exchange.times * exchange.sent_bytes for exchange in costs.collectives)
    lines = [
        "per device and step:",
        f"  memory         {quantity(memory.peak, 'B')}{room}",
        f"                 state and batch {quantity(memory.arguments, 'B')}, temporaries"
        f" {quantity(memory.temporaries, 'B')}, code {quantity(memory.code, 'B')}, new outputs"
        f" {quantity(memory.outputs, 'B')}",
        f"  collectives    {', '.join(exchanged) or 'none'}"
        + (f"; {quantity(sent, 'B')} sent" if exchanged else ""),
        f"  matrix FLOPs   {quantity(sum(costs.flops.values()), 'FLOP')}",
        f"  memory traffic {quantity(costs.memory_bytes, 'B')}",
    ]
    if costs.unknown_loops:
        lines.append(
            f"  {costs.unknown_loops} loop(s) of unknown length count once: figures are too low"
        )
    if times is not None:
        lines.append(
            f"  least time     {duration(times.seconds)}, limited by {times.limit} (compute"
            f" {duration(times.compute)}, memory {duration(times.memory)}, communication"
            f" {duration(times.communication)})"
        )
    return lines
