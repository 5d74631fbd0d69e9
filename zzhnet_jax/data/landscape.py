"""Invents a stretch of ground at two dates: parcels along roads, and what stands or grows there.

Some of it is there at one date only. That is the change; cars, which come and go too, are not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from zzhnet_jax.data.scene import (
    ALWAYS,
    ASPHALT,
    BLUE_SHEET,
    CAR,
    CROP,
    CROWN,
    GRASS,
    NOBODY,
    PAVING,
    SHEET,
    SITE,
    SLATE,
    SOIL,
    STUBBLE,
    TILES,
    UNDERGROWTH,
    WATER,
    Material,
    Presence,
    Rectangle,
    Scene,
    Shape,
)


def invent_scene(rng: np.random.Generator, extent: int, change: float) -> Scene:
    """Invents a scene.

    Args:
      rng: where all chance comes from.
      extent: height and width in pixels.
      change: from 0, nothing changes, to 1, about a sixth of the ground does.
    """
    builder = _Builder(rng, extent, change)
    builder.build()
    return Scene(extent, builder.angle, builder.shapes)


class _Builder:
    """Puts a scene together, from the ground up."""

    def __init__(self, rng: np.random.Generator, extent: int, change: float) -> None:
        self.rng, self.extent = rng, extent
        self.angle = float(rng.uniform(0.0, np.pi))
        self.shapes: list[Shape] = []
        self._owners = 0
        cosine, sine = np.cos(self.angle), np.sin(self.angle)
        self._turn = np.array([[cosine, sine], [-sine, cosine]])
        # One pair in ten shows no change at all, as real ones do.
        busy = 0.0 if rng.random() < 0.1 else float(rng.uniform(0.4, 1.6))
        self._activity = change * busy

    def build(self) -> None:
        """Divides the ground into parcels along roads and fills those in view."""
        reach = 0.75 * self.extent
        parcels: list[Rectangle] = []
        roads: list[Rectangle] = []
        self._divide(Rectangle(-reach, -reach, 2 * reach, 2 * reach), 0, parcels, roads)
        # Towns have more houses and few fields, the country the other way round.
        uses = (self._field, self._meadow, self._wood, self._houses, self._works, self._pond)
        weights = self.rng.dirichlet((1.6, 1.2, 0.9, 2.4, 1.3, 0.25))
        for parcel in filter(self._in_view, parcels):
            uses[self.rng.choice(len(uses), p=weights)](parcel)
        for road in filter(self._in_view, roads):
            self._road(road)

    def _divide(
        self, area: Rectangle, depth: int, parcels: list[Rectangle], roads: list[Rectangle]
    ) -> None:
        longer = max(area.width, area.height)
        if longer < 40 or (longer < 72 and self.rng.random() < 0.35):
            parcels.append(area)
            return
        gap = (0.0, self.rng.uniform(5.0, 9.0))[depth < 5 and self.rng.random() < 0.65]
        cut = longer * self.rng.uniform(0.32, 0.68) - gap / 2
        rest = longer - cut - gap
        if area.width >= area.height:
            first = area._replace(width=cut)
            street = Rectangle(area.u + cut, area.v, gap, area.height)
            second = area._replace(u=area.u + cut + gap, width=rest)
        else:
            first = area._replace(height=cut)
            street = Rectangle(area.u, area.v + cut, area.width, gap)
            second = area._replace(v=area.v + cut + gap, height=rest)
        if gap:
            roads.append(street)
        self._divide(first, depth + 1, parcels, roads)
        self._divide(second, depth + 1, parcels, roads)

    # What fills a parcel.

    def _field(self, parcel: Rectangle) -> None:
        self._ground(parcel, (CROP, STUBBLE, SOIL)[self.rng.choice(3, p=(0.55, 0.25, 0.2))], 0.3)
        self._new_road(parcel, chance=0.25)

    def _meadow(self, parcel: Rectangle) -> None:
        self._ground(parcel, GRASS, 0.2)
        if self._happens(0.35):
            self._water(parcel, self._once())
        if self.rng.random() < 0.7:
            self._trees(parcel, int(self.rng.integers(2, 7)), ALWAYS)

    def _wood(self, parcel: Rectangle) -> None:
        present = self._once() if self._happens(0.5) else ALWAYS
        if present != ALWAYS:
            self._add(self._outline(parcel.corners()), GRASS)
        owner = self._add(self._outline(parcel.corners()), UNDERGROWTH, present=present)
        self._trees(parcel, int(parcel.width * parcel.height / 40), present, owner)

    def _houses(self, parcel: Rectangle) -> None:
        self._ground(parcel, GRASS if self.rng.random() < 0.75 else PAVING)
        pitch_u, pitch_v = self.rng.uniform(15.0, 21.0, 2)
        roof = (TILES, SLATE, SHEET)[self.rng.choice(3, p=(0.55, 0.35, 0.1))]
        built_up = self._happens(0.9)
        for plot in _plots(parcel.shrunk(2.0), pitch_u, pitch_v):
            if self.rng.random() < 0.2:
                self._trees(plot, 2, ALWAYS)
                continue
            present = self._once() if built_up and self.rng.random() < 0.6 else ALWAYS
            width = self.rng.uniform(0.5, 0.75) * plot.width
            length = self.rng.uniform(0.5, 0.8) * plot.height
            place = self._inside(plot, width, length)
            self._house(place, roof, present)
            if self.rng.random() < 0.5:
                self._trees(plot, 1, ALWAYS)

    def _works(self, parcel: Rectangle) -> None:
        self._ground(parcel, PAVING if self.rng.random() < 0.7 else ASPHALT)
        roof = (SHEET, SLATE, BLUE_SHEET)[self.rng.choice(3, p=(0.5, 0.25, 0.25))]
        built_up = self._happens(0.9)
        for plot in _plots(parcel.shrunk(3.0), *self.rng.uniform(24.0, 40.0, 2)):
            present = self._once() if built_up and self.rng.random() < 0.6 else ALWAYS
            width = self.rng.uniform(0.55, 0.85) * plot.width
            length = self.rng.uniform(0.55, 0.85) * plot.height
            self._hall(self._inside(plot, width, length), roof, present)

    def _pond(self, parcel: Rectangle) -> None:
        self._ground(parcel, GRASS)
        self._water(parcel, self._once() if self._happens(0.5) else ALWAYS)
        self._trees(parcel, 4, ALWAYS)

    # What a parcel is filled with.

    def _ground(self, parcel: Rectangle, material: Material, site_chance: float = 0.0) -> None:
        """Lays the ground; now and then one of the dates finds a building site there."""
        if self._happens(site_chance):
            pre, post = self._once()
            self._add(self._outline(parcel.corners()), material, present=(not pre, not post))
            self._add(self._outline(parcel.corners()), SITE, present=(pre, post))
        else:
            self._add(self._outline(parcel.corners()), material)

    def _road(self, road: Rectangle) -> None:
        self._add(self._outline(road.corners()), ASPHALT)
        along = max(road.width, road.height)
        for _ in range(self.rng.poisson(along / 40)):
            across = self.rng.uniform(0.15, 0.7) * min(road.width, road.height)
            at = self.rng.uniform(0.0, along)
            u, v = (across, at) if road.height > road.width else (at, across)
            size = (1.8, 4.0) if road.height > road.width else (4.0, 1.8)
            car = Rectangle(road.u + u, road.v + v, *size)
            self._add(self._outline(car.corners()), CAR, owner=NOBODY, present=self._once())

    def _new_road(self, parcel: Rectangle, chance: float) -> None:
        if self._happens(chance):
            width = self.rng.uniform(6.0, 8.0)
            slant = self.rng.uniform(-0.25, 0.25) * parcel.width
            u = parcel.u + self.rng.uniform(0.3, 0.7) * parcel.width
            top, bottom = parcel.v, parcel.v + parcel.height
            corners = [(u, top), (u + width, top), (u + width + slant, bottom), (u + slant, bottom)]
            surface = ASPHALT if self.rng.random() < 0.6 else SITE
            self._add(self._outline(corners), surface, present=self._once())

    def _water(self, parcel: Rectangle, present: Presence) -> None:
        angles = np.linspace(0.0, 2 * np.pi, 28, endpoint=False)
        phases = self.rng.uniform(0.0, 2 * np.pi, 3)
        waves = sum(0.12 * np.sin((k + 2) * angles + phase) for k, phase in enumerate(phases))
        radius = (1.0 + waves) * self.rng.uniform(0.3, 0.42)
        u = parcel.u + parcel.width * (0.5 + radius * np.cos(angles))
        v = parcel.v + parcel.height * (0.5 + radius * np.sin(angles))
        self._add(self._outline(np.stack([u, v], axis=1)), WATER, present=present)

    def _trees(
        self, area: Rectangle, count: int, present: Presence, owner: int | None = None
    ) -> None:
        """Scatters trees, each a ragged crown with a lobe on either side that is lit or shaded."""
        owner = self._new_owner() if owner is None else owner
        angles = np.linspace(0.0, 2 * np.pi, 9, endpoint=False)
        ring = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        low, high = (area.u, area.v), (area.u + area.width, area.v + area.height)
        centres = self._outline(self.rng.uniform(low, high, (count, 2)))[:, None]
        radii = self.rng.uniform(2.2, 4.6, (count, 1, 1))
        crowns = ring * radii * self.rng.uniform(0.8, 1.15, (count, len(ring), 1))
        for centre, radius, crown in zip(centres, radii[:, 0, 0], crowns, strict=True):
            colour = self._colour(CROWN)
            self._add(centre + crown, CROWN, colour, owner, present, height=0.9 * radius)
            for side in (-1.0, 1.0):
                lobe = centre + 0.55 * crown + np.array([0.35 * side * radius, 0.0])
                self._add(lobe, CROWN, colour, owner, present, tilt=(1.4 * side, 0.5 * side))

    def _house(self, place: Rectangle, roof: Material, present: Presence) -> None:
        """A house under a gable or hip roof, with a wing now and then."""
        owner, colour = self._new_owner(), self._colour(roof)
        height = self.rng.uniform(3.0, 6.0)
        self._pitched(place, roof, colour, owner, present, height)
        if self.rng.random() < 0.35:
            wing = Rectangle(
                place.u + 0.55 * place.width,
                place.v + 0.3 * place.height,
                0.75 * place.width,
                0.4 * place.height,
            )
            self._pitched(wing, roof, colour, owner, present, height)

    def _pitched(
        self,
        place: Rectangle,
        roof: Material,
        colour: np.ndarray,
        owner: int,
        present: Presence,
        height: float,
    ) -> None:
        a, b, c, d = place.corners()
        inset = self.rng.choice((0.0, 0.3)) * max(place.width, place.height)
        u, v = place.u + place.width / 2, place.v + place.height / 2
        if place.width >= place.height:
            first, second = (place.u + inset, v), (place.u + place.width - inset, v)
            faces = [[a, b, second, first], [d, c, second, first], [a, d, first], [b, c, second]]
            normals = [(0, -1), (0, 1), (-1, 0), (1, 0)]
        else:
            first, second = (u, place.v + inset), (u, place.v + place.height - inset)
            faces = [[a, d, second, first], [b, c, second, first], [a, b, first], [d, c, second]]
            normals = [(-1, 0), (1, 0), (0, -1), (0, 1)]
        # The whole outline first: it casts the shadow and closes gaps between the faces.
        self._add(self._outline([a, b, c, d]), roof, colour, owner, present, height)
        for face, normal in zip(faces, np.asarray(normals) @ self._turn, strict=True):
            tilt = (float(normal[0]), float(normal[1]))
            self._add(self._outline(face), roof, colour, owner, present, tilt=tilt)

    def _hall(self, place: Rectangle, roof: Material, present: Presence) -> None:
        """A flat-roofed building with a parapet and units on its roof."""
        owner, colour = self._new_owner(), self._colour(roof)
        height = self.rng.uniform(4.0, 9.0)
        outline = self._outline(place.corners())
        self._add(outline, roof, 0.82 * colour, owner, present, height)
        self._add(self._outline(place.shrunk(1.2).corners()), roof, colour, owner, present)
        for _ in range(self.rng.integers(0, 4)):
            unit = self._inside(place.shrunk(2.0), *self.rng.uniform(2.0, 4.0, 2))
            shade = colour * self.rng.uniform(0.6, 0.85)
            self._add(self._outline(unit.corners()), roof, shade, owner, present)

    # Small matters.

    def _happens(self, chance: float) -> bool:
        return bool(self.rng.random() < chance * self._activity)

    def _once(self) -> Presence:
        """Present at one date only; building up is more common than clearing."""
        return (False, True) if self.rng.random() < 0.65 else (True, False)

    def _inside(self, area: Rectangle, width: float, height: float) -> Rectangle:
        width, height = min(width, area.width), min(height, area.height)
        return Rectangle(
            area.u + self.rng.uniform(0.2, 0.8) * (area.width - width),
            area.v + self.rng.uniform(0.2, 0.8) * (area.height - height),
            width,
            height,
        )

    def _outline(self, corners: Sequence[tuple[float, float]] | np.ndarray) -> np.ndarray:
        return np.asarray(corners, np.float64) @ self._turn + self.extent / 2

    def _colour(self, material: Material) -> np.ndarray:
        light = self.rng.normal(0.0, 0.7 * material.spread)
        return np.asarray(material.colour) + light + self.rng.normal(0.0, 0.3 * material.spread, 3)

    def _new_owner(self) -> int:
        self._owners += 1
        return self._owners

    def _in_view(self, area: Rectangle) -> bool:
        """Whether the area, or a shadow from it, may reach into the picture."""
        outline = self._outline(area.corners())
        return bool(
            (outline.max(axis=0) > -15).all() and (outline.min(axis=0) < self.extent + 15).all()
        )

    def _add(
        self,
        outline: np.ndarray,
        material: Material,
        colour: np.ndarray | None = None,
        owner: int | None = None,
        present: Presence = ALWAYS,
        height: float = 0.0,
        tilt: tuple[float, float] = (0.0, 0.0),
    ) -> int:
        """Adds a shape, of a new object and a typical colour unless given; returns its owner."""
        owner = self._new_owner() if owner is None else owner
        colour = self._colour(material) if colour is None else colour
        self.shapes.append(Shape(outline, material, colour, owner, present, height, tilt))
        return owner


def _plots(area: Rectangle, pitch_u: float, pitch_v: float) -> list[Rectangle]:
    """Cuts a parcel into equal plots of about the given pitch; none if it is too narrow."""
    columns, rows = int(area.width / pitch_u + 0.3), int(area.height / pitch_v + 0.3)
    return [
        Rectangle(
            area.u + column * area.width / columns,
            area.v + row * area.height / rows,
            area.width / columns,
            area.height / rows,
        )
        for column in range(columns)
        for row in range(rows)
    ]
