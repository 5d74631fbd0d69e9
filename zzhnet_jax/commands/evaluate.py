"""`zzhnet evaluate`: scores a trained network on labelled image pairs."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zzhnet_jax.data.config import DataConfig, SourceKind, Split
from zzhnet_jax.data.sources import Source, open_source
from zzhnet_jax.evaluation import change_mask, evaluate_predictions
from zzhnet_jax.inference.pictures import four_panel
from zzhnet_jax.inference.predictor import Predictor

from .arguments import Switch, option, parse
from .shared import PredictorArguments, progress, read_data_config, write_files

_HEADINGS = {
    "changed_share": "changed",
    "f1": "F1",
    "iou": "IoU",
    "precision": "precision",
    "recall": "recall",
    "oa": "OA",
    "kappa": "kappa",
}
_PER_IMAGE = ("changed_share", "f1", "iou", "precision", "recall")


@dataclasses.dataclass(frozen=True)
class EvaluatedData:
    """The images to score; unless given, those that the run was trained with.

    Attributes:
      root: folder that holds A, B and label, or train, val and test with those in them.
      source: "folder" reads the root; "synthetic" renders the run's scenes.
    """

    root: Annotated[str | None, option("DIR")] = None
    source: Annotated[SourceKind | None, option("{folder,synthetic}")] = None

    def resolve(self, trained: DataConfig) -> DataConfig:
        """The run's own data section with what was given in its place."""
        source = self.source or ("folder" if self.root else trained.source)
        return dataclasses.replace(trained, source=source, root=self.root or trained.root)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateArguments(PredictorArguments):
    """Scores a trained network on labelled image pairs.

    All figures are of the changed class and of all pixels pooled. Images whose names begin with
    the same word (up to an underscore) form a group.

    Attributes:
      data: the images to score; unless given, those that the run was trained with.
      split: which part of them.
      per_group: also pool the figures of each group of images.
      pictures: folder for one picture of every pair, compared with its label.
    """

    data: EvaluatedData = EvaluatedData()
    split: Split = "test"
    per_group: Switch = False
    pictures: Annotated[Path | None, option("DIR")] = None


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    arguments = parse(EvaluateArguments, argv, prog="zzhnet evaluate")
    config = arguments.data.resolve(read_data_config(arguments.run))
    source = open_source(config, arguments.split)
    model = arguments.load()
    predictor = arguments.predictor(model, [(info.height, info.width) for info in source.info])
    threshold = model.card.threshold if arguments.threshold is None else arguments.threshold
    with progress(len(source), quiet=arguments.json) as advance:
        judged = _judged(predictor, source, threshold, arguments.pictures)
        report = evaluate_predictions((advance() or item for item in judged), threshold=threshold)
    facts = {
        "run": str(arguments.run),
        "data": config.root if config.source == "folder" else "synthetic",
        "split": arguments.split,
        "threshold_from": "model" if arguments.threshold is None else "command line",
    }
    result = facts | report.to_json(per_group=arguments.per_group)
    if arguments.json:
        print(json.dumps(result, allow_nan=False))
    else:
        _print(result, Console())
    return 0


def _judged(
    predictor: Predictor, source: Source, threshold: float, pictures: Path | None
) -> Iterator[tuple[np.ndarray, np.ndarray, str]]:
    """Probability, label and name of every pair; draws each if asked to."""
    samples = (source[index] for index in range(len(source)))
    for sample, probability in predictor.stream(samples):
        label, name = sample["label"], sample["name"]
        if pictures is not None:
            mask = change_mask(probability, threshold)
            picture = four_panel(sample["pre"], sample["post"], probability, mask, label, name=name)
            write_files(pictures, {f"{name}.png": picture.save})
        yield probability, label, name


def _print(result: Mapping[str, Any], console: Console) -> None:
    """Tables of images, groups and everything, then what must be known to read them."""
    console.print(_table("image", {row["name"]: row for row in result["per_image"]}, _PER_IMAGE))
    everything = {"all pixels": result["metrics"] | {"changed_share": result["changed_share"]}}
    console.print(_table("pooled", result.get("groups", {}) | everything, _HEADINGS))
    origin = "as given"
    if result["threshold_from"] == "model":
        origin = "stored with the model; training chooses it on the validation images"
    best = result["best_on_these_images"]
    lines = [
        f"{result['images']} pairs of {result['data']}, split {result['split']}.",
        f"Threshold {result['threshold']:.3f}, {origin}.",
    ]
    lines += [f"No {_HEADINGS[name]}: {why}." for name, why in result["undefined"].items()]
    if best["f1"] is not None:
        lines.append(
            f"For comparison only: the best threshold on these very images would be"
            f" {best['threshold']:.3f}, with F1 {best['f1']:.4f}."
        )
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _table(
    first: str, rows: Mapping[str, Mapping[str, float | None]], columns: Iterable[str]
) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    for key in columns:
        table.add_column(_HEADINGS[key], justify="right")
    for name, figures in rows.items():
        table.add_row(escape(name), *(_cell(key, figures[key]) for key in columns))
    return table


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if key == "changed_share" else f"{value:.4f}"
