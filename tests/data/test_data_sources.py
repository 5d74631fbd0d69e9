import logging
import pickle

import numpy as np
import pytest

from zzhnet_jax.data.config import DataConfig, SyntheticConfig
from zzhnet_jax.data.layout import find_pairs
from zzhnet_jax.data.sources import CachedSource, FolderSource, open_source
from zzhnet_jax.data.synthetic import SyntheticSource
from zzhnet_jax.errors import ConfigError, DataError


def assert_pair(pair, arrays, name):
    for key, expected in zip(("pre", "post", "label"), arrays, strict=True):
        np.testing.assert_array_equal(pair[key], expected)
    assert pair["name"] == name


def test_split_folders(tmp_path, write_pair):
    train = [write_pair(tmp_path / "train", f"t{index}", seed=index) for index in range(3)]
    val = write_pair(tmp_path / "val", "v", high=1, seed=9)
    source = FolderSource(tmp_path, "train")
    assert len(source) == 3
    for index, arrays in enumerate(train):
        assert_pair(source[index], arrays, f"t{index}")
    assert [(info.name, info.height, info.width) for info in source.info] == [
        ("t0", 24, 32),
        ("t1", 24, 32),
        ("t2", 24, 32),
    ]
    assert_pair(FolderSource(str(tmp_path), "val")[0], val, "v")


def test_lists_choose_and_order_pairs(tmp_path, write_pair):
    arrays = {name: write_pair(tmp_path, name, seed=ord(name)) for name in "abcd"}
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "train.txt").write_text("c.png\r\na\n\n")
    (tmp_path / "list" / "test.txt").write_text("b.png")
    source = FolderSource(tmp_path, "train")
    assert [pair["name"] for pair in source] == ["c", "a"]
    assert_pair(source[0], arrays["c"], "c")
    assert [pair["name"] for pair in FolderSource(tmp_path, "test")] == ["b"]
    with pytest.raises(DataError, match=r"list/val\.txt: no such file"):
        FolderSource(tmp_path, "val")


def test_a_list_narrows_a_split_folder(tmp_path, write_pair):
    for name in "abc":
        write_pair(tmp_path / "train", name)
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "train.txt").write_text("b.png\n")
    assert [info.name for info in FolderSource(tmp_path, "train").info] == ["b"]


def test_one_set_serves_every_split_with_a_warning(tmp_path, write_pair, caplog):
    write_pair(tmp_path, "only")
    with caplog.at_level(logging.WARNING):
        assert len(FolderSource(tmp_path, "test")) == 1
        assert not caplog.records
        assert len(FolderSource(tmp_path, "val")) == 1
    assert "validation sees the training pairs" in caplog.text


def test_suffixes_may_differ_and_other_files_are_left_alone(tmp_path, write_pair, save):
    pre, post, changed = write_pair(tmp_path, "scene.1")
    (tmp_path / "B" / "scene.1.png").rename(tmp_path / "B" / "scene.1.PNG")
    (tmp_path / "label" / "scene.1.png").unlink()
    save(tmp_path / "label" / "scene.1.tif", changed.astype(np.uint8))
    (tmp_path / "A" / "Thumbs.db").write_text("")
    (tmp_path / "A" / ".hidden.png").write_text("")
    assert_pair(FolderSource(tmp_path, "test")[0], (pre, post, changed), "scene.1")


@pytest.mark.parametrize("part", ["A", "B", "label"])
def test_missing_counterpart_is_named(tmp_path, write_pair, part):
    write_pair(tmp_path / "train", "one")
    write_pair(tmp_path / "train", "two")
    (tmp_path / "train" / part / "two.png").unlink()
    with pytest.raises(DataError) as caught:
        FolderSource(tmp_path, "train")
    assert f"has no counterpart {tmp_path / 'train' / part / 'two.png'}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["B", "label"])
def test_sizes_that_differ_are_named_before_any_training(tmp_path, write_pair, save, part):
    write_pair(tmp_path, "x")
    save(tmp_path / part / "x.png", np.zeros((24, 30), np.uint8))
    with pytest.raises(DataError, match=rf"{part}/x\.png is 30x24 pixels but .*A/x\.png is 32x24"):
        FolderSource(tmp_path, "test")


def test_what_is_wrong_with_a_layout_is_said(tmp_path, write_pair):
    with pytest.raises(DataError, match=r"nowhere: no such folder; set data\.root"):
        FolderSource(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match="has neither train/A nor A"):
        FolderSource(tmp_path, "train")
    write_pair(tmp_path, "x")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "train.txt").write_text("x.png\nghost.png\n")
    with pytest.raises(DataError, match=r"train\.txt: names ghost\.png"):
        FolderSource(tmp_path, "train")
    (tmp_path / "list" / "val.txt").write_text("\n")
    with pytest.raises(DataError, match=r"val\.txt: the split is empty"):
        FolderSource(tmp_path, "val")
    (tmp_path / "list" / "test.txt").write_text("x.png\nx.png\n")
    with pytest.raises(DataError, match=r"test\.txt: names x\.png more than once"):
        FolderSource(tmp_path, "test")


def test_empty_split_folder(tmp_path):
    for part in ("A", "B", "label"):
        (tmp_path / "val" / part).mkdir(parents=True)
    with pytest.raises(DataError, match=r"val/A: holds no images .*the split is empty"):
        FolderSource(tmp_path, "val")


def test_one_name_twice_in_a_folder(tmp_path, write_pair, save):
    write_pair(tmp_path, "x")
    save(tmp_path / "A" / "x.bmp", np.zeros((24, 32, 3), np.uint8))
    with pytest.raises(DataError, match="has the same name as"):
        FolderSource(tmp_path, "test")


def test_pixel_faults_are_reported_when_the_pair_is_read(tmp_path, write_pair, save):
    write_pair(tmp_path, "cut")
    write_pair(tmp_path, "odd", high=128)
    path = tmp_path / "B" / "cut.png"
    path.write_bytes(path.read_bytes()[:600])
    source = FolderSource(tmp_path, "test")
    with pytest.raises(DataError, match=r"B/cut\.png: the image is damaged or cut short"):
        source[0]
    with pytest.raises(DataError, match=r"label/odd\.png: label values are 0, 128"):
        source[1]


def test_pairs_without_labels(tmp_path, write_pair):
    write_pair(tmp_path, "b")
    write_pair(tmp_path, "a")
    pairs = find_pairs(tmp_path / "A", tmp_path / "B")
    assert [(files.name, files.label) for files in pairs] == [("a", None), ("b", None)]
    assert pairs[0].post == tmp_path / "B" / "a.png"
    (tmp_path / "B" / "b.png").unlink()
    with pytest.raises(DataError, match="has no counterpart"):
        find_pairs(tmp_path / "A", tmp_path / "B")


def test_open_source_needs_a_root():
    with pytest.raises(ConfigError, match=r"data\.root = None"):
        open_source(DataConfig(), "train")
    config = DataConfig(source="synthetic", synthetic=SyntheticConfig(val_pairs=3))
    assert len(open_source(config, "val")) == 3


class Counting:
    """Counts reads; 300 bytes a pair."""

    def __init__(self):
        self.info, self.reads = [None] * 4, []

    def __len__(self):
        return 4

    def __getitem__(self, index):
        self.reads.append(index)
        image = np.full((6, 8, 3), index, np.uint8)
        return {"pre": image, "post": image.copy(), "label": image[..., 0] * 0, "name": str(index)}


def test_rendered_pairs_follow_those_of_the_folder_in_training_only(tmp_path, write_pair):
    write_pair(tmp_path / "train", "real")
    write_pair(tmp_path / "val", "real")
    scenes = SyntheticConfig(size=32)
    config = DataConfig(root=str(tmp_path), rendered_pairs=3, synthetic=scenes)
    joined = open_source(config, "train")
    rendered = SyntheticSource(scenes, "train")
    assert len(joined) == len(joined.info) == 4
    assert joined[0]["name"] == joined.info[0].name == "real"
    for index in range(3):
        assert joined[index + 1]["name"] == joined.info[index + 1].name
        np.testing.assert_array_equal(joined[index + 1]["label"], rendered[index]["label"])
    assert len(open_source(config, "val")) == 1


def test_cache_keeps_what_fits_and_reads_the_rest_again():
    inner = Counting()
    cached = CachedSource(inner, capacity_bytes=2 * 6 * 8 * 7 + 50)
    for _ in range(3):
        assert [int(cached[index]["pre"][0, 0, 0]) for index in (0, 1, 2, -1)] == [0, 1, 2, 3]
    assert inner.reads == [0, 1, 2, 3, 2, 3, 2, 3]
    with pytest.raises(ValueError, match="read-only"):
        cached[0]["pre"][0] = 1
    with pytest.raises(IndexError):
        cached[4]


def test_cache_is_not_sent_to_other_processes():
    cached = CachedSource(Counting(), capacity_bytes=10_000)
    before = len(pickle.dumps(cached))
    for index in range(4):
        cached[index]
    copy = pickle.loads(pickle.dumps(cached))
    assert len(pickle.dumps(cached)) < before + 50
    assert copy[1]["name"] == "1"


def test_real_tiles(real_data):
    sizes = [len(FolderSource(real_data / "bcd256", split)) for split in ("train", "val", "test")]
    assert sizes == [211, 60, 58]
    pair = FolderSource(real_data / "bcd256", "test")[0]
    assert pair["name"] == "levir_test_102_0512_0000"
    assert pair["pre"].shape == (256, 256, 3) and set(np.unique(pair["label"])) == {0, 1}


def test_real_whole_scenes(real_data):
    source = FolderSource(real_data / "full", "test")
    assert [(info.name, info.height, info.width) for info in source.info] == [
        ("oscd_hongkong", 695, 540),
        ("sztaki_szada7", 640, 952),
    ]


def test_real_jpeg_label_is_explained(real_data):
    source = FolderSource(real_data / "cdd_1", "test")
    with pytest.raises(DataError, match=r"label/00000\.jpg: label values are 0, 1, 2.*JPEG"):
        source[0]
