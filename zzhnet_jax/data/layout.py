"""Finds the files of a dataset in the LEVIR layout, and what is missing from it, by names alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from zzhnet_jax.data.config import SPLITS, Split
from zzhnet_jax.data.images import IMAGE_SUFFIXES
from zzhnet_jax.errors import DataError

PRE, POST, LABEL = "A", "B", "label"


@dataclasses.dataclass(frozen=True)
class PairFiles:
    """The files of one pair; `label` is None where no labels were asked for."""

    name: str
    pre: Path
    post: Path
    label: Path | None


def find_pairs(pre: Path, post: Path, label: Path | None = None) -> list[PairFiles]:
    """Matches the images of two folders, and of a label folder if given, by name without suffix.

    Args:
      pre: folder of the earlier images.
      post: folder of the later images.
      label: folder of the labels, or None.

    Returns:
      The pairs in order of name.

    Raises:
      DataError: a folder is missing or empty, a name occurs twice in one, or a file has no
        counterpart.
    """
    pairs, problems = match_pairs(pre, post, label)
    _raise_first(problems)
    return pairs


def find_split(root: Path, split: Split) -> list[PairFiles]:
    """Finds the files of one split of a dataset; `FolderSource` describes the layout.

    Raises:
      DataError: the root, a folder, a counterpart or a listed pair is missing, or the split is
        empty.
    """
    pairs, problems = match_split(root, split)
    _raise_first(problems)
    return pairs


def split_names(root: Path) -> list[Split]:
    """The splits that a dataset tells apart by folders or lists; none if it is all one set."""
    folders = [split for split in SPLITS if (root / split / PRE).is_dir()]
    lists = [split for split in SPLITS if _listing(root, split).is_file()]
    return [split for split in SPLITS if split in folders or split in lists]


def match_split(root: Path, split: Split) -> tuple[list[PairFiles], list[str]]:
    """As `find_split`, but returns the complete pairs and every problem instead of raising."""
    if not root.is_dir():
        return [], [f"{root}: no such folder; set data.root to the folder of the dataset"]
    base = next((folder for folder in (root / split, root) if (folder / PRE).is_dir()), None)
    if base is None:
        return [], [
            f"{root}: has neither {split}/{PRE} nor {PRE}; put the earlier images in {PRE}, "
            f"the later ones in {POST} and the labels in {LABEL}, directly or under {split}"
        ]
    pairs, problems = match_pairs(base / PRE, base / POST, base / LABEL)
    listing = _listing(root, split)
    if listing.is_file():
        pairs, more = _select(pairs, listing, base)
        problems += more
    elif base == root and listing.parent.is_dir():
        problems.append(
            f"{listing}: no such file; name the pairs of split {split} in it, one a line"
        )
    return pairs, problems


def match_pairs(
    pre: Path, post: Path, label: Path | None = None
) -> tuple[list[PairFiles], list[str]]:
    """As `find_pairs`, but returns the complete pairs and every problem instead of raising."""
    problems: list[str] = []
    folders = [pre, post] if label is None else [pre, post, label]
    found = [_images_by_stem(folder, problems) for folder in folders]
    if problems:
        return [], problems
    for folder, images in zip(folders[1:], found[1:], strict=True):
        problems += _without_counterpart(found[0], folder, images)
        problems += _without_counterpart(images, pre, found[0])
    complete = sorted(set.intersection(*(set(images) for images in found)))
    return [
        PairFiles(name, found[0][name], found[1][name], found[2][name] if label else None)
        for name in complete
    ], problems


def _raise_first(problems: list[str]) -> None:
    if problems:
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise DataError(problems[0] + more)


def _listing(root: Path, split: Split) -> Path:
    return root / "list" / f"{split}.txt"


def _select(pairs: list[PairFiles], listing: Path, base: Path) -> tuple[list[PairFiles], list[str]]:
    """The pairs that a list names, in its order."""
    try:
        lines = listing.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return [], [f"{listing}: cannot be read as text ({error}); write it again"]
    by_name = {files.name: files for files in pairs}
    selected: dict[str, PairFiles] = {}
    problems = []
    for entry in filter(None, map(str.strip, lines)):
        name = _stem(Path(entry))
        if name in selected:
            problems.append(f"{listing}: names {entry} more than once; remove the repetition")
        elif name in by_name:
            selected[name] = by_name[name]
        else:
            problems.append(
                f"{listing}: names {entry}, but {base} has no complete pair of that name; "
                "correct the list or add the files"
            )
    if not selected and not problems:
        problems.append(
            f"{listing}: the split is empty; write one file name a line, or remove the list"
        )
    return list(selected.values()), problems


def _stem(path: Path) -> str:
    return path.stem if path.suffix.lower() in IMAGE_SUFFIXES else path.name


def _images_by_stem(folder: Path, problems: list[str]) -> dict[str, Path]:
    if not folder.is_dir():
        problems.append(f"{folder}: no such folder; it must hold one image for every pair")
        return {}
    images: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
            continue
        if path.stem in images:
            problems.append(
                f"{path}: has the same name as {images[path.stem].name}; remove one of the two"
            )
        images[path.stem] = path
    if not images:
        problems.append(
            f"{folder}: holds no images ({', '.join(IMAGE_SUFFIXES)}); the split is empty; "
            "put images there or choose another folder"
        )
    return images


def _without_counterpart(have: dict[str, Path], folder: Path, want: dict[str, Path]) -> list[str]:
    return [
        f"{have[name]}: has no counterpart {folder / have[name].name}; "
        "add the missing file or remove this one"
        for name in sorted(set(have) - set(want))
    ]
