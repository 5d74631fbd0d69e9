"""Sources of labelled image pairs: sequences of `Pair`s in a fixed order.

A source does not shuffle, crop or augment; `zzhnet_jax.data.pipeline` does. Names, sizes and
counterparts are checked when a source is made, from directory listings and file headers; what only
the pixels can show is reported, by file, when a pair is read.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zzhnet_jax.data import images
from zzhnet_jax.data.config import DataConfig, Split, check_split
from zzhnet_jax.data.layout import PairFiles, find_split, split_names
from zzhnet_jax.data.pairs import Pair, PairInfo, Source
from zzhnet_jax.data.synthetic import SyntheticSource
from zzhnet_jax.errors import ConfigError

__all__ = [
    "CachedSource",
    "FolderSource",
    "JoinedSource",
    "Pair",
    "PairInfo",
    "Source",
    "open_source",
]


class FolderSource:
    """Pairs in the LEVIR layout.

    Either `root/A`, `root/B` and `root/label`, with `root/list/<split>.txt` naming the pairs of a
    split one a line; or the same three folders under `root/<split>`, where a list may narrow the
    selection. Files belong together by name; their suffixes may differ. A root with neither lists
    nor split folders is one set, which every split then means.
    """

    def __init__(self, root: str | Path, split: Split) -> None:
        """Finds the pairs and checks that they are complete and that their sizes agree.

        Args:
          root: the dataset's folder.
          split: "train", "val" or "test".

        Raises:
          DataError: the root, a folder, a counterpart or a listed pair is missing, sizes differ, or
            the split is empty.
        """
        check_split(split)
        self.files = find_split(Path(root), split)
        if split == "val" and not split_names(Path(root)):
            logging.getLogger(__name__).warning(
                "%s has neither lists nor split folders, so that every split is the whole of it "
                "and validation sees the training pairs; write list/train.txt and list/val.txt",
                root,
            )
        self.info = [_inspect(files) for files in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Pair:
        files = self.files[index]
        assert files.label is not None
        pre, post = images.load_pair(files.pre, files.post)
        label = images.load_label(files.label)
        return {"pre": pre, "post": post, "label": label, "name": files.name}


class JoinedSource:
    """The pairs of several sources, one source after another."""

    def __init__(self, sources: Sequence[Source]) -> None:
        """Joins `sources`, whose names must not overlap."""
        self._sources = sources
        self._ends = list(itertools.accumulate(len(source) for source in sources))
        self.info = [info for source in sources for info in source.info]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Pair:
        index = range(len(self))[index]
        which = bisect.bisect_right(self._ends, index)
        return self._sources[which][index - self._ends[which]]


class CachedSource:
    """Keeps what another source has read, as far as memory goes; the rest is read each time.

    Nothing is dropped for something else: pairs are drawn in random order, so that none of them is
    more likely than another to be needed soon.
    """

    def __init__(self, source: Source, capacity_bytes: int) -> None:
        """Wraps `source`.

        Args:
          source: what is read from.
          capacity_bytes: bytes of pixels to keep at most.
        """
        self._source = source
        self._capacity = self._free = capacity_bytes
        self._kept: dict[int, Pair] = {}

    @property
    def info(self) -> Sequence[PairInfo]:
        """As the wrapped source has it."""
        return self._source.info

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Pair:
        index = range(len(self))[index]
        pair = self._kept.get(index)
        if pair is None:
            pair = self._source[index]
            arrays = (pair["pre"], pair["post"], pair["label"])
            needed = sum(array.nbytes for array in arrays)
            if needed <= self._free:
                self._free -= needed
                for array in arrays:
                    array.flags.writeable = False  # it is handed out again
                self._kept[index] = pair
        return pair.copy()

    def __getstate__(self) -> dict[str, Any]:
        # A worker process starts with an empty cache rather than a copy of this one.
        return {**self.__dict__, "_kept": {}, "_free": self._capacity}


def open_source(config: DataConfig, split: Split) -> Source:
    """Opens a split of the configured source, cached in memory as far as `cache_megabytes` goes.

    Args:
      config: the data section of an experiment.
      split: "train", "val" or "test".

    Raises:
      ConfigError: a folder source has no `root`.
      DataError: the folder is not a usable dataset.
    """
    source: Source
    if config.source == "synthetic":
        source = SyntheticSource(config.synthetic, split)
    elif config.root is None:
        raise ConfigError(
            "data.root",
            None,
            "the folder that holds A, B and label, or train, val and test with those in them",
        )
    else:
        source = FolderSource(config.root, split)
        if split == "train" and config.rendered_pairs:
            scenes = dataclasses.replace(config.synthetic, train_pairs=config.rendered_pairs)
            source = JoinedSource([source, SyntheticSource(scenes, split)])
    return CachedSource(source, config.cache_megabytes * 2**20)


def _inspect(files: PairFiles) -> PairInfo:
    assert files.label is not None
    height, width = images.image_size(files.pre)
    for other in (files.post, files.label):
        images.check_same_size(files.pre, (height, width), other, images.image_size(other))
    sizes = [path.stat().st_size for path in (files.pre, files.post, files.label)]
    return PairInfo(files.name, height, width, "/".join(map(str, sizes)))
