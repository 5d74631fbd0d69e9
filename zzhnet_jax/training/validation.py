"""Judges the network on whole validation images, by the code that predicts and evaluates later."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import nnx
from PIL import Image

from zzhnet_jax.data.config import DataConfig
from zzhnet_jax.data.sources import Source
from zzhnet_jax.evaluation import (
    ThresholdSweep,
    binary_metrics,
    change_mask,
    evaluate_predictions,
)
from zzhnet_jax.inference.pictures import PictureRow, contact_sheet
from zzhnet_jax.inference.predictor import Predictor

from .processes import total

_TILE = 256
_MOST_TILES = 8


@dataclass(frozen=True)
class Validation:
    """What one pass over the validation images gave.

    Attributes:
      metrics: of all pixels pooled, at the threshold with the best F1 on these images: `f1`, `iou`,
        ..., that `threshold`, and `f1_at_half`, the F1 at 0.5.
      picture: some of the predictions at that threshold; None if none were asked for.
    """

    metrics: dict[str, float]
    picture: Image.Image | None = field(repr=False)


def validate(
    model: nnx.Module,
    source: Source,
    config: DataConfig,
    *,
    pictures: int,
    stop: Callable[[], bool] = lambda: False,
) -> Validation | None:
    """Runs the network over every pair of a source.

    Processes take turns at the pairs, each on its own devices; all of them must call this. Their
    pixel counts are added up, so that the figures are those of a single process.

    Args:
      model: a change network with its card.
      source: labelled pairs of any size.
      config: batch and crop of training, which bound the memory that is used here.
      pictures: how many pairs to show, evenly spread over those of this process.
      stop: asked before every pair; as soon as it is true for one process, all of them give up.

    Returns:
      The figures; None if given up.
    """
    predictor = _predictor(model, source, config)
    mine = range(jax.process_index(), len(source), jax.process_count())
    places = np.linspace(0, len(mine) - 1, min(pictures, len(mine))).astype(int)
    shown = {mine[place] for place in places}
    kept: list[tuple[dict[str, Any], np.ndarray]] = []

    def predictions() -> Iterator[tuple[np.ndarray, np.ndarray, str]]:
        samples = (source[index] for index in mine if not stop())
        for index, (sample, probability) in zip(mine, predictor.stream(samples), strict=False):
            if index in shown:
                kept.append((dict(sample), probability))
            yield probability, sample["label"], sample["name"]

    report = evaluate_predictions(predictions(), threshold=0.5)
    if total(np.array([len(mine) - len(report.images)]))[0]:
        return None
    sweep = ThresholdSweep(counts=total(report.sweep.counts))
    threshold, _ = sweep.best()
    return Validation(_figures(sweep), _picture(kept, threshold) if kept else None)


def warm_up(model: nnx.Module, source: Source, config: DataConfig) -> None:
    """Compiles what `validate` will need, by predicting one pair."""
    pair = source[0]
    _predictor(model, source, config).probability(pair["pre"], pair["post"])


def _predictor(model: nnx.Module, source: Source, config: DataConfig) -> Predictor:
    """Takes images up to `_TILE` or the training crop whole, with no more memory than training.

    Every device takes as many tiles at a time whatever their number, so that it computes the same.
    """
    sides = [max(info.height, info.width) for info in source.info]
    tile = min(max(sides), max(_TILE, config.crop_size))
    batch = min(max(config.batch_size * config.crop_size**2 // tile**2, 1), _MOST_TILES)
    return Predictor(
        model,
        tile_size=tile,
        overlap=tile // 4,
        batch_size=batch,
        devices=jax.local_devices(),
    )


def _figures(sweep: ThresholdSweep) -> dict[str, float]:
    threshold, _ = sweep.best()
    best, half = (
        sweep.confusion(int(np.searchsorted(sweep.thresholds, t))) for t in (threshold, 0.5)
    )
    return binary_metrics(best) | {"threshold": threshold, "f1_at_half": binary_metrics(half)["f1"]}


def _picture(kept: list[tuple[dict[str, Any], np.ndarray]], threshold: float) -> Image.Image:
    rows = [
        PictureRow(
            sample["pre"],
            sample["post"],
            probability,
            change_mask(probability, threshold),
            sample["label"],
            sample["name"],
        )
        for sample, probability in kept
    ]
    return contact_sheet(rows)
