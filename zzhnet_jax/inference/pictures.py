"""Pictures of predictions: before, after, change probability, and the detected change.

Drawn pixel by pixel rather than through a plotting library, so that a tile is shown as it is and a
sheet of many pairs takes milliseconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import cast

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from zzhnet_jax.evaluation import BinaryConfusion, binary_metrics

# Of Okabe and Ito's palette, whose colours people with any colour vision tell apart.
FOUND, FALSE_ALARM, MISSED, UNLABELLED = (
    (0, 158, 115),
    (230, 85, 0),
    (86, 180, 233),
    (150, 150, 150),
)
DETECTED = (230, 85, 0)
_INK, _QUIET, _PAPER = (25, 28, 33), (105, 110, 118), (255, 255, 255)
_COLOUR_MAP = "viridis"
_MARGIN, _GAP = 20, 10
_Font = ImageFont.FreeTypeFont


@dataclass(frozen=True, eq=False)
class PictureRow:
    """One pair of a contact sheet.

    Attributes:
      pre, post: uint8 (h, w, 3).
      probability: float (h, w) in [0, 1].
      mask: predicted change (h, w), 0 or 1.
      label: true change (h, w), 0, 1 or 255 = unlabelled; None where it isn't known.
      name: shown above the row.
    """

    pre: np.ndarray
    post: np.ndarray
    probability: np.ndarray
    mask: np.ndarray
    label: np.ndarray | None = None
    name: str = ""


def four_panel(
    pre: np.ndarray,
    post: np.ndarray,
    probability: np.ndarray,
    mask: np.ndarray,
    label: np.ndarray | None = None,
    *,
    name: str = "",
) -> Image.Image:
    """Draws one pair: before, after, probability, and the detected change over the later image.

    With a label the fourth panel tells found, falsely detected and missed change apart.

    Args:
      pre: the earlier image, uint8 (h, w, 3).
      post: the later image, uint8 (h, w, 3).
      probability: change probability (h, w).
      mask: predicted change (h, w), 0 or 1.
      label: true change (h, w), 0, 1 or 255 = unlabelled.
      name: shown above the panels.
    """
    side = min(max(max(pre.shape[:2]), 288), 640)
    return contact_sheet([PictureRow(pre, post, probability, mask, label, name)], side=side)


def contact_sheet(rows: Sequence[PictureRow], *, side: int = 256) -> Image.Image:
    """Draws several pairs below one another, with common headings and legends.

    Args:
      rows: at least one pair.
      side: longest side of a panel in pixels; images are scaled to it.

    Raises:
      ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("a contact sheet needs at least one row")
    size = min(max(side // 17, 13), 22)
    large, small = _font(size), _font(size - 2)
    labelled = any(row.label is not None for row in rows)
    last = "Compared with the label" if labelled else "Detected change"
    titles = ("Before", "After", "Change probability", last)
    drawn = [[_fit(panel, side) for panel in _panels(row)] for row in rows]
    widths = [panels[0].width for panels in drawn] + [round(large.getlength(t)) for t in titles]
    lefts = [_MARGIN + column * (max(widths) + _GAP) for column in range(4)]
    heights = [panels[0].height + size + 20 for panels in drawn]
    total = 2 * _MARGIN + (size + 8) + sum(heights) + 2 * (size + 2)
    sheet = Image.new("RGB", (lefts[-1] + max(widths) + _MARGIN, total), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for left, title in zip(lefts, titles, strict=True):
        draw.text((left, _MARGIN), title, fill=_INK, font=large)
    top = _MARGIN + size + 8
    for row, panels, height in zip(rows, drawn, heights, strict=True):
        for left, panel in zip(lefts, panels, strict=True):
            sheet.paste(panel, (left, top))
        caption = (lefts[0], top + panels[0].height + 4)
        draw.text(caption, _caption(row), fill=_QUIET, font=small)
        top += height
    _draw_scale(sheet, lefts[2], top, max(widths), small)
    _draw_keys(draw, _keys(rows), lefts[3], top, max(widths), small)
    return sheet


def _panels(row: PictureRow) -> list[np.ndarray]:
    """The four panels of a row, uint8 (h, w, 3), at the image's own size."""
    colours = matplotlib.colormaps[_COLOUR_MAP](np.clip(row.probability, 0, 1), bytes=True)
    if row.label is None:
        last = _detected(row.post, row.mask)
    else:
        last = _compared(row.post, row.mask, row.label)
    return [row.pre, row.post, colours[..., :3], last]


def _detected(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image with detected change tinted and outlined."""
    inside = mask == 1
    core = np.pad(inside, 1, mode="edge")
    core = inside & core[:-2, 1:-1] & core[2:, 1:-1] & core[1:-1, :-2] & core[1:-1, 2:]
    result = _tinted(image, inside, DETECTED, 0.45)
    return _tinted(result, inside & ~core, DETECTED, 1.0)


def _compared(image: np.ndarray, mask: np.ndarray, label: np.ndarray) -> np.ndarray:
    """The image, faded to grey, with every kind of agreement in its colour."""
    grey = image.astype(np.float32).mean(-1, keepdims=True)
    result = np.broadcast_to(40 + 0.55 * grey, image.shape).astype(np.uint8)
    predicted, changed = mask == 1, label == 1
    for where, colour in (
        (predicted & changed, FOUND),
        (predicted & (label == 0), FALSE_ALARM),
        (~predicted & changed, MISSED),
        (label == 255, UNLABELLED),
    ):
        result = _tinted(result, where, colour, 0.8)
    return result


def _tinted(
    image: np.ndarray, where: np.ndarray, colour: tuple[int, int, int], opacity: float
) -> np.ndarray:
    mixed = (1 - opacity) * image + opacity * np.asarray(colour, np.float32)
    return np.where(where[..., None], mixed, image).astype(np.uint8)


def _fit(panel: np.ndarray, side: int) -> Image.Image:
    """Scales the longer side to `side`; enlarged pixels stay sharp squares."""
    height, width = panel.shape[:2]
    scale = side / max(height, width)
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    return Image.fromarray(np.ascontiguousarray(panel)).resize(size, method)


def _caption(row: PictureRow) -> str:
    parts = [row.name] if row.name else []
    parts.append(f"detected {np.mean(row.mask == 1):.1%}")
    if row.label is not None:
        counts = BinaryConfusion.count(row.mask, row.label)
        parts[-1] += f", labelled {np.mean(row.label == 1):.1%}"
        f1 = binary_metrics(counts)["f1"]
        parts.append("no change anywhere" if np.isnan(f1) else f"F1 {f1:.2f}")
    return "   ·   ".join(parts)


def _keys(rows: Sequence[PictureRow]) -> list[tuple[tuple[int, int, int], str]]:
    keys = []
    if any(row.label is None for row in rows):
        keys.append((DETECTED, "change"))
    labels = [row.label for row in rows if row.label is not None]
    if labels:
        keys += [(FOUND, "found"), (FALSE_ALARM, "false alarm"), (MISSED, "missed")]
    if any((label == 255).any() for label in labels):
        keys.append((UNLABELLED, "unlabelled"))
    return keys


def _draw_keys(
    draw: ImageDraw.ImageDraw,
    keys: list[tuple[tuple[int, int, int], str]],
    left: int,
    top: int,
    width: int,
    font: _Font,
) -> None:
    """A coloured square and a word for each key, on a second line where the first is full."""
    x, line = left, sum(font.getmetrics()) + 2
    for colour, text in keys:
        square = line * 3 // 5
        length = square + 6 + round(font.getlength(text))
        if x > left and x + length > left + width:
            x, top = left, top + line
        draw.rectangle((x, top + 3, x + square, top + 3 + square), fill=colour)
        draw.text((x + square + 6, top), text, fill=_QUIET, font=font)
        x += length + 14


def _draw_scale(sheet: Image.Image, left: int, top: int, width: int, font: _Font) -> None:
    """A colour bar from 0 to 1."""
    draw = ImageDraw.Draw(sheet)
    line = sum(font.getmetrics()) + 2
    start = left + line
    end = left + min(width, 20 * line) - line
    ramp = matplotlib.colormaps[_COLOUR_MAP](np.linspace(0, 1, end - start), bytes=True)[:, :3]
    bar = np.tile(ramp, (line * 3 // 5, 1, 1))
    sheet.paste(Image.fromarray(np.ascontiguousarray(bar)), (start, top + 3))
    draw.text((left, top), "0", fill=_QUIET, font=font)
    draw.text((end + 6, top), "1", fill=_QUIET, font=font)


@cache
def _font(size: int) -> _Font:
    return cast(_Font, ImageFont.load_default(size))  # with a size it is never a bitmap font
