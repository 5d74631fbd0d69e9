"""Adapting checkpoints: bands, position embeddings, heads, encoders."""

import numpy as np
import pytest

from zzhnet_jax.conversion.adapt import fit, inflate_bands, into_encoders, resize_bicubic


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 6, 13])
def test_inflated_bands_answer_grey_images_alike(bands):
    weight = np.random.default_rng(0).normal(size=(5, 3, 3, 3)).astype(np.float32)
    inflated = inflate_bands(weight, bands)
    assert inflated.shape == (5, bands, 3, 3)
    np.testing.assert_allclose(inflated.sum(1), weight.sum(1), rtol=1e-5, atol=1e-5)


def test_inflated_bands_are_repeated_in_turn():
    weight = np.arange(3, dtype=np.float32).reshape(1, 3, 1, 1) + 1
    np.testing.assert_allclose(inflate_bands(weight, 3), weight)
    np.testing.assert_allclose(inflate_bands(weight, 4).ravel(), [0.5, 2, 3, 0.5])
    np.testing.assert_allclose(inflate_bands(weight, 2).ravel(), [4, 2])


@pytest.mark.torch
@pytest.mark.parametrize("size", [(7, 9), (3, 4), (14, 5)])
def test_bicubic_is_pytorchs(size):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    image = np.random.default_rng(0).normal(size=(1, 2, 6, 5)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(image), size=size, mode="bicubic", align_corners=False
    )
    np.testing.assert_allclose(resize_bicubic(image, size), expected.numpy(), atol=1e-5)


def test_only_what_was_asked_for_is_adapted():
    state = {
        "classifier.head.weight": np.zeros((1000, 8)),
        "patch_embed.0.weight": np.zeros((4, 3, 3, 3)),
        "pos_embed": np.zeros((1, 4, 2, 2)),
        "layers.0.blocks.0.norm.weight": np.zeros(8),
    }
    wanted = {
        "classifier.head.weight": (10, 8),
        "patch_embed.0.weight": (4, 6, 3, 3),
        "pos_embed": (1, 4, 5, 5),
        "layers.0.blocks.0.norm.weight": (9,),
    }
    assert fit(state, wanted, ())[1] == []
    adapted, changes = fit(state, wanted, ("head", "stem", "position"))
    assert len(changes) == 3
    assert {name: array.shape for name, array in adapted.items()} == {
        "patch_embed.0.weight": (4, 6, 3, 3),
        "pos_embed": (1, 4, 5, 5),
        "layers.0.blocks.0.norm.weight": (8,),
    }


def test_a_classifier_becomes_encoders():
    state = dict.fromkeys(
        ["patch_embed.0.weight", "layers.0.x", "classifier.head.bias", "norm.weight", "head.bias"],
        np.zeros(1),
    )
    assert set(into_encoders(state, ("encoder_1", "encoder_2"))) == {
        f"{encoder}.{name}"
        for encoder in ("encoder_1", "encoder_2")
        for name in ("patch_embed.0.weight", "layers.0.x")
    }
