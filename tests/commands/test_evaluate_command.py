"""`zzhnet evaluate`: its figures equal those of a brute-force count."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from zzhnet_jax.cli import main
from zzhnet_jax.data.config import DataConfig, SyntheticConfig
from zzhnet_jax.data.sources import open_source
from zzhnet_jax.models.io import save_model
from zzhnet_jax.models.registry import create_model


def run_json(capsys, *argv):
    capsys.readouterr()
    assert main(["evaluate", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def figures(pairs, probability, threshold):
    """OA, precision, recall, F1, IoU, kappa from the definitions, over all pixels."""
    predicted = np.concatenate([probability(a, b).ravel() >= threshold for a, b, _ in pairs])
    label = np.concatenate([y.ravel() == 1 for _, _, y in pairs])
    hit = (predicted & label).sum()
    agree = (predicted == label).mean()
    chance = sum((predicted == v).mean() * (label == v).mean() for v in (False, True))
    return dict(
        oa=agree,
        precision=hit / predicted.sum(),
        recall=hit / label.sum(),
        f1=2 * hit / (predicted.sum() + label.sum()),
        iou=hit / (predicted | label).sum(),
        kappa=(agree - chance) / (1 - chance),
    )


NAMES = ["oscd_a_0", "oscd_b_0", "levir_c_0"]


@pytest.fixture
def data(tmp_path, write_pairs):
    arrays = write_pairs(tmp_path / "data" / "test", NAMES)
    return tmp_path / "data", arrays


def test_json_figures(difference_run, probability, data, capsys):
    root, arrays = data
    result = run_json(capsys, difference_run, "--data.root", root, "--per-group")
    everything = figures(arrays.values(), probability, 0.75)
    assert result["metrics"] == pytest.approx(everything, rel=1e-9)
    assert result["threshold"] == 0.75 and result["threshold_from"] == "model"
    assert result["images"] == 3 and result["pixels"] == 3 * 24 * 40
    for group in ("oscd", "levir"):
        members = [arrays[name] for name in NAMES if name.startswith(group)]
        expected = figures(members, probability, 0.75)
        assert {k: result["groups"][group][k] for k in expected} == pytest.approx(expected)
    rows = {row["name"]: row for row in result["per_image"]}
    for name in NAMES:
        expected = figures([arrays[name]], probability, 0.75)
        assert {k: rows[name][k] for k in expected} == pytest.approx(expected)
        assert rows[name]["changed_share"] == pytest.approx(arrays[name][2].mean())
    best = result["best_on_these_images"]
    assert best["f1"] >= max(
        figures(arrays.values(), probability, t)["f1"] for t in (0.15, 0.3, 0.5, 0.75)
    )
    at_best = run_json(
        capsys, difference_run, "--data.root", root, "--threshold", best["threshold"]
    )
    assert at_best["metrics"]["f1"] == pytest.approx(best["f1"])
    assert at_best["threshold_from"] == "command line"


def test_tables_and_pictures(difference_run, data, tmp_path, capsys):
    root, _ = data
    pictures = tmp_path / "pictures"
    argv = [difference_run, "--data.root", root, "--per-group", "--pictures", pictures]
    assert main(["evaluate", *map(str, argv)]) == 0
    text = capsys.readouterr().out
    for words in (*NAMES, "oscd", "all pixels", "kappa", "0.750, stored with the model", "best"):
        assert words in text
    assert sorted(os.listdir(pictures)) == sorted(f"{name}.png" for name in NAMES)


def test_without_any_change_the_missing_figures_are_explained(
    difference_run, data, tmp_path, capsys
):
    root, _ = data
    for name in NAMES:
        Image.new("L", (40, 24)).save(root / "test" / "label" / f"{name}.png")
    result = run_json(capsys, difference_run, "--data.root", root)
    assert result["metrics"]["recall"] is None and result["metrics"]["f1"] == 0
    assert result["undefined"] == {"recall": "the labels hold no changed pixel"}
    assert main(["evaluate", str(difference_run), "--data.root", str(root)]) == 0
    assert "No recall: the labels hold no changed pixel." in capsys.readouterr().out


def test_the_data_of_the_run_is_the_default(difference_run, probability, capsys):
    config = DataConfig(
        source="synthetic",
        synthetic=SyntheticConfig(size=32, train_pairs=1, val_pairs=2, test_pairs=3, change=1.0),
    )
    described = {"data": dataclasses.asdict(config), "seed": 0}
    (difference_run / "config.json").write_text(json.dumps(described))
    for split in ("val", "test"):
        source = open_source(config, split)
        pairs = [(s["pre"], s["post"], s["label"]) for s in (source[i] for i in range(len(source)))]
        result = run_json(capsys, difference_run, "--split", split, "--threshold", "0.3")
        assert result["data"] == "synthetic" and result["images"] == len(pairs)
        expected = figures(pairs, probability, 0.3)
        assert result["metrics"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--data.root", "nowhere"], "nowhere"),
        (["--split", "tset"], "tset"),
        (["--data.rot", "x"], "--data.root"),
        (["--threshold", "-1"], "between 0 and 1"),
        ([], "data.root"),
    ],
)
def test_wrong_arguments(difference_run, capsys, argv, words):
    assert main(["evaluate", str(difference_run), *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.startswith("error: ") and err.count("\n") == 1


def test_damaged_run_config(difference_run, capsys):
    (difference_run / "config.json").write_text("{")
    assert main(["evaluate", str(difference_run)]) == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.mesh
def test_several_devices_share_the_tiles_and_give_the_same_figures(data, tmp_path):
    # What takes less to compile: one encoder for both dates, one CSSM, the scan traced fastest.
    narrow = {"width": 8, "decoder_width": 8, "depths": (1, 1, 1, 1), "head": "bilinear"}
    narrow |= {"num_shared_stages": 4, "cssm_stages": (3,)}
    narrow |= {"block": {"ssm": {"scan_implementation": "sequential"}}}
    save_model(create_model("zzhnet_nano", rngs=nnx.Rngs(0), **narrow), tmp_path / "model")
    command = [sys.executable, "-m", "zzhnet_jax.cli", "evaluate", str(tmp_path / "model")]
    command += ["--data.root", str(data[0]), "--threshold", "0.5", "--batch-size", "1", "--json"]
    found = []
    for devices in (1, 4):  # three images: with four devices one of them computes padding
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        environment = os.environ | {"XLA_FLAGS": flags}
        found.append(subprocess.run(command, env=environment, capture_output=True, check=True))
    assert found[0].stdout == found[1].stdout
    assert json.loads(found[0].stdout)["pixels"] == 3 * 24 * 40
