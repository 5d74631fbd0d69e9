"""`zzhnet predict`: files with the right values, and one line for what is wrong."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from zzhnet_jax.cli import main


def read(path):
    with Image.open(path) as image:
        return np.array(image)


def failure(capsys, *argv):
    """The single line that a failing command prints."""
    capsys.readouterr()
    assert main(["predict", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_two_files(difference_run, probability, write_pairs, tmp_path, capsys):
    arrays = write_pairs(tmp_path / "data", ["town"])
    pre, post, _ = arrays["town"]
    out = tmp_path / "results" / "new"
    a, b = (str(tmp_path / "data" / folder / "town.png") for folder in "AB")
    assert main(["predict", str(difference_run), a, b, "-o", str(out)]) == 0
    assert sorted(os.listdir(out)) == ["town_mask.png", "town_panels.png", "town_probability.png"]
    expected = probability(pre, post)
    np.testing.assert_array_equal(read(out / "town_mask.png"), 255 * (expected >= 0.75))
    stored = read(out / "town_probability.png")
    np.testing.assert_allclose(stored / 65535, expected, atol=1e-5)
    assert read(out / "town_panels.png").shape[2] == 3
    assert "town" in capsys.readouterr().out


def test_two_folders_in_tiles_with_labels(
    difference_run, probability, write_pairs, tmp_path, capsys
):
    data, out = tmp_path / "data", tmp_path / "out"
    arrays = write_pairs(data, ["b", "a"])
    tiles = ["--tile-size", "16", "--overlap", "4", "--batch-size", "3", "--flips"]
    more = ["--labels", data / "label", "--threshold", "0.6", "--json", "-o", out]
    argv = ["predict", difference_run, data / "A", data / "B", *tiles, *more]
    assert main(list(map(str, argv))) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["threshold"] == 0.6 and [row["name"] for row in result["pairs"]] == ["a", "b"]
    for row in result["pairs"]:
        pre, post, _ = arrays[row["name"]]
        truth = probability(pre, post) >= 0.6
        assert row["changed_share"] == pytest.approx(truth.mean())
        assert (row["height"], row["width"]) == (24, 40)
        np.testing.assert_array_equal(read(row["files"][0]), 255 * truth)
    assert len(os.listdir(out)) == 6


def test_every_option_reaches_the_predictor(difference_run, write_pairs, tmp_path, monkeypatch):
    data, seen = tmp_path / "data", {}

    class Recorder:
        def __init__(self, model, **options):
            seen.update(options)

        def stream(self, samples):
            return iter(())

    monkeypatch.setattr("zzhnet_jax.commands.shared.Predictor", Recorder)
    write_pairs(data, ["x"])
    argv = ["predict", *map(str, (difference_run, data / "A", data / "B"))]
    assert main(argv) == 0
    everywhere = dict(devices=jax.local_devices())
    plain = dict(tile_size=40, overlap=0, batch_size=4, flips=False, exchange_dates=False)
    assert seen == plain | everywhere  # the image is smaller than a tile
    tiles = ["--tile-size", "32", "--batch-size", "2", "--flips", "--exchange-dates"]
    assert main(argv + tiles) == 0
    other = dict(tile_size=32, overlap=8, batch_size=2, flips=True, exchange_dates=True)
    assert seen == other | everywhere


def test_help_tells_the_arguments(capsys):
    with pytest.raises(SystemExit) as end:
        main(["predict", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for word in ("RUN", "PRE", "POST", "--labels", "-o", "--threshold", "--tile-size"):
        assert word in text


def test_wrong_paths_are_told_in_one_line(difference_run, write_pairs, tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    write_pairs(data, ["x", "y"])
    a, b = data / "A", data / "B"
    assert "nowhere" in failure(capsys, difference_run, tmp_path / "nowhere", b, "-o", out)
    message = failure(capsys, difference_run, a / "x.png", b, "-o", out)
    assert "all files or all folders" in message
    (b / "y.png").unlink()
    message = failure(capsys, difference_run, a, b, "-o", out)
    assert str(b / "y.png") in message
    assert not out.exists()


def test_sizes_that_differ_write_nothing(difference_run, write_pairs, tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    write_pairs(data, ["x", "y"])
    Image.new("RGB", (8, 8)).save(data / "B" / "y.png")
    message = failure(capsys, difference_run, data / "A", data / "B", "-o", out)
    assert "8x8" in message.replace(" ", "") and "y.png" in message
    assert not out.exists()


def test_truncated_png_leaves_only_whole_results(difference_run, write_pairs, tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    write_pairs(data, ["x", "y"])
    file = data / "B" / "y.png"
    file.write_bytes(file.read_bytes()[:-500])
    options = ["--batch-size", "1", "-o", out]
    message = failure(capsys, difference_run, data / "A", data / "B", *options)
    assert "y.png" in message
    left = os.listdir(out) if out.exists() else []
    assert left in ([], ["x_mask.png", "x_panels.png", "x_probability.png"])


def test_full_disk_leaves_nothing(difference_run, write_pairs, tmp_path, capsys, monkeypatch):
    data, out = tmp_path / "data", tmp_path / "out"
    write_pairs(data, ["x"])
    save = Image.Image.save

    def full(self, path, **options):
        if "probability" in str(path):
            save(self, path, **options)
            raise OSError(28, "No space left on device")
        save(self, path, **options)

    monkeypatch.setattr(Image.Image, "save", full)
    message = failure(capsys, difference_run, data / "A", data / "B", "-o", out)
    assert "No space left on device" in message and str(out) in message
    assert os.listdir(out) == []


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [("--threshold", "2", "between 0 and 1"), ("--tile-size", "0", "at least 1"),
     ("--overlap", "300", "below tile_size"), ("--batch-size", "0", "at least 1"),
     ("--treshold", "0.5", "--threshold")],
)  # fmt: skip
def test_wrong_options(difference_run, write_pairs, tmp_path, capsys, option, value, words):
    data = tmp_path / "data"
    write_pairs(data, ["x"])
    out = tmp_path / "out"
    argv = [difference_run, data / "A", data / "B", "-o", out, option, value]
    assert words in failure(capsys, *argv)
    assert not out.exists()


def test_output_that_is_a_file(difference_run, write_pairs, tmp_path, capsys):
    data = tmp_path / "data"
    write_pairs(data, ["x"])
    (tmp_path / "out").write_text("")
    argv = [difference_run, data / "A", data / "B", "-o", tmp_path / "out"]
    assert "choose another folder" in failure(capsys, *argv)


def test_no_model(write_pairs, tmp_path, capsys):
    data = tmp_path / "data"
    write_pairs(data, ["x"])
    shutil.rmtree(data / "label")
    message = failure(capsys, tmp_path / "none", data / "A", data / "B", "-o", tmp_path / "out")
    assert "no model here" in message
