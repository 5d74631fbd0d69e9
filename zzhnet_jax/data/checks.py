"""Reads a whole dataset and lists what is wrong with it, before a training run finds out."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from zzhnet_jax.data.images import CHANGE, check_same_size, load_label, load_pair
from zzhnet_jax.data.layout import PairFiles, match_split, split_names
from zzhnet_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class SplitReport:
    """What a split holds.

    Attributes:
      pairs: number of usable pairs.
      sizes: how many pairs there are of each size, as "widthxheight".
      change_share: share of changed pixels.
      pairs_without_change: number of pairs whose label is empty.
      mean: of the red, green and blue channel over both dates, on the 0..255 scale.
      std: standard deviation likewise.
    """

    pairs: int
    sizes: dict[str, int]
    change_share: float
    pairs_without_change: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class DatasetReport:
    """The result of a check.

    Attributes:
      root: the dataset's folder.
      splits: what each split holds; the one key "all" where the dataset tells no splits apart.
      problems: one line for everything that would stop training or spoil its scores.
      remarks: one line for what is unusual but may be meant.
    """

    root: str
    splits: dict[str, SplitReport]
    problems: list[str]
    remarks: list[str]

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return {"ok": self.ok, **dataclasses.asdict(self)}


def check_dataset(root: Path | str) -> DatasetReport:
    """Decodes every file of a dataset in the LEVIR layout.

    Args:
      root: its folder.

    Returns:
      Counts and statistics per split; images that occur in two splits are among the problems.
    """
    root = Path(root)
    report = DatasetReport(str(root), {}, [], [])
    seen: dict[str, tuple[str, Path]] = {}
    splits: list[Any] = list(split_names(root))
    if not splits and root.is_dir():
        report.remarks.append(f"{root}: has neither lists nor split folders; all of it is one set")
    for split in splits or ["all"]:
        # A root that tells no splits apart is the same whichever is asked for.
        files, problems = match_split(root, split if splits else "test")
        report.problems.extend(problems)
        with ThreadPoolExecutor() as pool:
            checked = list(pool.map(_check_pair, files))
        usable = [pair for pair in checked if isinstance(pair, _PairStatistics)]
        report.problems.extend(pair for pair in checked if isinstance(pair, str))
        _find_duplicates(split, usable, seen, report)
        if usable:
            report.splits[split] = _summarise(usable)
            if report.splits[split].change_share == 0.0:
                report.remarks.append(f"split {split}: no label has a changed pixel")
    return report


@dataclasses.dataclass(frozen=True)
class _PairStatistics:
    """What is kept of a pair.

    Attributes:
      size: as "widthxheight".
      pixels: their number in the label.
      changed: number of changed ones.
      levels: (3, 256), how often each level occurs in each channel of both images.
      images: a hash of the pixels and the path of each image.
    """

    size: str
    pixels: int
    changed: int
    levels: np.ndarray
    images: tuple[tuple[str, Path], ...]


def _check_pair(files: PairFiles) -> _PairStatistics | str:
    try:
        assert files.label is not None
        images = load_pair(files.pre, files.post)
        label = load_label(files.label)
        check_same_size(files.pre, images[0].shape[:2], files.label, label.shape)
    except DataError as error:
        return str(error)
    height, width = label.shape
    both = np.stack(images)
    levels = [np.bincount(both[..., channel].ravel(), minlength=256) for channel in range(3)]
    return _PairStatistics(
        size=f"{width}x{height}",
        pixels=label.size,
        changed=int((label == CHANGE).sum()),
        levels=np.stack(levels),
        images=tuple(
            (hashlib.sha256(image.tobytes()).hexdigest(), path)
            for image, path in zip(images, (files.pre, files.post), strict=True)
            if image.min() < image.max()  # an empty tile is like any other
        ),
    )


def _find_duplicates(
    split: str,
    pairs: list[_PairStatistics],
    seen: dict[str, tuple[str, Path]],
    report: DatasetReport,
) -> None:
    for pair in pairs:
        for digest, path in pair.images:
            other_split, other = seen.setdefault(digest, (split, path))
            if other_split != split:
                report.problems.append(
                    f"{path}: the same image as {other} of split {other_split}, so that scores "
                    "would be too good; keep it in one split"
                )
            elif other != path:
                report.remarks.append(f"{path}: the same image as {other}")


def _summarise(pairs: list[_PairStatistics]) -> SplitReport:
    pixels = sum(pair.pixels for pair in pairs)
    counts = np.sum([pair.levels for pair in pairs], axis=0) / (2 * pixels)
    mean = counts @ np.arange(256)
    std = np.sqrt(counts @ np.arange(256) ** 2 - mean**2)
    return SplitReport(
        pairs=len(pairs),
        sizes=dict(collections.Counter(pair.size for pair in pairs)),
        change_share=sum(pair.changed for pair in pairs) / pixels,
        pairs_without_change=sum(pair.changed == 0 for pair in pairs),
        mean=tuple(mean.round(3).tolist()),
        std=tuple(std.round(3).tolist()),
    )
