"""What a rendered scene is made of: shapes of a material, in drawing order.

Each shape belongs to an object and is present at one date or at both, so that what changed follows
from which object is on top where. `zzhnet_jax.data.landscape` invents scenes and
`zzhnet_jax.data.render` paints them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Presence = tuple[bool, bool]
ALWAYS: Presence = (True, True)
NOBODY = 0
"""Owner of what is no part of the ground and stands on it by chance, such as cars."""


class Material(NamedTuple):
    """How a surface looks.

    Attributes:
      colour: typical red, green and blue on the 0..255 scale.
      spread: how far the colour varies from object to object.
      season: how far it turns yellow in the dry season, from 0 to 1.
      coarse: strength of soft patches.
      fine: strength of grain.
      stripes: strength of furrows or seams.
    """

    colour: tuple[float, float, float]
    spread: float
    season: float
    coarse: float
    fine: float
    stripes: float = 0.0


GRASS = Material((104, 118, 74), 12, 0.8, 0.08, 0.09)
CROP = Material((92, 116, 62), 18, 1.0, 0.05, 0.05, 0.08)
STUBBLE = Material((168, 150, 108), 14, 0.3, 0.05, 0.05, 0.07)
SOIL = Material((136, 112, 90), 12, 0.0, 0.07, 0.06, 0.06)
UNDERGROWTH = Material((70, 84, 54), 8, 0.6, 0.12, 0.14)
CROWN = Material((54, 76, 42), 12, 0.6, 0.06, 0.16)
SITE = Material((206, 188, 156), 12, 0.0, 0.06, 0.06)
ASPHALT = Material((108, 108, 110), 10, 0.0, 0.05, 0.03)
PAVING = Material((158, 154, 146), 12, 0.0, 0.07, 0.04)
WATER = Material((44, 62, 74), 10, 0.0, 0.06, 0.02)
TILES = Material((168, 98, 76), 18, 0.0, 0.03, 0.05)
SLATE = Material((122, 120, 124), 16, 0.0, 0.03, 0.04)
SHEET = Material((206, 206, 204), 16, 0.0, 0.03, 0.02, 0.03)
BLUE_SHEET = Material((92, 122, 164), 14, 0.0, 0.03, 0.02, 0.03)
CAR = Material((150, 150, 155), 70, 0.0, 0.0, 0.0)


class Shape(NamedTuple):
    """A polygon of one material.

    Attributes:
      outline: (k, 2) corners as x, y in pixels.
      material: what it is made of.
      colour: red, green, blue on the 0..255 scale.
      owner: number of the object it belongs to, from 1, or `NOBODY`.
      present: at the earlier and at the later date.
      height: in pixels; what is high casts a shadow that long at a low sun.
      tilt: horizontal part of the surface normal: (0, 0) is flat.
    """

    outline: np.ndarray
    material: Material
    colour: np.ndarray
    owner: int
    present: Presence
    height: float = 0.0
    tilt: tuple[float, float] = (0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Scene:
    """Shapes in drawing order, those that are nobody's on top.

    Attributes:
      extent: height and width in pixels.
      angle: direction of streets and furrows, in radians.
      shapes: the lowest first.
    """

    extent: int
    angle: float
    shapes: Sequence[Shape]


class Rectangle(NamedTuple):
    """A rectangle along the scene's own axes, whose origin is the middle of the scene."""

    u: float
    v: float
    width: float
    height: float

    def shrunk(self, margin: float) -> Rectangle:
        """The rectangle with `margin` taken off every side."""
        return Rectangle(
            self.u + margin, self.v + margin, self.width - 2 * margin, self.height - 2 * margin
        )

    def corners(self) -> list[tuple[float, float]]:
        """The four corners in order."""
        right, bottom = self.u + self.width, self.v + self.height
        return [(self.u, self.v), (right, self.v), (right, bottom), (self.u, bottom)]
