"""`zzhnet models`: what each network costs."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from zzhnet_jax.errors import ConfigError
from zzhnet_jax.models import registry
from zzhnet_jax.models.cost import Cost, network_cost

from .arguments import Switch, parse

_LEGEND = """\
Parameters: all trained values; published counts of VMamba's relatives leave out those of the scan.
Multiply-adds: of convolutions and matrix products alone, which papers call FLOPs.
FLOPs: every operation, two a multiply-add, the selective scan counted step by step.
Activations: what a float32 training step keeps for one sample, before the compiler fuses."""


@dataclass(frozen=True)
class ModelsArguments:
    """Lists the networks with their parameters, operations and activation memory.

    Attributes:
      names: networks, or beginnings of their names; all of them if none is given.
      size: height and width of the images.
      json: print JSON instead of a table.
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    size: int = 256
    json: Switch = False


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    arguments = parse(ModelsArguments, argv, prog="zzhnet models")
    if arguments.size < 1:
        raise ConfigError("--size", arguments.size, "at least 1")
    every = registry.list_models()
    for name in arguments.names:
        if not any(known.startswith(name) for known in every):
            registry.preset(name)  # raises, with the names that are close
    chosen = [n for n in every if not arguments.names or n.startswith(arguments.names)]
    costs = {n: network_cost(n, height=arguments.size, width=arguments.size) for n in chosen}
    if arguments.json:
        print(json.dumps({name: asdict(cost) for name, cost in costs.items()}, indent=2))
    else:
        _print_table(costs, arguments.size)
    return 0


def _print_table(costs: dict[str, Cost], size: int) -> None:
    table = Table(title=f"one pair of {size}x{size} images (one image for classifiers)")
    table.add_column("network")
    for heading in ("parameters, M", "multiply-adds, G", "FLOPs, G", "activations, MB"):
        table.add_column(heading, justify="right")
    for name, cost in costs.items():
        table.add_row(
            name,
            f"{cost.parameters / 1e6:.2f}",
            f"{cost.macs / 1e9:.2f}",
            f"{cost.flops / 1e9:.2f}",
            f"{cost.activation_bytes / 1e6:.0f}",
        )
    console = Console()
    console.print(table)
    console.print(_LEGEND, highlight=False, soft_wrap=True)
