"""Every metric at every threshold, from one histogram of probabilities per class.

Counts are exact: a pixel counts as changed at a threshold exactly when `change_mask` says so.
"""

import math

import numpy as np

from .confusion import BinaryConfusion


class ThresholdSweep:
    """Accumulates probabilities of labelled pixels; answers for thresholds 0, 1/(bins-1), ..., 1.

    Attributes:
      thresholds: float64 (bins,), increasing.
      counts: int64 (2, bins): how many unchanged (row 0) and changed (row 1) pixels have a
        probability whose largest threshold not above it is that of the column. Sums of such arrays
        over processes make the sweep of all their pixels.
    """

    def __init__(self, bins: int = 1001, counts: np.ndarray | None = None) -> None:
        """Starts empty, or from counts that were gathered before.

        Args:
          bins: number of thresholds, at least 2.
          counts: (2, bins) to start from.

        Raises:
          ValueError: fewer than two bins, or counts of another shape.
        """
        if bins < 2:
            raise ValueError(f"bins = {bins}: a sweep needs at least 2 thresholds")
        self.thresholds = np.arange(bins) / (bins - 1)
        self.counts = (
            np.zeros((2, bins), np.int64) if counts is None else np.array(counts, np.int64)
        )
        if self.counts.shape != (2, bins):
            raise ValueError(f"counts have shape {self.counts.shape}, not (2, {bins})")

    def update(self, probability: np.ndarray, label: np.ndarray) -> None:
        """Adds an image or a batch.

        Args:
          probability: change probability in [0, 1].
          label: 0, 1 or 255 (ignored), same shape.

        Raises:
          ValueError: the shapes differ, or a probability is NaN or outside [0, 1].
        """
        if probability.shape != label.shape:
            raise ValueError(f"probability has shape {probability.shape}, its label {label.shape}")
        if probability.size and not (probability.min() >= 0 and probability.max() <= 1):
            raise ValueError(
                f"probabilities are {probability.min()}..{probability.max()}, not within 0..1"
            )
        edges = self.thresholds.astype(np.float32)
        for row, value in enumerate((0, 1)):
            pixels = np.asarray(probability[label == value], np.float32)
            column = np.searchsorted(edges, pixels, side="right") - 1
            self.counts[row] += np.bincount(column, minlength=len(edges))

    def __add__(self, other: "ThresholdSweep") -> "ThresholdSweep":
        return ThresholdSweep(len(self.thresholds), self.counts + other.counts)

    def confusion(self, index: int) -> BinaryConfusion:
        """Counts at `thresholds[index]`."""
        below, above = self.counts[:, :index].sum(1), self.counts[:, index:].sum(1)
        return BinaryConfusion(
            tp=int(above[1]), fp=int(above[0]), fn=int(below[1]), tn=int(below[0])
        )

    def f1(self) -> np.ndarray:
        """F1 at every threshold: float64 (bins,), all NaN when no pixel is labelled as changed."""
        changed = self.counts[1].sum()
        if not changed:
            return np.full(len(self.thresholds), np.nan)
        fp, tp = np.cumsum(self.counts[:, ::-1], axis=1)[:, ::-1]
        return 2 * tp / (tp + fp + changed)

    def best(self) -> tuple[float, float]:
        """The threshold with the highest F1, and that F1.

        Of several equally good thresholds the middle one is taken, which is the least sensitive to
        a change of image. Without any pixel labelled as changed no threshold is better than
        another: (0.5, NaN).
        """
        f1 = self.f1()
        if math.isnan(f1[0]):
            return 0.5, math.nan
        ties = np.flatnonzero(f1 == f1.max())
        index = ties[len(ties) // 2]
        return float(self.thresholds[index]), float(f1[index])
