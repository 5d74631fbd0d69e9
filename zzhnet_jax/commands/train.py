"""`zzhnet train`: an experiment file, with any of its fields replaced on the command line."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from zzhnet_jax.aot.targets import TARGETS_HELP
from zzhnet_jax.errors import ConfigError
from zzhnet_jax.models import registry
from zzhnet_jax.training.config import DistributedConfig, ExperimentConfig, load_config

from .arguments import ArgumentError, Switch, option, parse

_OVERRIDES = "--model.overrides."


@dataclasses.dataclass(frozen=True)
class TrainArguments(ExperimentConfig):
    """Trains a network, or goes on with a run that was interrupted.

    Give an experiment file and replace any of its fields by path, for example --train.steps 2000
    --data.root photos. Fields of the network itself are replaced by --model.overrides.FIELD VALUE;
    several values are separated by commas.

    Attributes:
      config: the experiment file, for example configs/zzhnet_nano_synthetic.py.
      distributed: how several processes find each other.
      dry_run: train nothing and read no data: compile the training step, and print how parameters
        are split, what each device needs and sends, and the least time a step can take. Ends with
        exit code 1 if it does not fit.
      target: with --dry-run, compile for these accelerators, which need not be here, for example
        TARGETS.
      json: with --dry-run, print one JSON object.
      profile: write a trace of this many steps to the run folder, for TensorBoard or Perfetto; it
        begins after the first steps, which are not typical.
    """

    config: str | None = None
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    dry_run: Switch = False
    target: Annotated[str | None, option("TARGET")] = None
    json: Switch = False
    profile: int = 0


_OPTIONS = ("config", "distributed", "dry_run", "target", "json", "profile")
TrainArguments.__doc__ = (TrainArguments.__doc__ or "").replace("TARGETS", TARGETS_HELP)


def main(argv: Sequence[str], *, prog: str = "zzhnet train") -> int:
    """Runs the command; returns its exit code."""
    config, given = read_arguments(argv, prog=prog)
    if given.dry_run:
        from . import dry_run

        return dry_run.main(config, target=given.target, as_json=given.json)
    for flag in ("target", "json"):
        if getattr(given, flag):
            raise ArgumentError(f"--{flag} goes with --dry-run; see {prog} --help")
    if given.profile < 0:
        raise ConfigError("--profile", given.profile, "a number of steps, at least 0")
    from zzhnet_jax.training.loop import train
    from zzhnet_jax.training.processes import connect

    connect(given.distributed)
    train(config, profile=given.profile)
    return 0


def read_experiment(argv: Sequence[str], *, prog: str) -> ExperimentConfig:
    """The experiment that a command line describes.

    Raises:
      UserError: the file, a field or a value is wrong.
    """
    return read_arguments(argv, prog=prog)[0]


def read_arguments(argv: Sequence[str], *, prog: str) -> tuple[ExperimentConfig, TrainArguments]:
    """The experiment that a command line describes, and what to do with it.

    Raises:
      UserError: the file, a field or a value is wrong.
    """
    overrides, argv = _split_overrides(argv)
    path = _value_of("--config", argv)
    base = load_config(path) if path else ExperimentConfig()
    default = TrainArguments(**_fields(base), config=path)
    given = parse(TrainArguments, argv, prog=prog, default=default)
    values = {name: value for name, value in _fields(given).items() if name not in _OPTIONS}
    config = ExperimentConfig(**values)
    if not overrides:
        return config, given
    spec = config.model
    network = _override_network(spec.name, spec.overrides, overrides, prog=prog)
    model = dataclasses.replace(spec, overrides=network)
    return dataclasses.replace(config, model=model), given


def _override_network(
    name: str, known: Mapping[str, Any], tokens: Sequence[str], *, prog: str
) -> dict[str, Any]:
    """Adds overrides from the command line, read by the types of the network's own config."""
    preset = registry.override(registry.preset(name), known)
    inner = dataclasses.make_dataclass("Network", [("overrides", type(preset))], frozen=True)
    outer = dataclasses.make_dataclass("NetworkArguments", [("model", inner)], frozen=True)
    try:
        network = parse(outer, tokens, prog=prog, default=outer(inner(preset))).model.overrides
    except ConfigError as error:
        path = _OVERRIDES.strip("-") + error.field
        raise ConfigError(path, error.value, error.allowed) from None
    changed = {
        field: value for field, value in _fields(network).items() if value != getattr(preset, field)
    }
    return dict(known) | changed


def _fields(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates `--model.overrides.*` with their values, commas resolved, from everything else."""
    overrides: list[str] = []
    others: list[str] = []
    current = others
    for token in argv:
        if token.startswith("--"):
            current = overrides if token.startswith(_OVERRIDES) else others
            flag, equals, value = token.partition("=")
            if current is overrides and equals:
                overrides += [flag, *value.split(",")]
                continue
        current += token.split(",") if current is overrides else [token]
    return overrides, others


def _value_of(flag: str, argv: Sequence[str]) -> str | None:
    """What follows the last `flag`."""
    value = None
    for token, following in itertools.zip_longest(argv, argv[1:]):
        if token.startswith(f"{flag}="):
            value = token.partition("=")[2]
        elif token == flag:
            value = following
    return value
