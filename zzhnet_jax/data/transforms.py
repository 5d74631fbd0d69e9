"""Paired augmentation: geometry moves dates and label alike, colour varies each date by itself.

All randomness comes from the generator that is passed in, so that a crop depends only on its seed.
"""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image, ImageFilter

from zzhnet_jax.data.config import AugmentConfig, JitterConfig
from zzhnet_jax.data.images import CHANGE, IGNORE
from zzhnet_jax.errors import ConfigError


def normalize(
    image: np.ndarray, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> np.ndarray:
    """Subtracts the mean and divides by the standard deviation, channel by channel.

    Args:
      image: (..., w, 3), uint8 or float, on the 0..255 scale.
      mean: per channel.
      std: per channel.

    Returns:
      float32 of the same shape.
    """
    out = np.array(image, np.float32, order="C")
    # Broadcasting against a last axis of three is several times slower than against whole rows.
    width = image.shape[-2]
    rows = out.reshape(*image.shape[:-2], width * 3)
    shift, scale = _row_constants(tuple(mean), tuple(std), width)
    rows -= shift
    rows *= scale
    return out


@functools.lru_cache(maxsize=64)
def _row_constants(
    mean: tuple[float, ...], std: tuple[float, ...], width: int
) -> tuple[np.ndarray, np.ndarray]:
    shift = np.tile(np.asarray(mean, np.float32), width)
    scale = np.tile(1.0 / np.asarray(std, np.float32), width)
    return shift, scale


def augment(
    pre: np.ndarray,
    post: np.ndarray,
    label: np.ndarray,
    *,
    name: str,
    crop_size: int,
    config: AugmentConfig,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws one training example from a pair.

    Args:
      pre: uint8 (h, w, 3).
      post: uint8 (h, w, 3).
      label: uint8 (h, w) in {0, 1, 255}.
      name: the pair's name, for messages.
      crop_size: height and width of the result.
      config: what may happen.
      rng: where all chance comes from.

    Returns:
      `pre` and `post`, uint8 or float32 (crop, crop, 3) on the 0..255 scale, and `label`, uint8
      (crop, crop).

    Raises:
      ConfigError: the image is smaller than the crop and `config.pad` is off.
    """
    if min(label.shape) < crop_size:
        if not config.pad:
            raise crop_too_large(crop_size, name, label.shape)
        pre, post, label = _pad((pre, post, label), crop_size, rng)
    pre, post, label = _crop((pre, post, label), crop_size, config, rng)
    pre, post = _jitter(pre, config.jitter, rng), _jitter(post, config.jitter, rng)
    if rng.random() < config.exchange_dates:
        pre, post = post, pre
    return _turn((pre, post, label), config, rng)


def crop_too_large(crop_size: int, name: str, size: tuple[int, ...]) -> ConfigError:
    """The error for a crop that does not fit into image `name` of (height, width) `size`."""
    height, width = size
    return ConfigError(
        "data.crop_size",
        crop_size,
        f"at most {min(height, width)}, since {name} is {width}x{height} pixels; "
        "or turn data.augmentation.pad on",
    )


def _pad(
    arrays: tuple[np.ndarray, np.ndarray, np.ndarray], size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    height, width = arrays[2].shape
    extra = max(size - height, 0), max(size - width, 0)
    top, left = (int(rng.integers(amount + 1)) for amount in extra)
    before_after = (top, extra[0] - top), (left, extra[1] - left)
    pre, post = (np.pad(image, (*before_after, (0, 0))) for image in arrays[:2])
    return pre, post, np.pad(arrays[2], before_after, constant_values=IGNORE)


def _crop(
    arrays: tuple[np.ndarray, np.ndarray, np.ndarray],
    size: int,
    config: AugmentConfig,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts a square region, as large as the scale that was drawn asks for, and resizes it."""
    low, high = np.log(config.scale)
    # What is magnified more shows less ground; no more ground than the image has can be shown.
    side = min(round(size / np.exp(rng.uniform(low, high))), *arrays[2].shape)
    top, left = _place(arrays[2], side, config, rng)
    region = slice(top, top + side), slice(left, left + side)
    pre, post, label = (array[region] for array in arrays)
    if side != size:
        pre = _resize(pre, size, Image.Resampling.BILINEAR)
        post = _resize(post, size, Image.Resampling.BILINEAR)
        label = _resize(label, size, Image.Resampling.NEAREST)
    return pre, post, label


def _resize(array: np.ndarray, size: int, resampling: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(array).resize((size, size), resampling))


def _place(
    label: np.ndarray, side: int, config: AugmentConfig, rng: np.random.Generator
) -> tuple[int, int]:
    """Chooses the top left corner of a region of `side` pixels."""
    if config.crop == "change" and rng.random() < config.change_share:
        changed = np.flatnonzero(label == CHANGE)
        if len(changed):
            row, column = divmod(int(changed[rng.integers(len(changed))]), label.shape[1])
            return (
                _start_holding(row, side, label.shape[0], rng),
                _start_holding(column, side, label.shape[1], rng),
            )
    tries = config.crop_tries if config.crop == "balanced" else 1
    for _ in range(tries):
        top, left = (int(rng.integers(extent - side + 1)) for extent in label.shape)
        if tries > 1 and _is_balanced(
            label[top : top + side, left : left + side], config.max_class_share
        ):
            break
    return top, left


def _start_holding(position: int, side: int, extent: int, rng: np.random.Generator) -> int:
    lowest, highest = max(0, position - side + 1), min(position, extent - side)
    return int(rng.integers(lowest, highest + 1))


def _is_balanced(label: np.ndarray, max_class_share: float) -> bool:
    counts = np.bincount(label.ravel(), minlength=IGNORE)[:IGNORE]
    return bool((counts > 0).sum() > 1 and counts.max() < max_class_share * counts.sum())


def _turn(
    arrays: tuple[np.ndarray, np.ndarray, np.ndarray],
    config: AugmentConfig,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = slice(None, None, -1 if rng.random() < config.flip_vertical else 1)
    columns = slice(None, None, -1 if rng.random() < config.flip_horizontal else 1)
    quarters = {"none": (0, 1), "any": (0, 4), "always": (1, 4)}[config.rotation]
    turns = int(rng.integers(*quarters))
    pre, post, label = (np.rot90(array[rows, columns], turns) for array in arrays)
    return pre, post, label


def _jitter(image: np.ndarray, config: JitterConfig, rng: np.random.Generator) -> np.ndarray:
    """Varies tone, colour, sharpness and noise of an image (h, w, 3) on the 0..255 scale."""
    if rng.random() >= config.probability:
        return image
    picture = Image.fromarray(_tone(image, config, rng))
    saturation = _factor(config.saturation, rng)
    picture = Image.blend(picture.convert("L").convert("RGB"), picture, saturation)
    if rng.random() < 0.25:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.0, config.blur)))
    varied = np.asarray(picture)
    if rng.random() < 0.5:
        # Bytes are drawn ten times faster than normal deviates; 73.9 is their standard deviation.
        strength = np.float32(rng.uniform(0.0, config.noise) / 73.9)
        noise = rng.integers(0, 256, varied.shape, np.uint8).astype(np.float32)
        noise -= np.float32(127.5)
        noise *= strength
        noise += varied
        varied = np.clip(noise, 0.0, 255.0, out=noise)
    return varied


def _tone(image: np.ndarray, config: JitterConfig, rng: np.random.Generator) -> np.ndarray:
    """Gamma, contrast about the mean, brightness and channel gains: one table a channel."""
    values = np.arange(256) / 255.0
    values = values ** _factor(config.gamma, rng)
    middle = values[image[::4, ::4, 1]].mean()
    values = (values - middle) * _factor(config.contrast, rng) + middle
    values += rng.uniform(-config.brightness, config.brightness)
    gains = np.exp(rng.uniform(-config.channel_gain, config.channel_gain, 3))
    tables = np.clip(np.rint(255.0 * np.outer(gains, values)), 0, 255).astype(np.uint8)
    out = np.empty_like(image, order="C")
    for channel, table in enumerate(tables):
        np.take(table, image[..., channel], out=out[..., channel], mode="clip")
    return out


def _factor(log_range: float, rng: np.random.Generator) -> float:
    return float(np.exp(rng.uniform(-log_range, log_range)))
