"""Whole conversions of small networks: there, back, adapted, and refused."""

import json

import numpy as np
import pytest

from zzhnet_jax import cli
from zzhnet_jax.conversion import (
    convert_checkpoint,
    load_torch_state_dict,
    save_torch_state_dict,
    to_torch_state_dict,
)
from zzhnet_jax.errors import ConversionError
from zzhnet_jax.models.io import load_model

ENCODER = {"depths": (1, 1), "dims": 8}


@pytest.fixture(scope="module")
def classifier(random_network):
    def make(**overrides) -> dict[str, np.ndarray]:
        return to_torch_state_dict(random_network("vmamba_tiny_s2l5", 5, **ENCODER, **overrides))

    return make


@pytest.fixture(scope="module")
def vmamba(classifier):
    return classifier()


@pytest.fixture(scope="module")
def mambabcd(random_network):
    model = random_network("mambabcd_tiny", 2, encoder=ENCODER, decoder_width=8)
    return {naming: to_torch_state_dict(model, naming) for naming in ("new", "old")}


def written(tmp_path, state_dict, name="in.pth"):
    save_torch_state_dict(state_dict, tmp_path / name)
    return tmp_path / name


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("naming", ["new", "old"])
def test_there_and_back(tmp_path, mambabcd, naming):
    source = mambabcd[naming]
    report = convert_checkpoint(written(tmp_path, source), tmp_path / "out", verify=True)
    assert report.matching.exact and report.tensors == len(report.checksums) == len(source)
    assert report.parameters == sum(array.size for array in source.values())
    model = load_model(tmp_path / "out")
    assert model.card.name == "mambabcd_tiny" and model.config.decoder_width == 8
    assert_same(to_torch_state_dict(model, naming), source)


def test_the_first_releases_names_are_read(tmp_path, vmamba):
    renames = {
        "patch_embed.0.": "patch_embed.proj.",
        "patch_embed.2.": "patch_embed.norm.",
        "classifier.": "",
        ".blocks.0.norm.": ".blocks.0.ln_1.",
        ".op.": ".self_attention.",
    }
    old = {}
    for name, array in vmamba.items():
        for new, legacy in renames.items():
            name = name.replace(new, legacy)
        old[f"module.{name}"] = array[..., None, None] if "proj.weight" in name else array
    old |= {"module.patch_embed.proj.weight": vmamba["patch_embed.0.weight"]}
    report = convert_checkpoint(written(tmp_path, old), tmp_path / "out")
    assert report.naming == "old"
    assert_same(to_torch_state_dict(load_model(tmp_path / "out")), vmamba)


def test_half_precision_is_widened_exactly(tmp_path, vmamba):
    half = {name: array.astype(np.float16) for name, array in vmamba.items()}
    report = convert_checkpoint(written(tmp_path, half), tmp_path / "out", verify=True)
    assert set(report.dtypes.values()) == {"float16"}
    back = to_torch_state_dict(load_model(tmp_path / "out"))
    assert_same(back, {name: array.astype(np.float32) for name, array in half.items()})


def test_what_does_not_fit_is_listed_and_nothing_is_written(tmp_path, mambabcd):
    broken = dict(mambabcd["new"])
    broken["decoder.fuse_layers.0.0.wieght"] = broken.pop("decoder.fuse_layers.0.0.weight")
    broken["main_clf.bias"] = np.zeros(3, np.float32)
    path = written(tmp_path, broken)
    with pytest.raises(ConversionError) as caught:
        convert_checkpoint(path, tmp_path / "out")
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and not (tmp_path / "out").exists()
    assert "decoder.fuse_layers.0.0.weight (nearest: decoder.fuse_layers.0.0.wieght)" in message
    assert "main_clf.bias 3, wanted 2" in message

    report = convert_checkpoint(path, tmp_path / "out", strict=False)
    matching = report.matching
    assert list(matching.missing.values()) == ["decoder.fuse_layers.0.0.weight"]
    assert matching.unexpected == ("decoder.fuse_layers.0.0.wieght",)
    assert [name for name, *_ in matching.mismatched] == ["main_clf.bias"]
    table = (tmp_path / "out" / "conversion.md").read_text()
    assert "## Missing (1)" in table and "## Of another shape (1)" in table
    kept = to_torch_state_dict(load_model(tmp_path / "out"))
    np.testing.assert_array_equal(kept["main_clf.weight"], broken["main_clf.weight"])
    assert np.abs(kept["decoder.fuse_layers.0.0.weight"]).max() > 0
    with pytest.raises(ConversionError, match=r"main_clf\.bias"):
        convert_checkpoint(path, tmp_path / "out", allow=["decoder.fuse_layers.0.0.*"])


def test_another_network_than_the_named_one(tmp_path, mambabcd):
    path = written(tmp_path, mambabcd["new"])
    with pytest.raises(ConversionError, match=r"missing \(\d+\)"):
        convert_checkpoint(path, tmp_path / "out", model="mambascd_tiny", num_classes=2)
    assert not (tmp_path / "out").exists()


def test_report(tmp_path, vmamba):
    convert_checkpoint(written(tmp_path, vmamba), tmp_path / "out", verify=True)
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert report["totals"]["tensors"] == len(vmamba) == len(report["tensors"])
    assert report["model"]["num_classes"] == 5
    assert report["model"]["overrides"] == {"dims": 8, "depths": [1, 1]}
    assert len(report["source"]["sha256"]) == 64
    row = next(row for row in report["tensors"] if row["torch"] == "classifier.head.weight")
    assert row["torch_shape"] == [5, 16] and row["shape"] == [16, 5]
    assert row["path"] == "classifier.head.kernel" and row["transform"].startswith("linear")
    assert row["sha256"] is not None and report["missing"] == report["unexpected"] == []


def test_classifier_starts_a_change_network(tmp_path, vmamba):
    path = written(tmp_path, vmamba)
    with pytest.raises(ConversionError, match=r"needs the network's name"):
        convert_checkpoint(path, tmp_path / "out", adaptations=["encoder"])
    report = convert_checkpoint(
        path,
        tmp_path / "out",
        model="mambammbda_tiny",
        adaptations=["encoder"],
        overrides=ENCODER,
    )
    assert not report.matching.unexpected and "encoder_1 and encoder_2" in report.adapted[0]
    model = load_model(tmp_path / "out")
    back = to_torch_state_dict(model)
    for encoder in ("encoder_1", "encoder_2"):
        for name, array in vmamba.items():
            if not name.startswith("classifier."):
                np.testing.assert_array_equal(back[f"{encoder}.{name}"], array)


def test_head_stem_and_position_are_adapted_when_asked(tmp_path, classifier):
    source = classifier(position_embedding=True, image_size=16)
    path = written(tmp_path, source)
    options = {"num_classes": 9, "overrides": {"in_chans": 6, "image_size": 32}}
    with pytest.raises(ConversionError, match=r"wrong shape \(4\)"):
        convert_checkpoint(path, tmp_path / "out", **options)
    report = convert_checkpoint(
        path, tmp_path / "out", **options, adaptations=["head", "stem", "position"]
    )
    assert len(report.adapted) == 4
    back = to_torch_state_dict(load_model(tmp_path / "out"))
    assert back["classifier.head.weight"].shape == (9, 16)
    assert back["pos_embed"].shape == (1, 8, 8, 8)
    np.testing.assert_allclose(
        back["patch_embed.0.weight"][:, 3:], source["patch_embed.0.weight"] / 2, rtol=1e-6
    )


def test_forward_type_settles_what_no_tensor_shows(tmp_path, vmamba):
    path = written(tmp_path, vmamba)
    report = convert_checkpoint(path, tmp_path / "out", forward_type="v051d_noz")
    assert report.overrides["block.ssm.pattern"] == "unidirectional"
    assert load_model(tmp_path / "out").config.block.ssm.pattern == "unidirectional"
    with pytest.raises(ConversionError, match=r"missing \(2\)|wrong shape \(2\)"):
        convert_checkpoint(path, tmp_path / "out", forward_type="v05")


# the command


def run(*arguments) -> int:
    return cli.main(["convert", *map(str, arguments)])


def test_command_there_and_back(tmp_path, mambabcd, capsys):
    path = written(tmp_path, mambabcd["new"])
    assert run(path, "-o", tmp_path / "out", "--verify") == 0
    told = capsys.readouterr().out
    assert "mambabcd_tiny" in told and f"{len(mambabcd['new'])} checksums equal" in told
    for name, naming in (("back.pth", "old"), ("back.safetensors", "new")):
        back = tmp_path / name
        options = ["--to", "torch", "--naming", naming, "--verify"]
        assert run(tmp_path / "out", "-o", back, *options) == 0
        assert_same(load_torch_state_dict(back), mambabcd[naming])


def test_orbax_weights_hold_the_same_bits(tmp_path, mambabcd, capsys):
    path = written(tmp_path, mambabcd["new"])
    assert run(path, "-o", tmp_path / "out", "--weights", "orbax", "--verify") == 0
    assert f"{len(mambabcd['new'])} checksums equal" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.orbax").is_dir()
    assert_same(to_torch_state_dict(load_model(tmp_path / "out")), mambabcd["new"])


def test_command_json_and_allow(tmp_path, mambabcd, capsys):
    partial = {n: a for n, a in mambabcd["new"].items() if not n.startswith("main_clf.b")}
    path = written(tmp_path, partial)
    assert run(path, "-o", tmp_path / "out", "--allow", "main_clf.*", "x.*", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["torch"] for row in report["missing"]] == ["main_clf.bias"]
    assert report["allowed"] == ["main_clf.*", "x.*"]


def test_command_refuses_in_words(tmp_path, capsys):
    bad = tmp_path / "bad.pth"
    bad.write_text("<html>not found</html>")
    assert run(bad, "-o", tmp_path / "out") == 2
    assert capsys.readouterr().err == (
        f"error: {bad}: it is a web page, not a checkpoint: the download failed; download it "
        "again (logged in, if the host asks for it)\n"
    )
    assert run(bad, "-o", tmp_path / "out", "--strict", "--allow", "a") == 2
    assert "allow" in capsys.readouterr().err
    assert run(bad, "-o", tmp_path / "out.npz", "--to", "torch") == 2
    assert "no model here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
