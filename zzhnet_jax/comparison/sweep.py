"""The same scan at growing lengths, for the picture of error and time against length."""

from collections.abc import Callable

from zzhnet_jax.kernels.selective_scan.shapes import ScanShape

from .cases import make_case
from .compare import Comparer, Comparison

LENGTHS = tuple(2**k for k in (7, 10, 13, 16))
_CHANNELS = 64


def sweep_shapes(like: ScanShape) -> list[ScanShape]:
    """One sequence of 64 channels in one group at every length, with `like`'s number of states."""
    return [
        ScanShape(f"{length} steps", 1, length, _CHANNELS, 1, like.d_state) for length in LENGTHS
    ]


def sweep_lengths(
    comparer: Comparer, like: ScanShape, dtype: str, *, each: Callable[[str], None]
) -> list[Comparison]:
    """Compares at every length, shortest first.

    Args:
      comparer: runs the implementations.
      like: gives the number of states.
      dtype: of the sequences.
      each: called with the name of every scan before it starts.
    """
    found = []
    for shape in sweep_shapes(like):
        each(shape.name)
        found.append(comparer.compare(make_case(shape, dtype)))
    return found
