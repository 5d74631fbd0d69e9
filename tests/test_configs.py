"""Every experiment in configs/ loads, and names a network that training can build."""

from pathlib import Path

import pytest

from zzhnet_jax.training.config import load_config
from zzhnet_jax.training.program import model_builder

FILES = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config(path):
    config = load_config(str(path))
    assert callable(model_builder(config.model))
    assert config.run_dir == f"runs/{path.stem}" or path.stem == "zzhnet_nano_synthetic"
    assert f"configs/{path.name}" in path.read_text().split('"""')[1]
