"""What F1 a method without any training reaches: image difference with Otsu's threshold.

A network that does not beat this by far has learnt nothing. Run it on the dataset you train on:

    python benchmarks/floors.py path/to/dataset --split test --json floors.json

The length of the colour difference, of the images as they are or with each date's colours
standardised, is thresholded image by image or with one threshold for the split; the scores are
pooled over all pixels of the split.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from zzhnet_jax.data.config import SPLITS
from zzhnet_jax.data.sources import FolderSource
from zzhnet_jax.errors import UserError
from zzhnet_jax.evaluation.confusion import BinaryConfusion
from zzhnet_jax.evaluation.metrics import binary_metrics


def standardised(image: np.ndarray) -> np.ndarray:
    """The image with each channel's mean brought to 128 and its standard deviation to 40: float."""
    values = image.astype(np.float64)
    mean, std = values.mean(axis=(0, 1)), values.std(axis=(0, 1))
    return 128.0 + 40.0 * (values - mean) / np.maximum(std, 1e-6)


def colour_difference(pre: np.ndarray, post: np.ndarray) -> np.ndarray:
    """Root mean square difference of the channels, as a level from 0 to 255: uint8 (h, w)."""
    difference = pre.astype(np.float64) - post.astype(np.float64)
    length = np.sqrt((difference**2).mean(axis=-1))
    return np.rint(length.clip(0.0, 255.0)).astype(np.uint8)


def otsu_threshold(levels: np.ndarray) -> int:
    """The level above which pixels are foreground, by the largest variance between the classes.

    Args:
      levels: uint8, any shape.
    """
    counts = np.bincount(levels.ravel(), minlength=256).astype(np.float64)
    below = np.cumsum(counts)
    above = below[-1] - below
    sum_below = np.cumsum(counts * np.arange(256))
    with np.errstate(invalid="ignore", divide="ignore"):
        distance = sum_below / below - (sum_below[-1] - sum_below) / above
    between = np.nan_to_num(below * above * distance**2, posinf=0.0)
    return int(between.argmax())


def measure(root: Path, split: str) -> list[dict[str, Any]]:
    """Pooled scores on a split, for every way of taking differences and thresholds."""
    pairs = list(FolderSource(root, split))
    labels = [pair["label"] for pair in pairs]
    rows = []
    for colours, prepare in (("as they are", np.asarray), ("standardised", standardised)):
        levels = [colour_difference(prepare(pair["pre"]), prepare(pair["post"])) for pair in pairs]
        shared = otsu_threshold(np.concatenate([level.ravel() for level in levels]))
        for scope, thresholds in (
            ("per image", [otsu_threshold(level) for level in levels]),
            ("per split", [shared] * len(levels)),
        ):
            pooled = BinaryConfusion()
            for level, threshold, label in zip(levels, thresholds, labels, strict=True):
                pooled = pooled + BinaryConfusion.count(level > threshold, label)
            rows.append({"colours": colours, "threshold": scope, **binary_metrics(pooled)})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="folder of the dataset")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    arguments = parser.parse_args()
    try:
        rows = measure(arguments.root, arguments.split)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{'colours':<14}{'threshold':<12}{'F1':>7}{'precision':>11}{'recall':>8}")
    for row in rows:
        print(
            f"{row['colours']:<14}{row['threshold']:<12}"
            f"{row['f1']:7.3f}{row['precision']:11.3f}{row['recall']:8.3f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"split": arguments.split, "rows": rows}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
