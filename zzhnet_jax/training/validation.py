"""Judges the network on whole validation images, by the code that predicts and evaluates later."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flax import nnx
from PIL import Image

from zzhnet_jax.data.config import DataConfig
from zzhnet_jax.data.sources import Source
from zzhnet_jax.evaluation import (
    EvaluationReport,
    binary_metrics,
    change_mask,
    evaluate_predictions,
)
from zzhnet_jax.inference.pictures import PictureRow, contact_sheet
from zzhnet_jax.inference.predictor import Predictor

_TILE = 256


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


def validate(model: nnx.Module, source: Source, config: DataConfig, *, pictures: int) -> Validation:
    """Runs the network over every pair of a source.

    Args:
      model: a change network with its card.
      source: labelled pairs of any size.
      config: batch and crop of training, which bound the memory that is used here.
      pictures: how many pairs to show, evenly spread over the source.
    """
    predictor = _predictor(model, source, config)
    shown = set(np.linspace(0, len(source) - 1, min(pictures, len(source))).astype(int).tolist())
    kept: list[tuple[dict[str, Any], np.ndarray]] = []

    def predictions() -> Iterator[tuple[np.ndarray, np.ndarray, str]]:
        samples = (source[index] for index in range(len(source)))
        for index, (sample, probability) in enumerate(predictor.stream(samples)):
            if index in shown:
                kept.append((dict(sample), probability))
            yield probability, sample["label"], sample["name"]

    report = evaluate_predictions(predictions(), threshold=0.5)
    threshold, _ = report.sweep.best()
    return Validation(_figures(report), _picture(kept, threshold) if kept else None)


def warm_up(model: nnx.Module, source: Source, config: DataConfig) -> None:
    """Compiles what `validate` will need, by predicting one pair."""
    pair = source[0]
    _predictor(model, source, config).probability(pair["pre"], pair["post"])


def _predictor(model: nnx.Module, source: Source, config: DataConfig) -> Predictor:
    """Takes images up to `_TILE` or the training crop whole, with no more memory than training."""
    sides = [max(info.height, info.width) for info in source.info]
    tile = min(max(sides), max(_TILE, config.crop_size))
    batch = max(config.batch_size * config.crop_size**2 // tile**2, 1)
    return Predictor(model, tile_size=tile, overlap=tile // 4, batch_size=batch)


def _figures(report: EvaluationReport) -> dict[str, float]:
    threshold, _ = report.sweep.best()
    index = int(np.searchsorted(report.sweep.thresholds, threshold))
    figures = binary_metrics(report.sweep.confusion(index))
    return figures | {"threshold": threshold, "f1_at_half": report.metrics["f1"]}


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
