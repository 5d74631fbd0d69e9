"""Reads image and label files, and says in one line what is wrong with one that cannot be used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from zzhnet_jax.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")

NO_CHANGE, CHANGE, IGNORE = 0, 1, 255
"""Label values inside the program; `IGNORE` marks pixels that count neither in losses nor in
scores.
"""

_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


def image_size(path: Path) -> tuple[int, int]:
    """Returns (height, width) from the header of an image file, without decoding its pixels.

    Raises:
      DataError: the file is missing or is no image.
    """
    with _opened(path) as image:
        return image.height, image.width


def load_image(path: Path | str) -> np.ndarray:
    """Reads an image as RGB.

    Args:
      path: an 8-bit image; grey and palette images are widened to three channels, transparency is
        dropped.

    Returns:
      uint8 (h, w, 3).

    Raises:
      DataError: the file is missing, damaged, or has more than 8 bits a channel.
    """
    with _opened(Path(path)) as image:
        if image.mode not in _EIGHT_BIT_MODES:
            raise DataError(
                f"{path}: its pixels are of kind {image.mode}, not 8 bits a channel; "
                "scale it to 8 bits (0..255) and save it again"
            )
        return np.array(image.convert("RGB"))


def load_label(path: Path | str) -> np.ndarray:
    """Reads a change label, whose values must be {0, 1} or {0, 255}.

    Args:
      path: a grey, palette or two-level image; colour images are taken if all their channels agree.

    Returns:
      uint8 (h, w), 1 where the ground changed and 0 elsewhere.

    Raises:
      DataError: the file is missing or damaged, or holds other values; the message lists those
        found.
    """
    with _opened(Path(path)) as image:
        array = np.array(image)
    if array.ndim == 3:
        colours = array[..., :3] if array.shape[2] in (3, 4) else array[..., :1]
        if (colours != colours[..., :1]).any():
            raise DataError(
                f"{path}: a label must have one channel, but this is a colour picture; "
                "save it in grey, with 0 for no change and 255 for change"
            )
        array = colours[..., 0]
    values = np.unique(array)
    if not (np.isin(values, (0, 1)).all() or np.isin(values, (0, 255)).all()):
        raise DataError(
            f"{path}: label values are {_shorten(values)}, but they must be 0 and 1, or 0 and 255; "
            f"{_remedy(path, values)}"
        )
    return (array != 0).astype(np.uint8)


def load_pair(pre_path: Path | str, post_path: Path | str) -> tuple[np.ndarray, np.ndarray]:
    """Reads the two dates of a pair, for prediction without labels.

    Args:
      pre_path: the earlier image.
      post_path: the later image, of the same size.

    Returns:
      Two uint8 arrays (h, w, 3).

    Raises:
      DataError: a file is missing or damaged, or the sizes differ.
    """
    pre, post = load_image(pre_path), load_image(post_path)
    check_same_size(Path(pre_path), pre.shape[:2], Path(post_path), post.shape[:2])
    return pre, post


def check_same_size(
    first: Path, first_size: tuple[int, ...], second: Path, second_size: tuple[int, ...]
) -> None:
    """Raises `DataError`, naming both files, unless their (height, width) are equal."""
    if tuple(first_size) != tuple(second_size):
        raise DataError(
            f"{second} is {_size_text(second_size)} pixels but {first} is "
            f"{_size_text(first_size)}: both must cover the same ground pixel for pixel; "
            "resample or crop one of them"
        )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Opens an image; what Pillow raises while it is in use becomes a `DataError`."""
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except UnidentifiedImageError:
        raise DataError(
            f"{path}: not an image that can be read (accepted: {', '.join(IMAGE_SUFFIXES)}); "
            "replace or remove it"
        ) from None
    except Image.DecompressionBombError:
        raise DataError(f"{path}: too many pixels to read at once; cut it into tiles") from None
    except (OSError, SyntaxError, ValueError) as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise DataError(
            f"{path}: the image is damaged or cut short ({reason}); copy or download it again"
        ) from None


def _shorten(values: np.ndarray, limit: int = 8) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:limit].tolist())
    return shown if len(values) <= limit else f"{shown}, ... ({len(values)} values)"


def _remedy(path: Path | str, values: np.ndarray) -> str:
    if Path(path).suffix.lower() in (".jpg", ".jpeg"):
        return "JPEG blurs labels: threshold it and save it as PNG"
    if len(values) > 8:
        return "threshold it and save it with two values"
    return "recode the file, with 0 for no change and 255 for change"


def _size_text(size: tuple[int, ...]) -> str:
    height, width = size
    return f"{width}x{height}"
