import numpy as np
import pytest
from PIL import Image

from zzhnet_jax.data.images import image_size, load_image, load_label, load_pair
from zzhnet_jax.errors import DataError


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_colours_are_read_exactly(tmp_path, save, picture, suffix):
    path = save(tmp_path / f"image{suffix}", picture)
    np.testing.assert_array_equal(load_image(path), picture)
    assert image_size(path) == (20, 30)


def test_grey_palette_and_transparent_images_become_rgb(tmp_path, picture):
    grey = picture[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(load_image(tmp_path / "grey.png"), np.stack([grey] * 3, -1))
    Image.fromarray(np.dstack([picture, grey])).save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(load_image(tmp_path / "rgba.png"), picture)
    palette = Image.fromarray(grey % 4, "P")
    palette.putpalette([0, 0, 0, 10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(
        load_image(tmp_path / "palette.png"),
        np.array([[0, 0, 0], [10, 20, 30], [40, 50, 60], [70, 80, 90]], np.uint8)[grey % 4],
    )


def test_sixteen_bit_images_are_refused(tmp_path, save):
    path = save(tmp_path / "deep.tif", np.full((4, 4), 4000, np.uint16))
    with pytest.raises(DataError, match=r"deep\.tif.*8 bits"):
        load_image(path)


@pytest.mark.parametrize("high", [1, 255])
def test_label_values_are_recognised(tmp_path, save, high):
    changed = np.random.default_rng(1).random((9, 7)) < 0.4
    path = save(tmp_path / "label.png", changed.astype(np.uint8) * np.uint8(high))
    label = load_label(path)
    assert label.dtype == np.uint8
    np.testing.assert_array_equal(label, changed)


def test_two_level_and_equal_channel_labels_are_read(tmp_path, save):
    changed = np.random.default_rng(1).random((9, 7)) < 0.4
    np.testing.assert_array_equal(load_label(save(tmp_path / "1.png", changed)), changed)
    grey = np.repeat(changed[..., None].astype(np.uint8) * 255, 3, axis=-1)
    np.testing.assert_array_equal(load_label(save(tmp_path / "rgb.png", grey)), changed)
    opaque = np.dstack([grey, np.full(changed.shape, 255, np.uint8)])
    np.testing.assert_array_equal(load_label(save(tmp_path / "rgba.png", opaque)), changed)


@pytest.mark.parametrize(
    ("values", "shown"),
    [((0, 128), "0, 128"), ((0, 1, 255), "0, 1, 255"), ((0, 1, 2), "0, 1, 2")],
)
def test_other_label_values_are_refused_by_name(tmp_path, save, values, shown):
    path = save(tmp_path / "odd.png", np.array([values], np.uint8))
    with pytest.raises(DataError) as caught:
        load_label(path)
    assert str(caught.value).startswith(f"{path}: label values are {shown}, but they must be")
    assert "\n" not in str(caught.value)


def test_many_label_values_are_counted_and_jpeg_is_explained(tmp_path, save):
    ramp = np.arange(256, dtype=np.uint8)[None]
    with pytest.raises(DataError, match=r"\(256 values\).*threshold it"):
        load_label(save(tmp_path / "ramp.png", ramp))
    blocks = np.kron(np.random.default_rng(0).integers(0, 2, (4, 4)), np.ones((5, 5)))
    path = save(tmp_path / "lossy.jpg", (255 * blocks).astype(np.uint8))
    with pytest.raises(DataError, match="JPEG blurs labels"):
        load_label(path)


def test_colourful_label_is_refused(tmp_path, save, picture):
    with pytest.raises(DataError, match="one channel"):
        load_label(save(tmp_path / "colour.png", picture))


def test_missing_damaged_and_foreign_files(tmp_path, save, picture):
    with pytest.raises(DataError, match=r"none\.png: no such file"):
        load_image(tmp_path / "none.png")
    whole = save(tmp_path / "whole.png", picture).read_bytes()
    for share in (0.3, 0.6, 0.95):
        cut = tmp_path / "cut.png"
        cut.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(DataError, match=r"cut\.png: the image is damaged or cut short"):
            load_image(cut)
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(DataError, match=r"text\.png: not an image"):
        image_size(tmp_path / "text.png")
    with pytest.raises(DataError, match="damaged or cut short"):
        load_image(tmp_path)


def test_a_pair_needs_no_label_but_equal_sizes(tmp_path, save, picture):
    pre = save(tmp_path / "pre.png", picture)
    post = save(tmp_path / "post.png", picture[::-1])
    loaded = load_pair(str(pre), post)
    np.testing.assert_array_equal(loaded[0], picture)
    np.testing.assert_array_equal(loaded[1], picture[::-1])
    other = save(tmp_path / "other.png", picture[:, :10])
    with pytest.raises(DataError, match=r"other\.png is 10x20 pixels but .*pre\.png is 30x20"):
        load_pair(pre, other)
