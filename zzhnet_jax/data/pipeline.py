"""Turns a source into an endless, seeded and exactly resumable stream of training batches.

The stream is one fixed sequence of examples: epoch after epoch, each in its own shuffled order,
each example augmented by a generator seeded with its position. Every batch is dealt out in blocks,
one a process, and workers take turns at whole batches, so that neither their number nor an
interruption changes what is in it, or in which order.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from zzhnet_jax.data.config import AugmentConfig, DataConfig
from zzhnet_jax.data.pairs import Pair, Source
from zzhnet_jax.data.transforms import augment, crop_too_large, normalize
from zzhnet_jax.errors import ConfigError, DataError

if TYPE_CHECKING:
    import grain

__all__ = ["Batch", "TrainingBatches", "fingerprint", "normalize", "training_batches"]

# Two streams of random numbers from one seed: the order of the examples and their augmentation.
_ORDER, _AUGMENT = 0, 1


class Batch(TypedDict):
    """What a training step takes.

    `pre` and `post` are normalised, float32 (b, crop, crop, 3); `label` is int32 (b, crop, crop)
    in {0, 1, 255 = ignore}; `name` holds b names.
    """

    pre: np.ndarray
    post: np.ndarray
    label: np.ndarray
    name: list[str]


def fingerprint(source: Source) -> str:
    """Hashes the names and sizes of all pairs, in order.

    Args:
      source: pairs, of which no pixels are read.

    Returns:
      16 hexadecimal digits that differ if files were exchanged, added or removed.
    """
    digest = hashlib.sha256()
    for info in source.info:
        digest.update(f"{info.name}\t{info.height}\t{info.width}\t{info.identity}\n".encode())
    return digest.hexdigest()[:16]


def training_batches(
    source: Source,
    config: DataConfig,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainingBatches:
    """Opens the endless stream of training batches of one process.

    Args:
      source: labelled pairs.
      config: crop, batch and augmentation; `batch_size` is that of all processes together.
      seed: order and augmentation follow from it.
      process_index: which share of every global batch, in order, this process takes.
      process_count: number of shares.

    Returns:
      An iterator over `Batch`es of `batch_size / process_count` examples.

    Raises:
      ConfigError: an image is smaller than the crop, or the batch cannot be shared out evenly.
    """
    if config.batch_size % process_count:
        raise ConfigError(
            "data.batch_size", config.batch_size, f"a multiple of the {process_count} processes"
        )
    if not config.augmentation.pad:
        for info in source.info:
            if min(info.height, info.width) < config.crop_size:
                raise crop_too_large(config.crop_size, info.name, (info.height, info.width))
    return TrainingBatches(source, config, seed, process_index, process_count)


class TrainingBatches(Iterator[Batch]):
    """An endless iterator over batches that can go on from where another one was."""

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        seed: int,
        process_index: int,
        process_count: int,
    ) -> None:
        """Use `training_batches`, which checks the arguments."""
        self._source, self._config, self._seed = source, config, seed
        self._process_index, self._process_count = process_index, process_count
        self._fingerprint = fingerprint(source)
        self._position = 0  # batches handed out
        self._iterator: grain.DatasetIterator[Batch] | None = None

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._start(self._position)
        batch = next(self._iterator)
        self._position += 1
        if self._config.workers:
            # These are views of shared memory that is gone when the workers are.
            for key in ("pre", "post", "label"):
                batch[key] = np.array(batch[key])
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position in the stream, ready for JSON."""
        return {
            "examples": self._position * self._config.batch_size,
            "seed": self._seed,
            "fingerprint": self._fingerprint,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues from a position that `get_state` gave.

        The number of workers and of processes may differ from what it was then.

        Args:
          state: what `get_state` returned.

        Raises:
          DataError: the data, the seed or the batch size is not the one of that run, so that it
            cannot be continued exactly.
        """
        mine = self.get_state()
        for key in ("seed", "fingerprint"):
            if state[key] != mine[key]:
                raise DataError(
                    f"the {_STATE_WORDS[key]} is not the one this run began with "
                    f"({state[key]} then, {mine[key]} now); restore it or use another run_dir"
                )
        if state["examples"] % self._config.batch_size:
            raise DataError(
                f"data.batch_size = {self._config.batch_size} does not divide the "
                f"{state['examples']} examples seen so far; restore it or use another run_dir"
            )
        self.close()
        self._position = state["examples"] // self._config.batch_size

    def close(self) -> None:
        """Stops the threads and worker processes; the next batch would start them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _start(self, position: int) -> grain.DatasetIterator[Batch]:
        # Imported here because grain imports jax, which reading images does not need.
        import grain
        from absl import flags

        # grain's worker processes ask for absl flags, which only programs run by absl have parsed.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        config = self._config
        order_seed = int(np.random.SeedSequence((self._seed, _ORDER)).generate_state(1)[0])
        examples = (
            grain.MapDataset.source(self._source)
            .shuffle(order_seed)
            .repeat()
            .map_with_index(_Augment(config.crop_size, config.augmentation, self._seed))
        )
        share = config.batch_size // self._process_count
        dataset = (
            grain.MapDataset.source(
                _Share(examples, config.batch_size, self._process_index * share, share)
            )
            .batch(share, batch_fn=_Stack(config.mean, config.std))
            .slice(slice(position, None))
        )
        threads = 0 if config.workers else 1
        reading = grain.ReadOptions(
            num_threads=threads, prefetch_buffer_size=config.prefetch * threads
        )
        batches = dataset.to_iter_dataset(reading)
        if config.workers:
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=config.workers, per_worker_buffer_size=config.prefetch
                )
            )
        return iter(batches)


_STATE_WORDS = {"seed": "seed", "fingerprint": "training data"}


@dataclasses.dataclass(frozen=True)
class _Augment:
    """Augments the example at a position of the stream with a generator seeded by that position."""

    crop_size: int
    config: AugmentConfig
    seed: int

    def __call__(self, position: int, pair: Pair) -> Pair:
        pre, post, label = augment(
            pair["pre"],
            pair["post"],
            pair["label"],
            name=pair["name"],
            crop_size=self.crop_size,
            config=self.config,
            rng=np.random.default_rng((self.seed, _AUGMENT, position)),
        )
        return {"pre": pre, "post": post, "label": label, "name": pair["name"]}


@dataclasses.dataclass(frozen=True)
class _Share:
    """Of every `batch` examples, the `size` that begin at `first`."""

    examples: Sequence[Pair]
    batch: int
    first: int
    size: int

    def __len__(self) -> int:
        return len(self.examples) // self.batch * self.size

    def __getitem__(self, index: int) -> Pair:
        number, place = divmod(index, self.size)
        return self.examples[number * self.batch + self.first + place]


@dataclasses.dataclass(frozen=True)
class _Stack:
    """Stacks and normalises examples."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, pairs: list[Pair]) -> Batch:
        return {
            "pre": np.stack([normalize(pair["pre"], self.mean, self.std) for pair in pairs]),
            "post": np.stack([normalize(pair["post"], self.mean, self.std) for pair in pairs]),
            "label": np.stack([pair["label"] for pair in pairs]).astype(np.int32),
            "name": [pair["name"] for pair in pairs],
        }
