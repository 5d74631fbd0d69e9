import importlib.util
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "floors.py"


@pytest.fixture(scope="module")
def floors():
    spec = importlib.util.spec_from_file_location("floors", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_otsu_maximises_the_variance_between_classes(floors):
    rng = np.random.default_rng(0)
    levels = np.concatenate([rng.normal(60, 12, 900), rng.normal(150, 20, 300)])
    levels = levels.clip(0, 255).astype(np.uint8)

    def variance_within(threshold):
        parts = levels[levels <= threshold], levels[levels > threshold]
        return sum(part.size * part.var() for part in parts if part.size)

    best = min(range(levels.min(), levels.max()), key=variance_within)
    assert floors.otsu_threshold(levels) == best
    assert floors.otsu_threshold(np.full((4, 4), 7, np.uint8)) >= 0


def test_difference_is_the_root_mean_square(floors):
    pre = np.array([[[0, 0, 0], [10, 20, 30]]], np.uint8)
    post = np.array([[[30, 40, 0], [10, 20, 30]]], np.uint8)
    assert floors.colour_difference(pre, post).tolist() == [[29, 0]]  # sqrt(2500 / 3) = 28.9


def test_real_floor(floors, real_data):
    rows = {
        (row["colours"], row["threshold"]): row["f1"]
        for row in floors.measure(real_data / "bcd256", "test")
    }
    assert rows["standardised", "per image"] == pytest.approx(0.202, abs=0.002)
    assert max(rows.values()) < 0.3
