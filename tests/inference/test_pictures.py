"""Pictures show the right colour at the right place."""

import matplotlib
import numpy as np
import pytest

from zzhnet_jax.inference import pictures
from zzhnet_jax.inference.pictures import PictureRow, contact_sheet, four_panel


def example(size=288):
    pre, post = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    mask, label = np.zeros((2, size, size), np.uint8)
    half = size // 2
    mask[:, :half] = 1
    label[:half] = 1
    label[-8:] = 255
    probability = np.linspace(0, 1, size * size, dtype=np.float32).reshape(size, size)
    return pre, post, probability, mask, label


def panel(sheet, column, size=288):
    """The pixels of a panel of a one-row picture whose images are not scaled."""
    left = pictures._MARGIN + column * (size + pictures._GAP)
    array = np.asarray(sheet)
    top = pictures._MARGIN + min(max(size // 17, 13), 22) + 8
    return array[top : top + size, left : left + size]


def test_first_panels_are_the_images_and_the_colour_map():
    pre, post, probability, mask, label = example()
    sheet = four_panel(pre, post, probability, mask, label, name="a")
    np.testing.assert_array_equal(panel(sheet, 0), pre)
    np.testing.assert_array_equal(panel(sheet, 1), post)
    colours = matplotlib.colormaps["viridis"](probability, bytes=True)[..., :3]
    np.testing.assert_array_equal(panel(sheet, 2), colours)


def test_comparison_colours_each_kind_of_agreement():
    pre, post, probability, mask, label = example()
    shown = panel(four_panel(pre, post, probability, mask, label), 3).astype(float)
    grey = np.floor(40 + 0.55 * post.astype(np.float64).mean(-1, keepdims=True))
    for rows, columns, colour in [
        (slice(0, 144), slice(0, 144), pictures.FOUND),
        (slice(144, 280), slice(0, 144), pictures.FALSE_ALARM),
        (slice(0, 144), slice(144, None), pictures.MISSED),
        (slice(280, None), slice(None), pictures.UNLABELLED),
    ]:
        mixed = 0.2 * grey[rows, columns] + 0.8 * np.array(colour)
        np.testing.assert_allclose(shown[rows, columns], mixed, atol=1.5)
    untouched = shown[144:280, 144:]
    np.testing.assert_allclose(untouched, np.repeat(grey[144:280, 144:], 3, -1), atol=1)


def test_without_label_the_change_is_tinted_and_outlined():
    pre, post, probability, mask, _ = example()
    shown = panel(four_panel(pre, post, probability, mask), 3)
    np.testing.assert_array_equal(shown[:, 144:], post[:, 144:])
    np.testing.assert_array_equal(shown[:, 143], np.tile(pictures.DETECTED, (288, 1)))
    mixed = 0.55 * post[10, 10] + 0.45 * np.array(pictures.DETECTED)
    np.testing.assert_allclose(shown[10, 10], mixed, atol=1)


def test_sheet_takes_rows_of_any_size_and_kind():
    rows = [
        PictureRow(*example(40), name="labelled"),
        PictureRow(*example(700)[:4]),
        PictureRow(*(a[:30, :100] for a in example(120))),
    ]
    sheet = contact_sheet(rows, side=128)
    alone = [contact_sheet([row], side=128) for row in rows]
    assert sheet.width == max(picture.width for picture in alone)
    assert sheet.height > 128 + 128 + 38
    with pytest.raises(ValueError, match="at least one row"):
        contact_sheet([])


def test_caption_tells_shares_and_score():
    mask, label = np.zeros((2, 10, 10), np.uint8)
    mask[0, :4], label[0, 2:6] = 1, 1
    row = PictureRow(*np.zeros((2, 10, 10, 3), np.uint8), mask, mask, label, "x")
    assert pictures._caption(row) == "x   ·   detected 4.0%, labelled 4.0%   ·   F1 0.50"
    empty = np.zeros((10, 10), np.uint8)
    row = PictureRow(*np.zeros((2, 10, 10, 3), np.uint8), empty, empty, empty, "x")
    assert pictures._caption(row).endswith("no change anywhere")
