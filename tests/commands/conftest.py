"""A network whose answer is known, in place of a trained one."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zzhnet_jax.models.registry import ModelCard

CARD = ModelCard("difference", 2, mean=(0.0,) * 3, std=(255.0,) * 3, threshold=0.75)


class Difference(nnx.Module):
    """P(change) = sigmoid(2 * 4 * (mean over bands of |post - pre| / 255 - 0.25))."""

    def __init__(self):
        self.gain = nnx.Param(jnp.asarray(4.0))
        self.card = CARD

    def __call__(self, pre, post, *, key=None):
        z = self.gain[...] * (jnp.abs(post - pre).mean(-1) - 0.25)
        return jnp.stack([-z, z], axis=-1)


def difference_probability(pre, post):
    distance = np.abs(post.astype(np.float64) - pre).mean(-1) / 255
    return 1 / (1 + np.exp(-8 * (distance - 0.25)))


@pytest.fixture
def difference_run(monkeypatch, tmp_path):
    """A run folder whose model is `Difference`; its probability as a function is `.probability`."""
    monkeypatch.setattr("zzhnet_jax.commands.shared.load_model", lambda path: Difference())
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture
def probability():
    return difference_probability


@pytest.fixture
def write_pairs():
    """Writes pairs of random images with random labels to root/{A,B,label}."""
    from PIL import Image

    def write(root, names, size=(24, 40), folders=("A", "B", "label"), seed=0):
        rng = np.random.default_rng(seed)
        arrays = {}
        for folder in folders:
            (root / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            pre, post = rng.integers(0, 256, (2, *size, 3), dtype=np.uint8)
            label = (rng.random(size) < 0.4).astype(np.uint8)
            arrays[name] = (pre, post, label)
            for folder, array in zip(folders, (pre, post, label * np.uint8(255)), strict=True):
                Image.fromarray(array).save(root / folder / f"{name}.png")
        return arrays

    return write
