"""A batch computed in parts has the loss and gradient of the whole, for every loss term."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zzhnet_jax.training.config import LossConfig
from zzhnet_jax.training.gradients import loss_and_gradient

LOSSES = {
    "cross entropy": LossConfig(cross_entropy=1.0),
    "weighted, focal": LossConfig(cross_entropy=0.5, focal=2.0, class_weights=(0.3, 2.0)),
    "lovasz": LossConfig(cross_entropy=0.0, lovasz=1.0),
    "all": LossConfig(cross_entropy=1.0, lovasz=0.5, dice=0.7, focal=0.2),
}


def forward(params, stats, part, key):
    """Two layers on every pixel."""
    hidden = jnp.tanh(jnp.concatenate([part["pre"], part["post"]], -1) @ params["first"])
    return hidden @ params["second"], {"seen": stats["seen"] + 1}


def problem():
    rng = np.random.default_rng(0)
    pre, post = rng.normal(size=(2, 8, 6, 5, 3)).astype(np.float32)
    label = rng.integers(0, 2, (8, 6, 5)).astype(np.int32)
    label[rng.random(label.shape) < 0.2] = 255
    label[::3, :4] = 255  # parts with unlike numbers of labelled pixels
    params = {
        "first": rng.normal(size=(6, 4)).astype(np.float32),
        "second": rng.normal(size=(4, 2)).astype(np.float32),
    }
    return params, {"pre": pre, "post": post, "label": label}


def run(config, parts, params, batch):
    stats = {"seen": jnp.int32(0)}
    keep, key = dict(parts=parts, place=lambda tree: tree), jax.random.key(0)

    @jax.jit
    def gradients(params, batch):
        return loss_and_gradient(forward, config, params, stats, batch, key, **keep)

    return gradients(params, batch)


@pytest.mark.parametrize("config", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("parts", [2, 8])
def test_parts_together_are_the_whole(config, parts):
    params, batch = problem()
    total, terms, stats, gradient = run(config, parts, params, batch)
    expected, expected_terms, _, expected_gradient = run(config, 1, params, batch)
    assert stats["seen"] == parts
    np.testing.assert_allclose(total, expected, rtol=2e-6)
    assert terms.keys() == expected_terms.keys()
    for name, term in terms.items():
        np.testing.assert_allclose(term, expected_terms[name], rtol=2e-6)
    for name, array in gradient.items():
        scale = np.abs(expected_gradient[name]).max()
        np.testing.assert_allclose(array, expected_gradient[name], atol=1e-5 * scale)


def test_without_a_labelled_pixel_loss_and_gradient_are_0():
    params, batch = problem()
    batch["label"][:] = 255
    total, _, _, gradient = run(LOSSES["weighted, focal"], 4, params, batch)
    assert total == 0 and not any(np.any(array) for array in gradient.values())
