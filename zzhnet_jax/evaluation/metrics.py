"""Figures computed from counts.

A ratio whose denominator is zero is undefined: it is NaN here, null in JSON, and
`undefined_reasons` says in words why. No small constant is added to any denominator.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .confusion import BinaryConfusion

NO_CHANGE = "neither the labels nor the predictions hold a changed pixel"


def _ratios(c: BinaryConfusion) -> dict[str, tuple[int, int, str]]:
    """Each metric as (numerator, denominator, why the denominator is zero), exact integers."""
    return {
        "oa": (c.tp + c.tn, c.total, "there is no labelled pixel"),
        "precision": (c.tp, c.tp + c.fp, "no pixel was predicted as changed"),
        "recall": (c.tp, c.tp + c.fn, "the labels hold no changed pixel"),
        "f1": (2 * c.tp, 2 * c.tp + c.fp + c.fn, NO_CHANGE),
        "iou": (c.tp, c.tp + c.fp + c.fn, NO_CHANGE),
        "kappa": (
            2 * (c.tp * c.tn - c.fp * c.fn),
            (c.tp + c.fp) * (c.fp + c.tn) + (c.tp + c.fn) * (c.fn + c.tn),
            "labels and predictions agree on a single class, so chance alone explains them",
        ),
    }


def binary_metrics(confusion: BinaryConfusion) -> dict[str, float]:
    """Overall accuracy, and the changed class's precision, recall, F1, IoU; Cohen's kappa.

    With p_o the observed and p_e the chance agreement, kappa = (p_o - p_e) / (1 - p_e).

    Returns:
      `oa`, `precision`, `recall`, `f1`, `iou`, `kappa`; NaN where undefined (see
      `undefined_reasons`).
    """
    return {
        name: numerator / denominator if denominator else math.nan
        for name, (numerator, denominator, _) in _ratios(confusion).items()
    }


def undefined_reasons(confusion: BinaryConfusion) -> dict[str, str]:
    """Why each undefined metric of `binary_metrics` has no value; empty when all have one."""
    return {
        name: why for name, (_, denominator, why) in _ratios(confusion).items() if not denominator
    }


def multiclass_metrics(matrix: np.ndarray) -> dict[str, Any]:
    """Figures of a problem with several classes.

    Args:
      matrix: counts (k, k), rows = label, columns = prediction.

    Returns:
      `oa`: share of pixels with the right class; `kappa`: Cohen's; `iou`, `f1`, `precision`,
        `recall`: float64 (k,), NaN for a class that
      has no pixel to judge by; `miou`: mean of the defined IoUs.
    """
    matrix = np.asarray(matrix, np.float64)
    hit, label, predicted = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    iou = divide(hit, label + predicted - hit)
    return {
        "oa": float(divide(hit.sum(), matrix.sum())),
        "kappa": cohen_kappa(matrix),
        "iou": iou,
        "miou": float(np.nanmean(iou)) if np.isfinite(iou).any() else math.nan,
        "f1": divide(2 * hit, label + predicted),
        "precision": divide(hit, predicted),
        "recall": divide(hit, label),
    }


def cohen_kappa(matrix: np.ndarray) -> float:
    """Agreement beyond chance in a (k, k) table of counts; NaN where chance agreement is total."""
    matrix = np.asarray(matrix, np.float64)
    total = matrix.sum()
    chance = matrix.sum(0) @ matrix.sum(1)
    return float(divide(total * np.trace(matrix) - chance, total**2 - chance))


def divide(numerator: np.ndarray | float, denominator: np.ndarray | float) -> np.ndarray:
    """Elementwise quotient, NaN where the denominator is zero."""
    numerator, denominator = np.broadcast_arrays(
        np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    )
    return np.divide(
        numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator != 0
    )


def json_ready(value: Any) -> Any:
    """The same nested value with plain Python numbers and null for NaN, which JSON cannot write."""
    match value:
        case Mapping():
            return {str(key): json_ready(item) for key, item in value.items()}
        case list() | tuple():
            return [json_ready(item) for item in value]
        case np.ndarray() | np.generic():
            return json_ready(value.tolist())
        case float():
            return value if math.isfinite(value) else None
        case _:
            return value
