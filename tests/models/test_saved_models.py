"""Saving and loading: the same network back, and one line for whatever is wrong with a file."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from zzhnet_jax.errors import CheckpointError, ConfigError
from zzhnet_jax.models import functional, io, weights
from zzhnet_jax.models.registry import ModelCard, create_model, list_models

WEIGHTS = weights.FILES["safetensors"]
SMALL = dict(width=8, depths=(1, 1, 1, 1), decoder_width=8, norm="batch")


@pytest.fixture(scope="module")
def model():
    return create_model("zzhnet_nano", rngs=nnx.Rngs(3), **SMALL)


@pytest.fixture
def saved(model, tmp_path):
    card = ModelCard("zzhnet_nano", 2, mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0), threshold=0.25)
    io.save_model(model, tmp_path / "run" / "model", card=card)
    return tmp_path / "run" / "model"


def test_a_model_comes_back_bit_for_bit(model, saved):
    for path in (saved, saved.parent):
        loaded = io.load_model(path)
        assert loaded.config == model.config
        assert loaded.card.threshold == 0.25 and loaded.card.std == (4.0, 5.0, 6.0)
        before, after = functional.split(model), functional.split(loaded)
        jax.tree.map(np.testing.assert_array_equal, before[1:], after[1:])
        assert jax.tree.structure(before[1:]) == jax.tree.structure(after[1:])


def test_orbax_holds_the_same_model(model, saved):
    card = io.load_model(saved).card
    io.save_model(model, saved, card=card, weights_format="orbax")
    assert sorted(p.name for p in saved.iterdir()) == [io.CONFIG, weights.FILES["orbax"]]
    loaded = io.load_model(saved)
    before, after = functional.split(model), functional.split(loaded)
    jax.tree.map(np.testing.assert_array_equal, before[1:], after[1:])
    assert loaded.card == card

    other = functional.abstract(
        lambda rngs: create_model("zzhnet_nano", rngs=rngs, **(SMALL | {"width": 16}))
    )
    with pytest.raises(CheckpointError, match=r"model\.orbax: belongs to another network"):
        io.read_weights(saved, dict(zip(("params", "stats"), other[1:], strict=True)))
    for file in (saved / weights.FILES["orbax"]).rglob("*"):
        if file.is_file() and file.name != "_CHECKPOINT_METADATA":
            file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.orbax: damaged"):
        io.load_model(saved)


def test_weights_of_another_network_are_refused(saved, tmp_path):
    other = create_model("zzhnet_nano", rngs=nnx.Rngs(0), **(SMALL | {"width": 16}))
    io.save_model(other, tmp_path / "other")
    (saved / WEIGHTS).write_bytes((tmp_path / "other" / WEIGHTS).read_bytes())
    with pytest.raises(CheckpointError, match="another network"):
        io.load_model(saved)


def test_damaged_files_are_named(saved, tmp_path):
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        io.load_model(saved)
    (saved / io.CONFIG).write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        io.load_model(saved)
    with pytest.raises(CheckpointError, match="no model here"):
        io.load_model(tmp_path)


def test_a_config_of_another_version_is_refused(saved):
    description = json.loads((saved / io.CONFIG).read_text())
    description["config"]["no_such_field"] = 1
    (saved / io.CONFIG).write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="no_such_field"):
        io.load_model(saved)


def test_a_failed_write_leaves_the_old_model(model, saved, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights.os, "replace", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        io.save_model(model, saved)
    monkeypatch.undo()
    assert io.load_model(saved).card.threshold == 0.25
    assert sorted(p.name for p in saved.iterdir()) == [io.CONFIG, WEIGHTS]


def test_unknown_names_get_the_nearest():
    with pytest.raises(ConfigError, match="did you mean zzhnet_tiny"):
        create_model("zzhnet_tny", rngs=nnx.Rngs(0))
    assert "zzhnet_base" in list_models()
