"""`zzhnet predict`: maps changes between two images, or two folders of them; needs no labels."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zzhnet_jax.data import images
from zzhnet_jax.data.layout import PairFiles, find_pairs
from zzhnet_jax.errors import DataError
from zzhnet_jax.evaluation import change_mask
from zzhnet_jax.inference.pictures import four_panel

from .arguments import option, parse
from .shared import PredictorArguments, progress, write_files

_PATH = tyro.conf.Positional[Path]


@dataclass(frozen=True, kw_only=True)
class PredictArguments(PredictorArguments):
    """Maps what changed between two images of one place, or between two folders of such images.

    Files of two folders belong together by name. For each pair, named after the earlier image:
    NAME_mask.png (0 unchanged, 255 changed), NAME_probability.png (16 bits, 65535 is certain
    change) and NAME_panels.png, a picture of both dates and the result.

    Attributes:
      pre: the earlier image, or a folder of them.
      post: the later image, or a folder of them.
      output: folder for the results.
      labels: the true change, an image or a folder, only to be compared with in the pictures.
    """

    pre: Annotated[_PATH, tyro.conf.arg(metavar="PRE")]
    post: Annotated[_PATH, tyro.conf.arg(metavar="POST")]
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="DIR")] = Path("predictions")
    labels: Annotated[Path | None, option("PATH")] = None


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    arguments = parse(PredictArguments, argv, prog="zzhnet predict")
    pairs = _find(arguments.pre, arguments.post, arguments.labels)
    shapes = [_checked_size(files) for files in pairs]
    model = arguments.load()
    threshold = model.card.threshold if arguments.threshold is None else arguments.threshold
    predictor = arguments.predictor(model, shapes)
    rows = []
    with progress(len(pairs), quiet=arguments.json) as advance:
        for sample, probability in predictor.stream(map(_read, pairs)):
            mask = change_mask(probability, threshold)
            files = write_files(arguments.output, _outputs(sample, probability, mask))
            height, width = mask.shape
            rows.append(
                {
                    "name": sample["name"],
                    "height": height,
                    "width": width,
                    "changed_share": float(mask.mean()),
                    "files": [str(path) for path in files],
                }
            )
            advance()
    if arguments.json:
        print(json.dumps({"threshold": threshold, "pairs": rows}))
    else:
        _print(rows, threshold, arguments.output)
    return 0


def _find(pre: Path, post: Path, labels: Annotated[Path | None, option("PATH")]) -> list[PairFiles]:
    """The pairs to work on.

    Raises:
      DataError: a path is missing, has no counterpart, or files and folders are mixed.
    """
    given = [path for path in (pre, post, labels) if path is not None]
    for path in given:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
    folders = [path for path in given if path.is_dir()]
    if folders and len(folders) < len(given):
        file = next(path for path in given if path not in folders)
        raise DataError(
            f"{file} is a file but {folders[0]} a folder; give all files or all folders"
        )
    if folders:
        return find_pairs(pre, post, labels)
    return [PairFiles(pre.stem, pre, post, labels)]


def _checked_size(files: PairFiles) -> tuple[int, int]:
    """Height and width of a pair, from the files' headers, before anything is computed."""
    size = images.image_size(files.pre)
    for other in (files.post, files.label):
        if other is not None:
            images.check_same_size(files.pre, size, other, images.image_size(other))
    return size


def _read(files: PairFiles) -> dict[str, Any]:
    pre, post = images.load_pair(files.pre, files.post)
    label = None if files.label is None else images.load_label(files.label)
    return {"pre": pre, "post": post, "label": label, "name": files.name}


def _outputs(
    sample: Any, probability: np.ndarray, mask: np.ndarray
) -> dict[str, Callable[[Path], Any]]:
    pre, post, label, name = (sample[key] for key in ("pre", "post", "label", "name"))
    pictures = {
        "mask": Image.fromarray(mask * np.uint8(255)),
        "probability": Image.fromarray(np.round(probability * 65535).astype(np.uint16)),
        "panels": four_panel(pre, post, probability, mask, label, name=name),
    }
    return {f"{name}_{kind}.png": partial(p.save, format="PNG") for kind, p in pictures.items()}


def _print(rows: list[dict[str, Any]], threshold: float, output: Path) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("image pair", overflow="fold")
    table.add_column("pixels", justify="right")
    table.add_column("detected change", justify="right")
    for row in rows:
        size = f"{row['width']} x {row['height']}"
        table.add_row(escape(row["name"]), size, f"{row['changed_share']:.2%}")
    console = Console()
    console.print(table)
    console.print(
        f"Threshold {threshold:.3f}. Masks, probabilities and panels are in {output}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
