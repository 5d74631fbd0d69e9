"""Counts of agreement between predictions and labels.

Counts are integers, so that adding those of many images or processes in any order gives the same
figures. Every metric is a function of them and stands elsewhere.
"""

from dataclasses import dataclass

import numpy as np

IGNORE = 255
"""Label value of pixels that take no part in any count."""


def change_mask(probability: np.ndarray, threshold: float) -> np.ndarray:
    """Marks as changed every pixel whose probability is at least the threshold.

    The comparison is made in float32, as everywhere in this package, so that a threshold found by a
    sweep gives the sweep's counts.

    Args:
      probability: change probability in [0, 1], any shape.
      threshold: value in [0, 1].

    Returns:
      uint8 array of the same shape, 1 = changed.
    """
    return (np.asarray(probability, np.float32) >= np.float32(threshold)).astype(np.uint8)


@dataclass(frozen=True)
class BinaryConfusion:
    """Pixel counts of a two-class problem whose positive class is "changed".

    Attributes:
      tp: changed and predicted changed.
      fp: unchanged and predicted changed (false alarm).
      fn: changed and predicted unchanged (missed).
      tn: unchanged and predicted unchanged.
    """

    tp: int = 0
    fp: int = 0
    fn: int = 0
    tn: int = 0

    @classmethod
    def count(cls, prediction: np.ndarray, label: np.ndarray) -> "BinaryConfusion":
        """Counts one image, or a batch of them.

        Args:
          prediction: 0 or 1 (or bool), the label's shape.
          label: 0, 1 or `IGNORE`.

        Raises:
          ValueError: the shapes differ.
        """
        if prediction.shape != label.shape:
            raise ValueError(f"prediction has shape {prediction.shape}, its label {label.shape}")
        changed, unchanged, predicted = label == 1, label == 0, prediction == 1
        tp = int(np.count_nonzero(predicted & changed))
        fp = int(np.count_nonzero(predicted & unchanged))
        return cls(
            tp, fp, int(np.count_nonzero(changed)) - tp, int(np.count_nonzero(unchanged)) - fp
        )

    def __add__(self, other: "BinaryConfusion") -> "BinaryConfusion":
        return BinaryConfusion(
            self.tp + other.tp, self.fp + other.fp, self.fn + other.fn, self.tn + other.tn
        )

    @property
    def total(self) -> int:
        """Labelled pixels."""
        return self.tp + self.fp + self.fn + self.tn

    @property
    def changed(self) -> int:
        """Pixels labelled as changed."""
        return self.tp + self.fn


def confusion_matrix(prediction: np.ndarray, label: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts every pair of true and predicted class.

    Args:
      prediction: integers in [0, num_classes) wherever the label isn't `IGNORE`.
      label: integers in [0, num_classes) or `IGNORE`, same shape.
      num_classes: number of classes, k.

    Returns:
      int64 (k, k), rows = label, columns = prediction.

    Raises:
      ValueError: the shapes differ or a value is no class.
    """
    if prediction.shape != label.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, its label {label.shape}")
    valid = label != IGNORE
    pairs = {
        "label": label[valid].astype(np.int64),
        "prediction": prediction[valid].astype(np.int64),
    }
    for name, values in pairs.items():
        if values.size and not 0 <= values.min() <= values.max() < num_classes:
            raise ValueError(
                f"{name} has values {values.min()}..{values.max()}, not 0..{num_classes - 1}"
            )
    index = pairs["label"] * num_classes + pairs["prediction"]
    return np.bincount(index, minlength=num_classes**2).reshape(num_classes, num_classes)
