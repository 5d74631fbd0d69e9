"""Tiles cover every image, and blending reproduces what every tile agrees on."""

import numpy as np
import pytest

from zzhnet_jax.errors import ConfigError
from zzhnet_jax.inference.tiling import Axis, Tiling, fit_tile


def blend(image, tiling, function):
    canvas = np.zeros(image.shape[:2], np.float32)
    for index in range(len(tiling)):
        tiling.add(canvas, function(tiling.cut(image, index)), index)
    return canvas


def pixel_numbers(height, width):
    return np.arange(height * width, dtype=np.float64).reshape(height, width, 1)


@pytest.mark.parametrize("overlap", [0, 1, 5, 15])
@pytest.mark.parametrize("shape", [(16, 16), (17, 40), (100, 31), (5, 9), (1, 1), (3, 50)])
def test_any_function_of_the_pixel_is_reproduced(shape, overlap):
    tiling = Tiling(shape, 16, overlap)
    image = np.concatenate([pixel_numbers(*shape), np.ones((*shape, 1))], axis=-1)
    constant = blend(image, tiling, lambda tile: tile[..., 1])
    np.testing.assert_allclose(constant, 1, rtol=0, atol=1e-6)
    linear = blend(image, tiling, lambda tile: tile[..., 0])
    np.testing.assert_allclose(linear, image[..., 0], rtol=2e-6)


@pytest.mark.parametrize("shape", [(16, 16), (11, 16), (2, 3)])
def test_an_image_in_one_tile_passes_unchanged(shape):
    values = np.random.default_rng(0).random((16, 16), np.float32)
    tiling = Tiling(shape, 16, 4)
    assert len(tiling) == 1
    canvas = np.zeros(shape, np.float32)
    tiling.add(canvas, values, 0)
    np.testing.assert_array_equal(canvas, values[: shape[0], : shape[1]])


def test_positions_cover_the_axis_and_end_at_its_edge():
    assert Axis.plan(40, 16, 4).starts == (0, 12, 24)
    assert Axis.plan(41, 16, 4).starts == (0, 12, 24, 25)
    assert Axis.plan(16, 16, 4).starts == (0,)
    assert Axis.plan(17, 16, 15).starts == (0, 1)


def test_weights_are_a_smooth_partition_of_one():
    axis = Axis.plan(28, 16, 4)
    ramp = np.sin(np.pi / 2 * (np.arange(4) + 0.5) / 4) ** 2
    np.testing.assert_allclose(axis.weights[0], [*np.ones(12), *ramp[::-1]], atol=1e-6)
    np.testing.assert_allclose(axis.weights[1], [*ramp, *np.ones(12)], atol=1e-6)
    np.testing.assert_allclose(axis.weights[0, 12:] + axis.weights[1, :4], 1, atol=1e-6)


def test_a_disagreement_between_tiles_is_blended_without_a_step():
    tiling = Tiling((16, 200), 16, 8)
    calls = iter(range(len(tiling)))
    canvas = blend(np.zeros((16, 200, 1)), tiling, lambda tile: np.full((16, 16), next(calls) % 2))
    steps = np.abs(np.diff(canvas[0]))
    assert steps.max() < 0.25 and canvas.min() >= 0 and canvas.max() <= 1 + 1e-6


def test_small_images_are_padded_by_reflection():
    image = np.array([[[1], [2], [3]], [[4], [5], [6]]])
    tile = Tiling((2, 3), 4, 1).cut(image, 0)
    expected = [[1, 2, 3, 2], [4, 5, 6, 5], [1, 2, 3, 2], [4, 5, 6, 5]]
    np.testing.assert_array_equal(tile[..., 0], expected)


@pytest.mark.parametrize(("tile", "overlap"), [(0, 0), (16, 16), (16, -1)])
def test_impossible_sizes_are_refused(tile, overlap):
    with pytest.raises(ConfigError, match="tile_size"):
        Tiling((10, 10), tile, overlap)


def test_tile_shrinks_to_small_images_only():
    assert fit_tile([(64, 128, 3), (96, 96, 3)], 256, 64) == (128, 0)
    assert fit_tile([(64, 128), (257, 10)], 256, 64) == (256, 64)
    assert fit_tile([(256, 256)], 256, 64) == (256, 0)
