"""What every source of image pairs hands out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol, TypedDict

import numpy as np


class Pair(TypedDict):
    """One example.

    `pre` and `post` are RGB, uint8 (h, w, 3); `label` is uint8 (h, w) in {0, 1, 255 = ignore};
    `name` is unique in its source.
    """

    pre: np.ndarray
    post: np.ndarray
    label: np.ndarray
    name: str


@dataclasses.dataclass(frozen=True)
class PairInfo:
    """What is known about a pair without reading it.

    Attributes:
      name: its name.
      height: in pixels.
      width: in pixels.
      identity: text that differs where the content does: file sizes in bytes, or what a scene is
        rendered from.
    """

    name: str
    height: int
    width: int
    identity: str


class Source(Protocol):
    """A sequence of pairs in a fixed order."""

    @property
    def info(self) -> Sequence[PairInfo]:
        """What is known about every pair without reading it, in order."""

    def __len__(self) -> int:
        """Number of pairs."""

    def __getitem__(self, index: int) -> Pair:
        """Reads or renders a pair."""
