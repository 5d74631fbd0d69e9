"""Selective scan (S6): one operator, several implementations, each held to a float64 oracle."""

from .api import available_implementations, selective_scan
from .base import ShapeError, Tile, UnavailableError
from .mesh_split import split_over
from .step import selective_scan_step

__all__ = [
    "ShapeError",
    "Tile",
    "UnavailableError",
    "available_implementations",
    "selective_scan",
    "selective_scan_step",
    "split_over",
]
