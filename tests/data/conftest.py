"""Small datasets on disk and in memory."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zzhnet_jax.data.pairs import PairInfo


def save(path: Path, array: np.ndarray) -> Path:
    """Writes an array as an image, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


@pytest.fixture(name="save")
def save_fixture():
    return save


@pytest.fixture
def write_pair():
    """Writes a random pair, and a label with values 0 and `high`, and returns the arrays."""

    def write(folder: Path, name: str, size=(24, 32), high=255, seed=0):
        rng = np.random.default_rng(seed)
        pre, post = rng.integers(0, 256, (2, *size, 3), np.uint8)
        changed = rng.random(size) < 0.3
        save(folder / "A" / f"{name}.png", pre)
        save(folder / "B" / f"{name}.png", post)
        save(folder / "label" / f"{name}.png", changed.astype(np.uint8) * np.uint8(high))
        return pre, post, changed

    return write


class ArraySource:
    """Pairs whose red value is their index, green the row and blue the column; a square changed."""

    def __init__(self, count: int, size: int = 16):
        self.info = [PairInfo(f"pair{index}", size, size, "") for index in range(count)]
        self.size = size

    def __len__(self):
        return len(self.info)

    def __getitem__(self, index):
        rows, columns = np.mgrid[: self.size, : self.size]
        image = np.stack([np.full_like(rows, index), rows, columns], axis=-1).astype(np.uint8)
        label = ((rows < 4) & (columns < 8)).astype(np.uint8)
        return {"pre": image, "post": image + 1, "label": label, "name": self.info[index].name}


@pytest.fixture
def array_source():
    return ArraySource


@pytest.fixture
def real_data():
    root = os.environ.get("ZZHNET_DATA")
    if not root:
        pytest.skip("ZZHNET_DATA, the folder of real image pairs, is not set")
    return Path(root)
