"""Labelled pairs without any files: scenes rendered at two dates.

Buildings, roads, ponds, woods and building sites come and go, which is change; sun, shadows,
season, light, haze, blur, noise, misregistration and cars differ too, which is not. The label is
where the object on top differs between the dates.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from zzhnet_jax.data.config import SPLITS, Split, SyntheticConfig, check_split
from zzhnet_jax.data.landscape import invent_scene
from zzhnet_jax.data.layout import LABEL, POST, PRE
from zzhnet_jax.data.pairs import Pair, PairInfo
from zzhnet_jax.data.render import Painter, draw_conditions
from zzhnet_jax.errors import DataError


class SyntheticSource:
    """Rendered pairs; a pair depends on the seed, the split and its index alone."""

    def __init__(self, config: SyntheticConfig, split: Split, seed: int | None = None) -> None:
        """Prepares a split; nothing is rendered yet.

        Args:
          config: size, number and kind of the scenes.
          split: "train", "val" or "test"; the splits share no scene.
          seed: takes the place of `config.seed` if given.
        """
        check_split(split)
        self._config, self._split = config, split
        self._seed = config.seed if seed is None else seed
        self._length: int = getattr(config, f"{split}_pairs")

    @property
    def info(self) -> Sequence[PairInfo]:
        """What is known about every pair without rendering it."""
        config = self._config
        identity = f"seed {self._seed} change {config.change:g} nuisance {config.nuisance:g}"
        return [
            PairInfo(self._name(index), config.size, config.size, identity)
            for index in range(len(self))
        ]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Pair:
        index = range(len(self))[index]
        config = self._config
        rng = np.random.default_rng((self._seed, SPLITS.index(self._split), index))
        painter = Painter(invent_scene(rng, config.size, config.change), rng)
        before, after = draw_conditions(rng, config.nuisance)
        label = painter.owners(0) != painter.owners(1)
        return {
            "pre": painter.paint(0, before),
            "post": painter.paint(1, after),
            "label": label.astype(np.uint8),
            "name": self._name(index),
        }

    def _name(self, index: int) -> str:
        return f"{self._split}_{index:05d}"


def write_dataset(config: SyntheticConfig, folder: Path) -> None:
    """Writes all three splits as PNG files in the LEVIR layout, labels as 0 and 255.

    Args:
      config: what to render.
      folder: gets `train`, `val` and `test`, each with `A`, `B` and `label`.

    Raises:
      DataError: a file cannot be written.
    """
    try:
        for split in SPLITS:
            for part in (PRE, POST, LABEL):
                (folder / split / part).mkdir(parents=True, exist_ok=True)
            source = SyntheticSource(config, split)
            for index in range(len(source)):
                pair = source[index]
                file = f"{pair['name']}.png"
                Image.fromarray(pair["pre"]).save(folder / split / PRE / file)
                Image.fromarray(pair["post"]).save(folder / split / POST / file)
                Image.fromarray(pair["label"] * np.uint8(255)).save(folder / split / LABEL / file)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be written to ({error.strerror}); choose another"
        ) from None
