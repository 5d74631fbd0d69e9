"""Measures change maps against labels: numpy only, exact counts, mergeable over images."""

from .confusion import IGNORE, BinaryConfusion, change_mask, confusion_matrix
from .evaluate import EvaluationReport, ImageResult, evaluate_predictions, evaluate_source
from .metrics import binary_metrics, json_ready, multiclass_metrics, undefined_reasons
from .sweep import ThresholdSweep

__all__ = [
    "IGNORE",
    "BinaryConfusion",
    "EvaluationReport",
    "ImageResult",
    "ThresholdSweep",
    "binary_metrics",
    "change_mask",
    "confusion_matrix",
    "evaluate_predictions",
    "evaluate_source",
    "json_ready",
    "multiclass_metrics",
    "undefined_reasons",
]
