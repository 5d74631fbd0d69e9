"""What `zzhnet evaluate` and `zzhnet predict` have in common."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from zzhnet_jax.data.config import DataConfig
from zzhnet_jax.errors import CheckpointError, ConfigError, DataError
from zzhnet_jax.inference.predictor import ChangeNetwork, Predictor
from zzhnet_jax.inference.tiling import fit_tile
from zzhnet_jax.models.io import config_from_dict, load_model
from zzhnet_jax.training.config import TrainConfig
from zzhnet_jax.training.environment import enable_compilation_cache

from .arguments import Switch, option

_SMALLEST_TILE = 256


@dataclass(frozen=True, kw_only=True)
class PredictorArguments:
    """How the network is run.

    Attributes:
      run: run folder of `zzhnet train`, or a folder with a saved model.
      threshold: least probability of a changed pixel; unless given, the one stored with the model,
        which training chose on the validation images.
      tile_size: side of the tiles that larger images are cut into; unless given, the crop size of
        training, at least 256.
      overlap: least number of pixels that neighbouring tiles share; unless given, a quarter tile.
      batch_size: tiles that each device computes at a time; fewer need less memory.
      flips: average over four flips of the images (4 times the work).
      exchange_dates: average over both orders of the dates (twice the work).
      json: print one JSON object instead of tables.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    threshold: Annotated[float | None, option("P")] = None
    tile_size: Annotated[int | None, option("PIXELS")] = None
    overlap: Annotated[int | None, option("PIXELS")] = None
    batch_size: int = 4
    flips: Switch = False
    exchange_dates: Switch = False
    json: Switch = False

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ConfigError("threshold", self.threshold, "between 0 and 1")

    def load(self) -> ChangeNetwork:
        """Reads the network, and lets compiled programs be found again."""
        enable_compilation_cache(TrainConfig().compilation_cache)
        return load_model(self.run)

    def predictor(self, model: ChangeNetwork, shapes: Iterable[Sequence[int]]) -> Predictor:
        """A predictor for images of these (height, width)."""
        tile = self.tile_size
        if tile is None:
            tile = max(_SMALLEST_TILE, read_data_config(self.run).crop_size)
        overlap = tile // 4 if self.overlap is None else self.overlap
        tile, overlap = fit_tile(shapes, tile, overlap)
        return Predictor(
            model,
            tile_size=tile,
            overlap=overlap,
            batch_size=self.batch_size,
            flips=self.flips,
            exchange_dates=self.exchange_dates,
            devices=jax.local_devices(),
        )


def read_data_config(run: Path) -> DataConfig:
    """The data section of a run's config.json; the defaults where `run` is only a saved model.

    Raises:
      CheckpointError: config.json is damaged or of another version.
    """
    path = run / "config.json"
    try:
        data = json.loads(path.read_text()).get("data") if path.is_file() else None
        return DataConfig() if data is None else config_from_dict(DataConfig, data)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); restore the file") from None


@contextmanager
def progress(total: int, *, quiet: bool) -> Iterator[Callable[[], None]]:
    """Shows a bar on a terminal; gives a function to call when one more is done."""
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    hidden = quiet or not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, transient=True) as bar:
        task = bar.add_task("image pairs", total=total)
        yield lambda: bar.advance(task)


def write_files(folder: Path, files: dict[str, Callable[[Path], Any]]) -> list[Path]:
    """Writes files that appear whole or not at all, and only once all of them could be written.

    Args:
      folder: made if missing.
      files: name -> function that writes the file at the path it is given.

    Returns:
      The paths written.

    Raises:
      DataError: they cannot be written, for example because the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".unfinished-") as temporary:
            for name, write in files.items():
                write(Path(temporary) / name)
            return [(Path(temporary) / name).replace(folder / name) for name in files]
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"{folder}: cannot be written ({reason}); free space or choose another folder"
        ) from None
