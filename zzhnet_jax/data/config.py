"""What a user may set about data: where the pairs come from and how crops of them are varied.

Every class is frozen and checked when it is made; a wrong value is a `ConfigError` that names the
field by its path in the experiment config (`data.crop_size`, `data.augmentation.scale`, ...).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

from zzhnet_jax.errors import ConfigError

Split = Literal["train", "val", "test"]
SourceKind = Literal["folder", "synthetic"]
CropPolicy = Literal["uniform", "change", "balanced"]
Rotation = Literal["none", "any", "always"]

SPLITS: tuple[Split, ...] = get_args(Split)

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


def check_split(split: str) -> None:
    """Raises `ConfigError` unless `split` names one of the three splits."""
    _require(split in SPLITS, "split", split, f"one of {', '.join(SPLITS)}")


@dataclasses.dataclass(frozen=True)
class JitterConfig:
    """Colour jitter, drawn for each date by itself since the light differs between them.

    Attributes:
      probability: share of images that are varied at all.
      brightness: largest shift, as a share of the full range.
      contrast: largest change of contrast, in log units (0.2 is a factor between 0.82 and 1.22).
      saturation: largest change of saturation, in log units.
      gamma: largest change of the exponent of the tone curve, in log units.
      channel_gain: largest change of one channel's gain, in log units: a cast of colour.
      blur: largest standard deviation of a Gaussian blur, in pixels; three images in four stay
        sharp.
      noise: largest standard deviation of Gaussian pixel noise, on the 0..255 scale; half of the
        images get none.
    """

    probability: float = 0.8
    brightness: float = 0.08
    contrast: float = 0.2
    saturation: float = 0.25
    gamma: float = 0.2
    channel_gain: float = 0.06
    blur: float = 1.0
    noise: float = 5.0

    def __post_init__(self) -> None:
        path = "data.augmentation.jitter"
        _check_share(f"{path}.probability", self.probability)
        _check_share(f"{path}.brightness", self.brightness)
        for name in ("contrast", "saturation", "gamma", "channel_gain"):
            _check_number(f"{path}.{name}", getattr(self, name), 0.0, 2.0)
        _check_number(f"{path}.blur", self.blur, 0.0, 10.0)
        _check_number(f"{path}.noise", self.noise, 0.0, 128.0)

    @classmethod
    def off(cls) -> JitterConfig:
        """No colour jitter."""
        return cls(probability=0.0)


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """How a training crop is drawn from a pair. Geometry moves both dates and the label together.

    Attributes:
      crop: "uniform" takes any place; "change" makes `change_share` of the crops hold a changed
        pixel chosen at random (where the pair has one); "balanced" redraws, up to `crop_tries`
        times, until two classes are in the crop and none has `max_class_share` of it.
      change_share: for "change".
      crop_tries: for "balanced".
      max_class_share: for "balanced".
      pad: pad images smaller than the crop, at a random offset, with value 0 and the label
        "ignore"; without it they are an error.
      scale: range of magnification, drawn uniformly in log scale; 1.25 shows objects 1.25 times
        larger.
      flip_horizontal: probability of a left-right flip.
      flip_vertical: probability of a top-bottom flip.
      rotation: quarter turns: "none", "any" of the four orientations, or "always" one of the three
        that differ from the original.
      exchange_dates: probability of exchanging the dates, which leaves binary change as it is.
      jitter: colour jitter.
    """

    crop: CropPolicy = "change"
    change_share: float = 0.6
    crop_tries: int = 10
    max_class_share: float = 0.75
    pad: bool = False
    scale: tuple[float, float] = (0.8, 1.25)
    flip_horizontal: float = 0.5
    flip_vertical: float = 0.5
    rotation: Rotation = "any"
    exchange_dates: float = 0.5
    jitter: JitterConfig = dataclasses.field(default_factory=JitterConfig)

    def __post_init__(self) -> None:
        path = "data.augmentation"
        _check_choice(f"{path}.crop", self.crop, get_args(CropPolicy))
        _check_choice(f"{path}.rotation", self.rotation, get_args(Rotation))
        for name in ("change_share", "flip_horizontal", "flip_vertical", "exchange_dates"):
            _check_share(f"{path}.{name}", getattr(self, name))
        _check_share(f"{path}.max_class_share", self.max_class_share)
        _check_whole(f"{path}.crop_tries", self.crop_tries, 1)
        _check_pair(f"{path}.scale", self.scale)
        _require(
            0.1 <= self.scale[0] <= self.scale[1] <= 10.0,
            f"{path}.scale",
            self.scale,
            "two numbers between 0.1 and 10, the smaller first, for example (0.8, 1.25)",
        )

    @classmethod
    def off(cls) -> AugmentConfig:
        """Crops at uniformly random places, otherwise unchanged."""
        return cls(
            crop="uniform",
            scale=(1.0, 1.0),
            flip_horizontal=0.0,
            flip_vertical=0.0,
            rotation="none",
            exchange_dates=0.0,
            jitter=JitterConfig.off(),
        )

    @classmethod
    def changemamba(cls) -> AugmentConfig:
        """The augmentation of the published ChangeMamba networks.

        Balanced crops with padding, both flips, and a quarter turn that is never none at all.
        """
        return cls(
            crop="balanced",
            pad=True,
            scale=(1.0, 1.0),
            rotation="always",
            exchange_dates=0.0,
            jitter=JitterConfig.off(),
        )


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """Scenes that are rendered rather than read; `zzhnet_jax.data.synthetic` tells what they hold.

    Attributes:
      size: height and width of a scene in pixels.
      train_pairs: number of pairs in the training split.
      val_pairs: number of pairs in the validation split.
      test_pairs: number of pairs in the test split.
      seed: another seed gives other scenes.
      change: how much changes between the dates, from 0, nothing, to 1, a sixth of all pixels.
      nuisance: strength of everything that is not change (light, season, haze, noise, blur,
        misregistration, shadows), from 0 to 2.
    """

    size: int = 128
    train_pairs: int = 192
    val_pairs: int = 48
    test_pairs: int = 48
    seed: int = 0
    change: float = 0.7
    nuisance: float = 1.0

    def __post_init__(self) -> None:
        path = "data.synthetic"
        _check_whole(f"{path}.size", self.size, 32)
        for name in ("train_pairs", "val_pairs", "test_pairs"):
            _check_whole(f"{path}.{name}", getattr(self, name), 1)
        _check_whole(f"{path}.seed", self.seed, 0)
        _check_share(f"{path}.change", self.change)
        _check_number(f"{path}.nuisance", self.nuisance, 0.0, 2.0)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where image pairs come from and how they become training batches.

    Attributes:
      source: "folder" reads `root`; "synthetic" renders scenes.
      root: folder in the LEVIR layout: `A`, `B` and `label`, directly or under `train`, `val` and
        `test`.
      rendered_pairs: scenes of the synthetic source added to the training pairs of a folder.
      batch_size: pairs in a global batch, shared out evenly over the processes.
      crop_size: height and width of the training crops in pixels.
      mean: mean of the red, green and blue channel on the 0..255 scale, subtracted from every
        pixel.
      std: standard deviation per channel on the 0..255 scale, by which every pixel is divided.
      workers: processes that prepare batches; 0 prepares them in a thread of the training process.
        The batches are the same.
      prefetch: batches kept ready, in each worker if there are any.
      cache_megabytes: decoded images are kept in memory, in each process that prepares batches,
        until they fill this much.
      augmentation: how training crops are drawn and varied.
      synthetic: the scenes of the synthetic source.
    """

    source: SourceKind = "folder"
    root: str | None = None
    rendered_pairs: int = 0
    batch_size: int = 8
    crop_size: int = 256
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    workers: int = 0
    prefetch: int = 4
    cache_megabytes: int = 512
    augmentation: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    synthetic: SyntheticConfig = dataclasses.field(default_factory=SyntheticConfig)

    def __post_init__(self) -> None:
        _check_choice("data.source", self.source, get_args(SourceKind))
        _check_whole("data.rendered_pairs", self.rendered_pairs, 0)
        _check_whole("data.batch_size", self.batch_size, 1)
        _check_whole("data.crop_size", self.crop_size, 8)
        _check_whole("data.workers", self.workers, 0)
        _check_whole("data.prefetch", self.prefetch, 1)
        _check_whole("data.cache_megabytes", self.cache_megabytes, 0)
        _check_channels("data.mean", self.mean, lowest=0.0)
        _check_channels("data.std", self.std, lowest=1e-3)


def _require(condition: bool, field: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(field, value, allowed)


def _check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    _require(value in choices, field, value, f"one of {', '.join(choices)}")


def _check_whole(field: str, value: object, lowest: int) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= lowest
    _require(whole, field, value, f"a whole number of at least {lowest}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_number(field: str, value: Any, lowest: float, highest: float) -> None:
    inside = _is_number(value) and lowest <= value <= highest
    _require(inside, field, value, f"a number from {lowest:g} to {highest:g}")


def _check_share(field: str, value: Any) -> None:
    _check_number(field, value, 0.0, 1.0)


def _check_pair(field: str, value: Any) -> None:
    pair = isinstance(value, tuple) and len(value) == 2 and all(_is_number(v) for v in value)
    _require(pair, field, value, "a pair of numbers")


def _check_channels(field: str, value: Any, lowest: float) -> None:
    three = isinstance(value, tuple) and len(value) == 3 and all(_is_number(v) for v in value)
    _require(
        three and all(lowest <= v <= 255.0 for v in value),
        field,
        value,
        f"three numbers from {lowest:g} to 255, for red, green and blue",
    )
