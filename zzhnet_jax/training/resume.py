"""Whether a run may go on from a checkpoint under the config it is given now."""

from collections.abc import Iterator, Mapping
from typing import Any

from zzhnet_jax.errors import CheckpointError

from .checkpoints import Progress
from .config import ExperimentConfig

# Where a run is kept or computed, as opposed to what it computes.
_INCIDENTAL = (
    "run_dir",
    "train.compilation_cache",
    "train.log_every",
    "train.pictures",
    "data.workers",
    "data.prefetch",
    "data.cache_megabytes",
)


def check_resumable(
    progress: Progress, config: ExperimentConfig, network: Mapping[str, Any], *, where: str
) -> list[str]:
    """Compares the config of a checkpoint with today's.

    The data, the seed and the batch size are compared by the data iterator itself.

    Args:
      progress: from the checkpoint.
      config: today's experiment.
      network: the resolved config of today's network.
      where: the checkpoint, for the message.

    Returns:
      What has changed and will take effect from here on, as "field: then -> now".

    Raises:
      CheckpointError: the checkpoint is of another network, or one of the two keeps an average of
        the weights and the other does not.
    """
    now = config.to_json()
    changes = changed_fields(progress.config, now)
    model = {path: pair for path, pair in changes.items() if path.startswith("model.")}
    model |= changed_fields(progress.network, network)
    if model:
        raise CheckpointError(
            f"{where}: belongs to another network ({_list(model, 3)}); restore these fields or"
            " choose another --run-dir"
        )
    decays = changes.get("optim.ema_decay", (1, 1))
    if bool(decays[0]) != bool(decays[1]):
        raise CheckpointError(
            f"{where}: the moving average of the weights cannot be turned on or off midway"
            f" (optim.ema_decay: {decays[0]} -> {decays[1]}); restore it or choose another"
            " --run-dir"
        )
    return [_show(*item) for item in changes.items() if item[0] not in _INCIDENTAL]


def changed_fields(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Paths at which two nested configs differ, with both values (None where there is none)."""
    old, new = dict(_leaves(then)), dict(_leaves(now))
    paths = [*old, *(path for path in new if path not in old)]
    pairs = {path: (old.get(path), new.get(path)) for path in paths}
    return {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _show(path: str, pair: tuple[Any, Any]) -> str:
    return f"{path}: {pair[0]} -> {pair[1]}"


def _list(changes: Mapping[str, tuple[Any, Any]], most: int) -> str:
    shown = [_show(*item) for item in list(changes.items())[:most]]
    rest = len(changes) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")
