"""Scans that real networks run, for tests and benchmarks."""

from typing import NamedTuple


class ScanShape(NamedTuple):
    """Size of one scan.

    Attributes:
      name: where it occurs.
      batch: sequences.
      length: time steps of each.
      channels: channels, over all groups.
      groups: groups that share B and C.
      d_state: states of each channel.
    """

    name: str
    batch: int
    length: int
    channels: int
    groups: int
    d_state: int


# A whole image in one call, all four routes as groups: the cases with stated speed targets.
ONE_STATE = ScanShape("64x64 image, 4 groups", 1, 64 * 64, 768, 4, 1)
MANY_STATES = ScanShape("32x32 image, 4 groups", 1, 32 * 32, 768, 4, 16)

# Each route of SS2D in VMamba-T's four stages: 224x224 images, ssm_ratio 2.
VMAMBA_TINY = tuple(
    ScanShape(f"VMamba-T stage {i + 1}", 8, (56 >> i) ** 2, 192 << i, 1, 1) for i in range(4)
)
