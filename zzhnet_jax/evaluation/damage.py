"""Building damage: where buildings stood before, and how damaged each is after.

The figures of the xView2 challenge (Gupta et al. 2019, "xBD"): F1 of localisation, harmonic mean of
the damage classes' F1 on true building pixels, and 0.3 / 0.7 of the two.
"""

from dataclasses import dataclass

import numpy as np

from .confusion import BinaryConfusion, confusion_matrix
from .metrics import binary_metrics, divide, multiclass_metrics

LOCALISATION_SHARE = 0.3


@dataclass(frozen=True, eq=False)
class BuildingDamage:
    """Counts of both tasks.

    Attributes:
      buildings: building or not, over all pixels.
      damage: int64 (5, 5) over true building pixels, rows = label: 0 background, 1 no damage, 2
        minor, 3 major, 4 destroyed.
    """

    buildings: BinaryConfusion
    damage: np.ndarray

    @classmethod
    def count(
        cls,
        *,
        building_prediction: np.ndarray,
        damage_prediction: np.ndarray,
        building_label: np.ndarray,
        damage_label: np.ndarray,
    ) -> "BuildingDamage":
        """Counts arrays of one shape: building 0 or 1, damage 0..4; 255 in a label is ignored."""
        on_building = building_label == 1
        return cls(
            BinaryConfusion.count(building_prediction, building_label),
            confusion_matrix(damage_prediction[on_building], damage_label[on_building], 5),
        )

    def __add__(self, other: "BuildingDamage") -> "BuildingDamage":
        return BuildingDamage(self.buildings + other.buildings, self.damage + other.damage)

    def metrics(self) -> dict[str, float | np.ndarray]:
        """The challenge's figures.

        Returns:
          `localisation_f1`; `class_f1`: float64 (4,), NaN for a class that is neither labelled nor
          predicted; `damage_f1`: harmonic mean of the defined ones, zero when one of them is zero;
          `overall`: 0.3 localisation_f1 + 0.7 damage_f1.
        """
        localisation = binary_metrics(self.buildings)["f1"]
        class_f1 = multiclass_metrics(self.damage)["f1"][1:]
        damage = harmonic_mean(class_f1[np.isfinite(class_f1)])
        return {
            "localisation_f1": localisation,
            "class_f1": class_f1,
            "damage_f1": damage,
            "overall": LOCALISATION_SHARE * localisation + (1 - LOCALISATION_SHARE) * damage,
        }


def harmonic_mean(values: np.ndarray) -> float:
    """N / sum(1 / v) of non-negative values; zero when one is zero, NaN when there are none."""
    if np.any(values == 0):
        return 0.0
    return float(divide(len(values), np.sum(1 / values)))
