"""Two-dimensional traversals: images to four sequences and back, and the scan over them."""

from .patterns import ScanPattern, cross_merge, cross_scan
from .scan2d import normalize_channels, scan_lines, selective_scan_2d

__all__ = [
    "ScanPattern",
    "cross_merge",
    "cross_scan",
    "normalize_channels",
    "scan_lines",
    "selective_scan_2d",
]
