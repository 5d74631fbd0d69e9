"""Paints a scene as a camera sees it: sun, season, haze, blur, misregistration and noise."""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from zzhnet_jax.data.scene import NOBODY, Scene

MARGIN = 8
"""Pixels drawn beyond every edge, so that a misregistered image has no empty border."""


@dataclasses.dataclass(frozen=True)
class Conditions:
    """Everything that differs between two pictures of unchanged ground.

    Attributes:
      sun: direction towards the sun as x, y; its length is that of a shadow per height.
      season: from 0, vegetation is green, to 1, it is dry.
      gain: of the red, green and blue channel.
      gamma: exponent of the tone curve.
      slope: brightness added from one edge to the other, in x and y, as a share of the full range.
      haze: opacity of the haze at its densest, from 0 to 1.
      blur: standard deviation of the optics' blur in pixels.
      shift: misregistration in x and y, in pixels.
      rotation: misregistration about the centre, in radians.
      noise: standard deviation of the sensor's noise on the 0..255 scale.
    """

    sun: tuple[float, float] = (0.0, 0.0)
    season: float = 0.0
    gain: tuple[float, float, float] = (1.0, 1.0, 1.0)
    gamma: float = 1.0
    slope: tuple[float, float] = (0.0, 0.0)
    haze: float = 0.0
    blur: float = 0.0
    shift: tuple[float, float] = (0.0, 0.0)
    rotation: float = 0.0
    noise: float = 0.0


def draw_conditions(rng: np.random.Generator, nuisance: float) -> tuple[Conditions, Conditions]:
    """Draws the conditions of both dates; `nuisance` scales how far they lie apart."""
    azimuth = rng.uniform(0.0, 2 * np.pi)
    season = rng.uniform(0.0, 1.0)
    dates = []
    for date in range(2):
        direction = azimuth + nuisance * rng.normal(0.0, 0.5)
        length = rng.uniform(0.4, 0.4 + 0.7 * min(nuisance, 1.0))
        dates.append(
            Conditions(
                sun=(float(length * np.cos(direction)), float(length * np.sin(direction))),
                season=float(np.clip(season + nuisance * rng.normal(0.0, 0.35), 0.0, 1.0)),
                gain=tuple(
                    np.exp(nuisance * (rng.normal(0.0, 0.09) + rng.normal(0.0, 0.035, 3))).tolist()
                ),
                gamma=float(np.exp(nuisance * rng.normal(0.0, 0.1))),
                slope=tuple((nuisance * rng.normal(0.0, 0.03, 2)).tolist()),
                haze=float(min(nuisance * rng.uniform(0.1, 0.45), 0.8) * (rng.random() < 0.3)),
                blur=float(0.55 + nuisance * rng.uniform(0.0, 0.45)),
                # The label follows the earlier image.
                shift=tuple((date * nuisance * rng.uniform(-0.8, 0.8, 2)).tolist()),
                rotation=float(date * nuisance * rng.normal(0.0, 0.003)),
                noise=float(nuisance * rng.uniform(1.5, 6.0)),
            )
        )
    return dates[0], dates[1]


class Painter:
    """Paints both dates of a scene, with the same ground texture in both."""

    def __init__(self, scene: Scene, rng: np.random.Generator) -> None:
        """Prepares what the dates share.

        Args:
          scene: what to paint.
          rng: draws the texture of the ground, and haze and noise when a date is painted.
        """
        self._scene, self._rng = scene, rng
        self._side = scene.extent + 2 * MARGIN
        self._coarse = self._cloudy(12) + 0.6 * self._cloudy(5)
        self._fine = rng.standard_normal((self._side, self._side), np.float32)
        self._stripes = self._furrows()
        shapes = scene.shapes
        self._colour = np.array([shape.colour for shape in shapes])
        self._tilt = np.array([shape.tilt for shape in shapes])
        self._high = np.array([shape.height > 0 or any(shape.tilt) for shape in shapes])
        materials = [shape.material for shape in shapes]
        self._season = np.array([material.season for material in materials])
        self._amounts = np.array(
            [(material.coarse, material.fine, material.stripes) for material in materials],
            np.float32,
        )
        self._maps, self._owners = zip(self._draw(0), self._draw(1), strict=True)

    def owners(self, date: int) -> np.ndarray:
        """Which object is on top at every pixel of date 0 or 1: int32 (extent, extent)."""
        owner = np.array([shape.owner for shape in self._scene.shapes], np.int32)
        return owner[_inner(self._owners[date])]

    def paint(self, date: int, conditions: Conditions) -> np.ndarray:
        """Paints date 0 or 1: uint8 (extent, extent, 3)."""
        shape_map = self._maps[date]
        canvas = self._surface(shape_map, conditions)
        shadow = self._shadows(date, conditions.sun)
        shadow[self._high[shape_map]] = 0.0
        canvas *= (1.0 - 0.5 * shadow)[..., None]
        picture = Image.fromarray(self._develop(canvas, conditions))
        if conditions.blur:
            picture = picture.filter(ImageFilter.GaussianBlur(conditions.blur))
        picture = _misregister(picture, conditions)
        image = _inner(np.asarray(picture))
        if not conditions.noise:
            return image
        noise = self._rng.standard_normal(image.shape, np.float32)
        noise *= conditions.noise
        noise += image
        return np.clip(np.rint(noise), 0, 255).astype(np.uint8)

    def _draw(self, date: int) -> tuple[np.ndarray, np.ndarray]:
        """Number of the topmost shape at every pixel of the canvas, with and without nobody's."""
        picture = Image.new("I", (self._side, self._side))
        draw = ImageDraw.Draw(picture)
        loose = []
        for number, shape in enumerate(self._scene.shapes):
            if shape.present[date] and shape.owner == NOBODY:
                loose.append((number, shape))
            elif shape.present[date]:
                draw.polygon(_flat(shape.outline), fill=number)
        owned = np.array(picture)
        for number, shape in loose:
            draw.polygon(_flat(shape.outline), fill=number)
        return np.array(picture), owned

    def _surface(self, shape_map: np.ndarray, conditions: Conditions) -> np.ndarray:
        """The colour of the ground in full sun, with its texture."""
        dry = np.array([26.0, 4.0, 2.0]) * (conditions.season * self._season)[:, None]
        lit = 1.0 + 0.3 * (self._tilt @ np.asarray(conditions.sun))
        table = ((self._colour + dry) * lit[:, None]).astype(np.float32)
        texture = np.ones(shape_map.shape, np.float32)
        patterns = self._coarse, self._fine, self._stripes
        for amounts, pattern in zip(self._amounts.T, patterns, strict=True):
            texture += amounts[shape_map] * pattern
        return table[shape_map] * texture[..., None]

    def _shadows(self, date: int, sun: tuple[float, float]) -> np.ndarray:
        """Share of sunlight missing at every pixel, from 0 to 1."""
        picture = Image.new("L", (self._side, self._side))
        draw = ImageDraw.Draw(picture)
        away = -np.asarray(sun)
        for shape in self._scene.shapes:
            if shape.present[date] and shape.height:
                # Copies of the outline close enough together leave no gap where it sweeps along.
                steps = int(np.ceil(shape.height * np.hypot(*sun) / 2.5))
                for step in range(1, steps + 1):
                    draw.polygon(
                        _flat(shape.outline + shape.height * step / steps * away), fill=255
                    )
        return np.asarray(picture, np.float32) / 255.0

    def _develop(self, canvas: np.ndarray, conditions: Conditions) -> np.ndarray:
        """Light, haze and tone curve; float in, uint8 out."""
        ramp = np.linspace(-0.5, 0.5, self._side, dtype=np.float32) * 255.0
        x, y = conditions.slope
        canvas = canvas * np.asarray(conditions.gain, np.float32)
        canvas += (x * ramp[None, :] + y * ramp[:, None])[..., None]
        if conditions.haze:
            density = np.clip(0.5 + 0.35 * self._cloudy(3), 0.0, 1.0) * conditions.haze
            canvas += density[..., None] * (np.array([225.0, 228.0, 232.0], np.float32) - canvas)
        levels = np.clip(canvas, 0.0, 255.0).astype(np.uint8)
        curve = 255.0 * (np.arange(256) / 255.0) ** conditions.gamma
        return np.rint(curve).astype(np.uint8)[levels]

    def _cloudy(self, cells: int) -> np.ndarray:
        """Smooth noise of about unit variance with `cells` bumps across a scene of 128 pixels."""
        count = max(3, round(cells * self._side / 128))
        coarse = Image.fromarray(self._rng.standard_normal((count, count), np.float32))
        size = (self._side, self._side)
        return np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)) * np.float32(1.4)

    def _furrows(self) -> np.ndarray:
        axis = np.arange(self._side, dtype=np.float32)
        across = (
            np.cos(self._scene.angle) * axis[None, :] + np.sin(self._scene.angle) * axis[:, None]
        )
        return np.sin(across * np.float32(2 * np.pi / 4.5))


def _misregister(picture: Image.Image, conditions: Conditions) -> Image.Image:
    if not (any(conditions.shift) or conditions.rotation):
        return picture
    cosine, sine = np.cos(conditions.rotation), np.sin(conditions.rotation)
    middle = picture.width / 2
    x, y = conditions.shift
    matrix = (
        cosine, -sine, middle - cosine * middle + sine * middle + x,
        sine, cosine, middle - sine * middle - cosine * middle + y,
    )  # fmt: skip
    return picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC
    )


def _flat(outline: np.ndarray) -> list[float]:
    """The corners on the canvas as x, y, x, y, ..., which is what Pillow draws fastest."""
    coordinates: list[float] = (outline + MARGIN).ravel().tolist()
    return coordinates


def _inner(array: np.ndarray) -> np.ndarray:
    return array[MARGIN:-MARGIN, MARGIN:-MARGIN]
