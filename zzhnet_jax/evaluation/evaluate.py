"""Judges change probabilities against labels, image by image and pooled over all pixels.

`evaluate_predictions` takes probabilities from anywhere (a training loop's batches, a tiled
predictor, files); `evaluate_source` calls a predictor on each pair of a data source.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .confusion import BinaryConfusion, change_mask
from .metrics import binary_metrics, json_ready, undefined_reasons
from .sweep import ThresholdSweep

PredictProbability = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class ImageResult:
    """Counts of one image at the report's threshold."""

    name: str
    confusion: BinaryConfusion

    @property
    def group(self) -> str:
        """The name up to its first underscore: the data set, if names are `<dataset>_<scene>`."""
        return self.name.split("_", 1)[0]

    def to_json(self) -> dict[str, Any]:
        """A row of the per-image table."""
        return {"name": self.name} | _figures(self.confusion)


@dataclass(frozen=True)
class EvaluationReport:
    """What `evaluate_predictions` found.

    Attributes:
      threshold: a pixel counts as changed when its probability is at least this.
      images: one result an image, in the order they came.
      sweep: all pixels, for figures at other thresholds.
    """

    threshold: float
    images: tuple[ImageResult, ...]
    sweep: ThresholdSweep = field(repr=False)

    @property
    def confusion(self) -> BinaryConfusion:
        """Counts of all images together."""
        return sum((image.confusion for image in self.images), BinaryConfusion())

    @property
    def metrics(self) -> dict[str, float]:
        """`binary_metrics` of all pixels pooled, as benchmarks report them."""
        return binary_metrics(self.confusion)

    @property
    def groups(self) -> dict[str, BinaryConfusion]:
        """Pooled counts of each `ImageResult.group`, in order of first appearance."""
        pooled: dict[str, BinaryConfusion] = {}
        for image in self.images:
            pooled[image.group] = pooled.get(image.group, BinaryConfusion()) + image.confusion
        return pooled

    def to_json(self, *, per_group: bool = False) -> dict[str, Any]:
        """Everything as values that JSON can write; `undefined` says why a figure is null."""
        threshold, f1 = self.sweep.best()
        report = {
            "threshold": self.threshold,
            "images": len(self.images),
            "pixels": self.confusion.total,
            "metrics": self.metrics,
            "undefined": undefined_reasons(self.confusion),
            "changed_share": _changed_share(self.confusion),
            "best_on_these_images": {"threshold": threshold, "f1": f1},
        }
        if per_group:
            report["groups"] = {name: _figures(counts) for name, counts in self.groups.items()}
        report["per_image"] = [image.to_json() for image in self.images]
        return json_ready(report)


def evaluate_predictions(
    predictions: Iterable[tuple[np.ndarray, np.ndarray, str]], *, threshold: float
) -> EvaluationReport:
    """Judges a stream of predictions; only counts are kept.

    Args:
      predictions: (change probability in [0, 1] (h, w), label (h, w) with 0, 1 or 255 = ignored,
        name) of each image.
      threshold: a pixel counts as changed when its probability is at least this.

    Raises:
      ValueError: a probability's shape differs from its label's, or it holds values outside [0, 1]
        or NaN.
    """
    sweep, images = ThresholdSweep(), []
    for probability, label, name in predictions:
        sweep.update(probability, label)
        confusion = BinaryConfusion.count(change_mask(probability, threshold), label)
        images.append(ImageResult(name, confusion))
    return EvaluationReport(threshold, tuple(images), sweep)


def evaluate_source(
    predict_probability: PredictProbability, source: Sequence[dict[str, Any]], *, threshold: float
) -> EvaluationReport:
    """Judges a predictor on every pair of a data source.

    Args:
      predict_probability: from two uint8 images (h, w, 3) to a change probability (h, w).
      source: items with `pre`, `post`, `label`, `name`.
      threshold: a pixel counts as changed when its probability is at least this.
    """
    samples = (source[index] for index in range(len(source)))
    return evaluate_predictions(
        ((predict_probability(s["pre"], s["post"]), s["label"], s["name"]) for s in samples),
        threshold=threshold,
    )


def _changed_share(confusion: BinaryConfusion) -> float | None:
    return confusion.changed / confusion.total if confusion.total else None


def _figures(confusion: BinaryConfusion) -> dict[str, Any]:
    return json_ready({"changed_share": _changed_share(confusion)} | binary_metrics(confusion))
