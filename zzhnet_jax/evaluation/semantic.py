"""Semantic change detection: what each changed place was before and what it became.

Every pixel has a transition: 0 where nothing changed, else (before - 1) * classes + after with
land-cover classes 1..classes. The figures are those of the SECOND benchmark (Yang et al. 2021,
"Asymmetric Siamese Networks for Semantic Change Detection"), with Fscd of Ding et al. 2022
("Bi-Temporal Semantic Reasoning for the Semantic Change Detection in HR Remote Sensing Images").
"""

import math
from dataclasses import dataclass

import numpy as np

from .confusion import confusion_matrix
from .metrics import cohen_kappa, divide


def transition_index(
    change: np.ndarray, before: np.ndarray, after: np.ndarray, num_classes: int = 6
) -> np.ndarray:
    """Numbers the transition of every pixel.

    Args:
      change: 0 or 1.
      before: land-cover class of the earlier date, 1..num_classes where changed; anything
        elsewhere.
      after: likewise of the later date.
      num_classes: land-cover classes, the unchanged one not counted.

    Returns:
      int64 in 0..num_classes**2, same shape.

    Raises:
      ValueError: a changed pixel has a class outside 1..num_classes. A network whose class 0 means
        "unchanged" must choose among the others where it predicts a change.
    """
    changed = change == 1
    for name, classes in (("before", before), ("after", after)):
        values = classes[changed]
        if values.size and not 1 <= values.min() <= values.max() <= num_classes:
            raise ValueError(
                f"{name} has classes {values.min()}..{values.max()} at changed pixels, "
                f"not within 1..{num_classes}"
            )
    index = (before.astype(np.int64) - 1) * num_classes + after
    return np.where(changed, index, 0)


@dataclass(frozen=True, eq=False)
class SemanticChange:
    """Counts of true and predicted transitions.

    Attributes:
      matrix: int64 (t, t) with t = classes**2 + 1, rows = label, columns = prediction.
      accuracies: overall accuracy of each image; their mean is the benchmark's OA.
    """

    matrix: np.ndarray
    accuracies: tuple[float, ...] = ()

    @classmethod
    def count(
        cls, prediction: np.ndarray, label: np.ndarray, num_classes: int = 6
    ) -> "SemanticChange":
        """Counts a batch.

        Args:
          prediction: transitions (images, h, w) from `transition_index`.
          label: likewise.
          num_classes: land-cover classes.
        """
        matrices = [
            confusion_matrix(p, t, num_classes**2 + 1)
            for p, t in zip(prediction, label, strict=True)
        ]
        accuracies = tuple(float(divide(np.trace(m), m.sum())) for m in matrices)
        return cls(np.sum(matrices, axis=0), accuracies)

    def __add__(self, other: "SemanticChange") -> "SemanticChange":
        return SemanticChange(self.matrix + other.matrix, self.accuracies + other.accuracies)

    def metrics(self) -> dict[str, float]:
        """The benchmark's figures.

        Returns:
          `kappa_n0`: Cohen's kappa with the count of rightly unchanged pixels set to zero; `miou`:
            mean of the IoU of "unchanged" and of
          "changed" (whatever the transition); `sek`: kappa_n0 * exp(IoU_changed - 1); `fscd`: F1 of
          the transitions of changed pixels; `oa`: mean over images of the share of right
          transitions. NaN where undefined.
        """
        matrix = self.matrix.astype(np.float64)
        total, unchanged, right = matrix.sum(), matrix[0, 0], np.trace(matrix[1:, 1:])
        label_changed, predicted_changed = matrix[1:].sum(), matrix[:, 1:].sum()
        iou_changed = float(divide(matrix[1:, 1:].sum(), total - unchanged))
        iou_unchanged = float(
            divide(unchanged, unchanged + matrix[0, 1:].sum() + matrix[1:, 0].sum())
        )
        without_unchanged = matrix.copy()
        without_unchanged[0, 0] = 0
        kappa = cohen_kappa(without_unchanged)
        return {
            "kappa_n0": kappa,
            "fscd": float(divide(2 * right, label_changed + predicted_changed)),
            "miou": (iou_unchanged + iou_changed) / 2,
            "sek": kappa * math.exp(iou_changed - 1),
            "oa": float(np.mean(self.accuracies)) if self.accuracies else math.nan,
        }
