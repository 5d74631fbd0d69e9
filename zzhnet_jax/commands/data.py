"""`zzhnet data`: checks a dataset before training, and writes rendered ones."""

from __future__ import annotations

import dataclasses
import json as json_module
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zzhnet_jax.commands.arguments import ArgumentError, Switch, parse
from zzhnet_jax.data.checks import DatasetReport, check_dataset
from zzhnet_jax.data.config import SyntheticConfig
from zzhnet_jax.data.synthetic import write_dataset
from zzhnet_jax.errors import DataError

_USAGE = """usage: zzhnet data {check,synth} ...

Datasets of image pairs: folders A (earlier images), B (later images) and label,
directly or under train, val and test.

  check ROOT   read every file of a dataset and list what is wrong with it
  synth OUT    write a dataset of rendered scenes

zzhnet data check --help and zzhnet data synth --help tell more."""


@dataclasses.dataclass(frozen=True)
class CheckArguments:
    """Reads every file of a dataset and lists what is wrong with it.

    The exit code is 2 if anything is.

    Attributes:
      root: the dataset's folder, which holds A, B and label, or train, val and test with those in
        them.
      json: print one JSON object instead of a table.
    """

    root: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="ROOT")]
    json: Switch = False


@dataclasses.dataclass(frozen=True)
class SynthArguments:
    """Writes rendered image pairs with labels as PNG files, in folders train, val and test.

    Attributes:
      out: the folder to write to; it must be empty or not exist yet.
      pairs: number of training pairs; a quarter as many are written for validation and for test.
      size: height and width of the images in pixels.
      seed: another seed gives other scenes.
      change: how much changes between the dates, from 0 to 1.
      nuisance: strength of what differs without being change, from 0 to 2.
    """

    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    pairs: int = 64
    size: int = 256
    seed: int = 0
    change: float = SyntheticConfig.change
    nuisance: float = SyntheticConfig.nuisance


def main(argv: Sequence[str]) -> int:
    """Runs `zzhnet data`; returns the exit code."""
    commands = {"check": _check, "synth": _synth}
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if argv else 2
    if argv[0] not in commands:
        raise ArgumentError(f"zzhnet data has no command {argv[0]!r}; it has check and synth")
    return commands[argv[0]](argv[1:])


def _check(argv: Sequence[str]) -> int:
    arguments = parse(CheckArguments, argv, prog="zzhnet data check")
    report = check_dataset(arguments.root)
    if arguments.json:
        print(json_module.dumps(report.to_json()))
    else:
        _print_report(report, Console())
    return 0 if report.ok else 2


def _print_report(report: DatasetReport, console: Console) -> None:
    table = Table(title=escape(report.root))
    for column in ("split", "pairs", "size", "changed pixels", "pairs without change"):
        table.add_column(column, justify="left" if column in ("split", "size") else "right")
    for name, split in report.splits.items():
        sizes = ", ".join(split.sizes) if len(split.sizes) <= 3 else f"{len(split.sizes)} sizes"
        share = f"{split.change_share:.1%}"
        table.add_row(name, str(split.pairs), sizes, share, str(split.pairs_without_change))
    if report.splits:
        console.print(table)
    first = next(iter(report.splits.values()), None)
    if first is not None:
        console.print(
            f"of the first split: --data.mean {_flag(first.mean)} --data.std {_flag(first.std)}"
        )
    for remark in report.remarks:
        console.print(f"note: {remark}", markup=False, highlight=False, soft_wrap=True)
    for problem in report.problems:
        console.print(f"problem: {problem}", markup=False, highlight=False, soft_wrap=True)
    if report.ok:
        console.print("no problems found")


def _flag(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.2f}" for value in values)


def _synth(argv: Sequence[str]) -> int:
    arguments = parse(SynthArguments, argv, prog="zzhnet data synth")
    fewer = max(1, arguments.pairs // 4)
    config = SyntheticConfig(
        size=arguments.size,
        train_pairs=arguments.pairs,
        val_pairs=fewer,
        test_pairs=fewer,
        seed=arguments.seed,
        change=arguments.change,
        nuisance=arguments.nuisance,
    )
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise DataError(f"{arguments.out}: exists and is not an empty folder; choose another")
    write_dataset(config, arguments.out)
    print(f"{arguments.pairs} + {fewer} + {fewer} pairs written to {arguments.out}")
    return 0
