import json

import numpy as np
import pytest
from PIL import Image

from zzhnet_jax.commands.data import main
from zzhnet_jax.data.checks import check_dataset
from zzhnet_jax.data.config import SyntheticConfig
from zzhnet_jax.data.sources import FolderSource
from zzhnet_jax.data.synthetic import SyntheticSource
from zzhnet_jax.errors import ConfigError, DataError, UserError


def test_counts_and_statistics(tmp_path, write_pair):
    arrays = [write_pair(tmp_path / "train", f"t{index}", seed=index) for index in range(3)]
    write_pair(tmp_path / "test", "v", size=(8, 8), seed=7)
    report = check_dataset(tmp_path)
    assert report.ok and list(report.splits) == ["train", "test"]
    train = report.splits["train"]
    assert (train.pairs, train.sizes, train.pairs_without_change) == (3, {"32x24": 3}, 0)
    assert train.change_share == pytest.approx(np.mean([changed for *_, changed in arrays]))
    pixels = np.concatenate([np.stack(a[:2]).reshape(-1, 3) for a in arrays]).astype(float)
    np.testing.assert_allclose(train.mean, pixels.mean(axis=0), atol=1e-3)
    np.testing.assert_allclose(train.std, pixels.std(axis=0), atol=1e-3)


def test_all_problems_are_listed_at_once(tmp_path, write_pair, save):
    for index, name in enumerate(["good", "cut", "odd", "lonely", "unequal"]):
        write_pair(tmp_path / "train", name, seed=index)
    cut = tmp_path / "train" / "A" / "cut.png"
    cut.write_bytes(cut.read_bytes()[:500])
    save(tmp_path / "train" / "label" / "odd.png", np.full((24, 32), 128, np.uint8))
    (tmp_path / "train" / "B" / "lonely.png").unlink()
    save(tmp_path / "train" / "label" / "unequal.png", np.zeros((24, 31), np.uint8))
    write_pair(tmp_path / "val", "copy", seed=0)
    report = check_dataset(tmp_path)
    assert not report.ok and report.splits["train"].pairs == 1
    text = "\n".join(report.problems)
    assert "A/cut.png: the image is damaged" in text
    assert "label/odd.png: label values are 128" in text
    assert "A/lonely.png: has no counterpart" in text
    assert "label/lonely.png: has no counterpart" not in text  # A/lonely.png is there
    assert "label/unequal.png is 31x24" in text
    assert "val/A/copy.png: the same image as" in text and "of split train" in text
    assert len(report.problems) == 6  # both dates of the copy


def test_remarks_do_not_make_a_dataset_wrong(tmp_path, write_pair, save):
    write_pair(tmp_path, "x")
    save(tmp_path / "label" / "x.png", np.zeros((24, 32), np.uint8))
    report = check_dataset(tmp_path)
    assert report.ok and list(report.splits) == ["all"]
    assert any("no label has a changed pixel" in remark for remark in report.remarks)
    assert any("one set" in remark for remark in report.remarks)
    assert report.splits["all"].pairs_without_change == 1


def test_missing_root_is_a_problem(tmp_path):
    report = check_dataset(tmp_path / "nowhere")
    assert len(report.problems) == 1 and "no such folder" in report.problems[0]


def test_check_command(tmp_path, write_pair, capsys):
    write_pair(tmp_path / "train", "good")
    assert main(["check", str(tmp_path)]) == 0
    assert "no problems found" in capsys.readouterr().out
    write_pair(tmp_path / "train", "odd", high=128)
    assert main(["check", str(tmp_path), "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False and report["splits"]["train"]["pairs"] == 1
    assert "odd.png" in report["problems"][0]
    assert main(["check", str(tmp_path)]) == 2
    assert "problem: " in capsys.readouterr().out


def test_synth_command_writes_what_the_source_renders(tmp_path, capsys):
    out = tmp_path / "scenes"
    assert main(["synth", str(out), "--pairs", "4", "--size", "48", "--seed", "3"]) == 0
    config = SyntheticConfig(size=48, train_pairs=4, val_pairs=1, test_pairs=1, seed=3)
    for split, count in (("train", 4), ("val", 1), ("test", 1)):
        read, rendered = FolderSource(out, split), SyntheticSource(config, split)
        assert len(read) == count
        for one, two in zip(read, rendered, strict=True):
            assert one["name"] == two["name"]
            for key in ("pre", "post", "label"):
                np.testing.assert_array_equal(one[key], two[key])
    label = np.asarray(Image.open(out / "train" / "label" / "train_00001.png"))
    assert set(np.unique(label)) <= {0, 255}
    with pytest.raises(DataError, match="not an empty folder"):
        main(["synth", str(out)])
    with pytest.raises(ConfigError, match=r"data\.synthetic\.size = 3"):
        main(["synth", str(tmp_path / "small"), "--size", "3"])
    assert not (tmp_path / "small").exists()


def test_command_line_mistakes(capsys):
    with pytest.raises(UserError, match="no command 'chek'"):
        main(["chek"])
    with pytest.raises(UserError, match="ROOT"):
        main(["check"])
    assert main(["--help"]) == 0
    assert "check ROOT" in capsys.readouterr().out


def test_real_datasets(real_data):
    report = check_dataset(real_data / "bcd256")
    assert report.ok
    assert {name: split.pairs for name, split in report.splits.items()} == {
        "train": 211,
        "val": 60,
        "test": 58,
    }
    assert not check_dataset(real_data / "cdd_1").ok
