import collections
import dataclasses

import numpy as np
import pytest

from zzhnet_jax.data.config import AugmentConfig, JitterConfig
from zzhnet_jax.data.transforms import augment, normalize
from zzhnet_jax.errors import ConfigError

OFF = AugmentConfig.off()
GEOMETRY = dataclasses.replace(AugmentConfig(), jitter=JitterConfig.off(), exchange_dates=0.0)


def coordinates(height=64, width=80):
    """Two images that hold their own row and column, told apart by blue, and a label made of it."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    pre = np.stack([rows, columns, np.full_like(rows, 10)], axis=-1)
    post = np.stack([rows, columns, np.full_like(rows, 20)], axis=-1)
    return pre, post, label_of(pre)


def label_of(image):
    rows, columns = image[..., 0].astype(int), image[..., 1].astype(int)
    return ((rows * 7 + columns * 3) % 11 < 3).astype(np.uint8)


def draw(config, seed, crop_size=32, arrays=None):
    arrays = coordinates() if arrays is None else arrays
    rng = np.random.default_rng(seed)
    return augment(*arrays, name="tile", crop_size=crop_size, config=config, rng=rng)


def test_normalize_is_the_formula_for_any_layout():
    mean, std = (10.0, 20.0, 30.0), (2.0, 4.0, 5.0)
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    expected = (image.astype(np.float64) - mean) / std
    for given in (image, image.astype(np.float32), np.asfortranarray(image)):
        out = normalize(given, mean, std)
        assert out.dtype == np.float32
        np.testing.assert_allclose(out, expected, rtol=1e-6)
    turned = normalize(np.rot90(image), mean, std)
    np.testing.assert_allclose(turned, np.rot90(expected), rtol=1e-6)
    assert image.dtype == np.uint8
    np.testing.assert_allclose(normalize(np.stack([image] * 2), mean, std)[1], expected, rtol=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_label_and_both_dates_move_together(seed):
    config = dataclasses.replace(GEOMETRY, scale=(1.0, 1.0))
    pre, post, label = draw(config, seed)
    assert label.shape == (32, 32)
    np.testing.assert_array_equal(pre[..., :2], post[..., :2])
    np.testing.assert_array_equal(label, label_of(pre))
    assert (pre[..., 2] == 10).all() and (post[..., 2] == 20).all()


@pytest.mark.parametrize("scale", [0.7, 1.6])
def test_scale_magnifies_image_and_label_alike(scale):
    pre, post, _ = coordinates(96, 96)
    label = (pre[..., 0] >= 48).astype(np.uint8)
    config = dataclasses.replace(OFF, scale=(scale, scale))
    for seed in range(20):
        out_pre, out_post, out_label = draw(config, seed, 40, (pre, post, label))
        rows = out_pre[..., 0].astype(float)
        step = np.median(np.diff(rows[:, 0]))
        assert step == pytest.approx(1.0 / scale, abs=0.6)
        assert rows[-3, 0] - rows[2, 0] == pytest.approx(35 / scale, abs=2.0)
        sure = np.abs(rows - 47.5) > 1.0
        np.testing.assert_array_equal(out_label[sure], (rows > 47.5)[sure])
        np.testing.assert_array_equal(out_pre[..., :2], out_post[..., :2])


def orientation(pre):
    """Which way rows and columns run, as signs of the derivatives along both axes."""
    values = pre[..., :2].astype(int)
    down, right = values[1, 0] - values[0, 0], values[0, 1] - values[0, 0]
    return tuple(down) + tuple(right)


def test_flips_and_turns_reach_all_eight_orientations_evenly():
    config = dataclasses.replace(GEOMETRY, scale=(1.0, 1.0))
    counts = collections.Counter(orientation(draw(config, seed)[0]) for seed in range(800))
    assert len(counts) == 8
    assert min(counts.values()) > 60  # 100 expected, standard deviation 9


def test_rotation_choices():
    turned = dataclasses.replace(OFF, rotation="always")
    seen = {orientation(draw(turned, seed)[0]) for seed in range(60)}
    assert len(seen) == 3 and (1, 0, 0, 1) not in seen
    assert {orientation(draw(OFF, seed)[0]) for seed in range(20)} == {(1, 0, 0, 1)}


def test_exchange_of_the_dates():
    always = dataclasses.replace(OFF, exchange_dates=1.0)
    pre, post, label = draw(always, 0)
    assert (pre[..., 2] == 20).all() and (post[..., 2] == 10).all()
    np.testing.assert_array_equal(label, label_of(pre))


def one_changed_pixel(size=200):
    image = np.zeros((size, size, 3), np.uint8)
    label = np.zeros((size, size), np.uint8)
    label[3, 150] = 1
    return image, image, label


@pytest.mark.parametrize(("share", "low", "high"), [(1.0, 1.0, 1.0), (0.6, 0.54, 0.66)])
def test_crops_prefer_change_as_often_as_asked(share, low, high):
    config = dataclasses.replace(OFF, crop="change", change_share=share)
    hits = [draw(config, seed, 20, one_changed_pixel())[2].sum() for seed in range(600)]
    assert low <= np.mean(hits) <= high
    assert max(hits) == 1


def test_uniform_crops_reach_every_corner_and_ignore_change():
    image = np.stack([*np.mgrid[:40, :40].astype(np.uint8), np.zeros((40, 40), np.uint8)], -1)
    arrays = image, image, np.ones((40, 40), np.uint8)
    corners = [tuple(draw(OFF, seed, 32, arrays)[0][0, 0, :2].tolist()) for seed in range(1500)]
    assert set(corners) == {(row, column) for row in range(9) for column in range(9)}
    hits = [draw(OFF, seed, 20, one_changed_pixel())[2].sum() for seed in range(300)]
    assert np.mean(hits) < 0.1


def test_preferred_pixel_lies_anywhere_in_the_crop():
    image, _, label = one_changed_pixel()
    label[:] = 0
    label[100, 100] = 1
    config = dataclasses.replace(OFF, crop="change", change_share=1.0)
    places = [
        np.argwhere(draw(config, seed, 20, (image, image, label))[2])[0] for seed in range(800)
    ]
    assert np.min(places, axis=0).tolist() == [0, 0]
    assert np.max(places, axis=0).tolist() == [19, 19]
    np.testing.assert_allclose(np.mean(places, axis=0), 9.5, atol=0.7)


def test_balanced_crops_hold_two_classes():
    label = np.zeros((64, 64), np.uint8)
    label[:, :20] = 1
    image = np.zeros((64, 64, 3), np.uint8)
    balanced = dataclasses.replace(OFF, crop="balanced", crop_tries=10)

    def largest_share(config, seed):
        share = draw(config, seed, 16, (image, image, label))[2].mean()
        return max(share, 1.0 - share)

    good = np.mean([largest_share(balanced, seed) < 0.75 for seed in range(200)])
    # One try succeeds at 7 of the 49 columns, so that ten fail in (42/49)**10 = 21 % of the draws.
    assert 0.70 < good < 0.87


def test_balance_does_not_count_ignored_pixels():
    label = np.full((32, 32), 255, np.uint8)
    label[:, :8], label[:, 8:12] = 0, 1
    image = np.zeros((32, 32, 3), np.uint8)
    config = dataclasses.replace(OFF, crop="balanced", crop_tries=40)
    for seed in range(20):
        crop = draw(config, seed, 24, (image, image, label))[2]
        zeros, ones = (crop == 0).sum(), (crop == 1).sum()
        assert ones > 0 and max(zeros, ones) < 0.75 * (zeros + ones)


def test_padding_fills_with_black_and_ignore_at_random_offsets():
    pre, post, label = (array[:20, :48] + 1 for array in coordinates())
    label[:] = 1
    config = dataclasses.replace(OFF, pad=True)
    tops = set()
    for seed in range(60):
        out_pre, out_post, out_label = draw(config, seed, 32, (pre, post, label))
        inside = out_label == 1
        assert inside.sum() == 20 * 32 and (out_label[~inside] == 255).all()
        assert (out_pre[~inside] == 0).all() and (out_post[~inside] == 0).all()
        assert (out_pre[inside] > 0).all()
        tops.add(int(np.argmax(inside[:, 0])))
    assert tops == set(range(13))


def test_crop_larger_than_the_image_names_field_and_image():
    with pytest.raises(ConfigError) as caught:
        draw(OFF, 0, crop_size=65)
    assert str(caught.value).startswith("data.crop_size = 65: it must be at most 64, since tile is")
    assert "80x64" in str(caught.value) and "data.augmentation.pad" in str(caught.value)


def test_shrinking_takes_no_more_ground_than_there_is():
    config = dataclasses.replace(OFF, scale=(0.5, 0.5))
    pre, _, label = draw(config, 0, crop_size=48)
    assert pre.shape == (48, 48, 3) and label.shape == (48, 48)
    assert pre[..., 0].max() == 63  # all 64 rows rather than the 96 asked for


def test_jitter_differs_between_dates_and_leaves_the_label():
    image = np.random.default_rng(0).integers(60, 200, (32, 32, 3), np.uint8)
    label = label_of(image)
    config = dataclasses.replace(OFF, jitter=JitterConfig(probability=1.0))
    pre, post, out_label = draw(config, 3, 32, (image, image.copy(), label))
    np.testing.assert_array_equal(out_label, label)
    assert np.abs(pre.astype(float) - post).mean() > 2.0
    assert 0 <= pre.min() and pre.max() <= 255
    plain = draw(OFF, 3, 32, (image, image, label))
    np.testing.assert_array_equal(plain[0], image)


RANGES = ("brightness", "contrast", "saturation", "gamma", "channel_gain", "blur", "noise")
QUIET = JitterConfig(probability=1.0, **dict.fromkeys(RANGES, 0.0))


def jittered(jitter, image, seed):
    config = dataclasses.replace(OFF, jitter=jitter)
    label = np.zeros(image.shape[:2], np.uint8)
    return draw(config, seed, image.shape[0], (image, image, label))[0].astype(float)


def test_each_jitter_stays_within_its_range():
    rng = np.random.default_rng(0)
    image = rng.integers(80, 170, (48, 48, 3), np.uint8)
    plain = image.astype(float)
    np.testing.assert_array_equal(jittered(QUIET, image, 0), plain)
    seeds = range(60)
    shifts = [
        (jittered(dataclasses.replace(QUIET, brightness=0.1), image, seed) - plain)
        for seed in seeds
    ]
    assert all(np.ptp(shift) <= 1.0 for shift in shifts)
    means = [shift.mean() for shift in shifts]
    assert -26 < min(means) < -20 and 20 < max(means) < 26
    spreads = [
        jittered(dataclasses.replace(QUIET, contrast=0.3), image, seed).std() / plain.std()
        for seed in seeds
    ]
    assert 0.73 < min(spreads) < 0.8 and 1.25 < max(spreads) < 1.36
    noises = [
        (jittered(dataclasses.replace(QUIET, noise=8.0), image, seed) - plain).std()
        for seed in seeds
    ]
    assert 6.0 < max(noises) < 8.1 and 0.3 < np.mean(np.array(noises) == 0.0) < 0.7
    greys = [
        np.ptp(jittered(dataclasses.replace(QUIET, saturation=0.5), image, seed), axis=-1).mean()
        / np.ptp(plain, axis=-1).mean()
        for seed in seeds
    ]
    assert 0.58 < min(greys) < 0.7 and 1.4 < max(greys) < 1.66
    gains = [
        jittered(dataclasses.replace(QUIET, channel_gain=0.2), image, seed).mean((0, 1))
        / plain.mean((0, 1))
        for seed in seeds
    ]
    assert 0.81 < np.min(gains) < 0.86 and 1.16 < np.max(gains) < 1.23
    assert np.ptp(gains, axis=1).mean() > 0.1


def test_everything_follows_from_the_generator():
    config = AugmentConfig()
    for first, second in zip(draw(config, 5), draw(config, 5), strict=True):
        np.testing.assert_array_equal(first, second)
    assert not np.array_equal(draw(config, 5)[0], draw(config, 6)[0])
