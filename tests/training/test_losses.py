"""Losses against independent numpy code, torch, and the reference implementation's own figures."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zzhnet_jax.errors import ConfigError
from zzhnet_jax.training.config import LossConfig
from zzhnet_jax.training.losses import (
    cross_entropy,
    dice,
    focal,
    lovasz_softmax,
    segmentation_loss,
)

GOLDEN = "change_detection/bcdtrain_new_h32_ln.npz"


def case(classes, seed=0, shape=(2, 5, 7), spread=2.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, (*shape, classes)).astype(np.float32)
    labels = rng.integers(0, classes, shape).astype(np.int32)
    labels[rng.random(shape) < 0.2] = 255
    return logits, labels


def probabilities(logits):
    """Of the labelled pixels, in float64 (pixels, classes)."""
    z = logits.astype(np.float64)
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def numpy_cross_entropy(logits, labels, weights=None):
    p, y = probabilities(logits)[labels != 255], labels[labels != 255]
    w = np.ones(len(y)) if weights is None else np.asarray(weights)[y]
    return (-np.log(p[np.arange(len(y)), y]) * w).sum() / w.sum()


def numpy_focal(logits, labels, gamma):
    p, y = probabilities(logits)[labels != 255], labels[labels != 255]
    p = p[np.arange(len(y)), y]
    return np.mean(-((1 - p) ** gamma) * np.log(p))


def numpy_dice(logits, labels):
    p, y = probabilities(logits)[labels != 255], labels[labels != 255]
    losses = [
        1 - 2 * p[y == c, c].sum() / (p[:, c].sum() + (y == c).sum())
        for c in range(p.shape[1])
        if (y == c).any()
    ]
    return np.mean(losses)


def numpy_lovasz(logits, labels):
    """By its definition: the extension of 1 - IoU, one more wrong pixel at a time."""
    p, y = probabilities(logits)[labels != 255], labels[labels != 255]
    losses = []
    for c in range(p.shape[1]):
        truth = y == c
        if not truth.any():
            continue
        errors = np.where(truth, 1 - p[:, c], p[:, c])
        wrong, before, loss = np.zeros(len(y), bool), 0.0, 0.0
        for pixel in np.argsort(-errors, kind="stable"):
            wrong[pixel] = True
            predicted = truth ^ wrong
            jaccard = 1 - (truth & predicted).sum() / (truth | predicted).sum()
            loss += errors[pixel] * (jaccard - before)
            before = jaccard
        losses.append(loss)
    return np.mean(losses)


@pytest.mark.parametrize("classes", [2, 4])
def test_each_term_equals_its_formula(classes):
    logits, labels = case(classes)
    weights = tuple(np.linspace(0.5, 2, classes))
    close = pytest.approx
    assert cross_entropy(logits, labels) == close(numpy_cross_entropy(logits, labels), rel=1e-6)
    weighted = cross_entropy(logits, labels, weights=weights)
    assert weighted == close(numpy_cross_entropy(logits, labels, weights), rel=1e-6)
    assert focal(logits, labels, gamma=1.5) == close(numpy_focal(logits, labels, 1.5), rel=1e-6)
    assert dice(logits, labels) == close(numpy_dice(logits, labels), rel=1e-6)
    assert lovasz_softmax(logits, labels) == close(numpy_lovasz(logits, labels), rel=1e-6)


@pytest.mark.parametrize("term", [cross_entropy, focal, dice, lovasz_softmax])
def test_a_class_that_is_absent_and_ignored_pixels_do_not_count(term):
    logits, labels = case(3, seed=1)
    labels[labels == 2] = 0
    other = np.where((labels == 255)[..., None], 7.0, logits).astype(np.float32)
    assert term(logits, labels) == pytest.approx(float(term(other, labels)), rel=1e-6)
    if term in (dice, lovasz_softmax):
        numpy_term = {dice: numpy_dice, lovasz_softmax: numpy_lovasz}[term]
        assert term(logits, labels) == pytest.approx(numpy_term(logits, labels), rel=1e-6)


@pytest.mark.parametrize("term", [cross_entropy, focal, dice, lovasz_softmax])
def test_nothing_labelled_gives_zero_and_no_gradient(term):
    logits, labels = case(2)
    value, gradient = jax.value_and_grad(term)(jnp.asarray(logits), np.full_like(labels, 255))
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize("term", [cross_entropy, focal, dice, lovasz_softmax])
def test_gradients_equal_differences_and_stay_finite_far_out(term):
    logits, labels = case(2, seed=2)
    gradient = jax.jit(jax.grad(term))(jnp.asarray(logits), labels)
    numpy_term = {
        cross_entropy: numpy_cross_entropy,
        focal: lambda x, y: numpy_focal(x, y, 2.0),
        dice: numpy_dice,
        lovasz_softmax: numpy_lovasz,
    }[term]
    for place in [(0, 0, 0, 0), (1, 3, 2, 1), (0, 4, 6, 1)]:
        step = np.zeros(logits.shape)
        step[place] = 1e-4
        difference = (numpy_term(logits + step, labels) - numpy_term(logits - step, labels)) / 2e-4
        assert gradient[place] == pytest.approx(difference, rel=2e-3, abs=1e-6)
    assert np.isfinite(jax.grad(term)(jnp.asarray(logits * 1e4), labels)).all()


def test_the_sum_is_weighted_and_skips_terms_without_weight():
    logits, labels = case(2)
    config = LossConfig(cross_entropy=0.5, lovasz=0.75, dice=0.0, focal=2.0, focal_gamma=3.0)
    total, terms = segmentation_loss(logits, labels, config)
    assert sorted(terms) == ["cross_entropy", "focal", "lovasz"]
    expected = (
        0.5 * numpy_cross_entropy(logits, labels)
        + 0.75 * numpy_lovasz(logits, labels)
        + 2.0 * numpy_focal(logits, labels, 3.0)
    )
    assert total == pytest.approx(expected, rel=1e-6)


@pytest.mark.torch
def test_cross_entropy_equals_torch():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    logits, labels = case(3)
    weights = (0.3, 1.0, 2.0)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).permute(0, 3, 1, 2),
        torch.from_numpy(labels).long(),
        weight=torch.tensor(weights),
        ignore_index=255,
    )
    assert cross_entropy(logits, labels, weights=weights) == pytest.approx(
        float(expected), rel=1e-6
    )


def test_the_reference_training_loss():
    goldens = os.environ.get("ZZHNET_GOLDENS")
    if not goldens:
        pytest.skip("ZZHNET_GOLDENS is not set: the folder of reference arrays")
    with np.load(Path(goldens) / GOLDEN) as arrays:
        logits = arrays["out/logits"].transpose(0, 2, 3, 1)
        labels = arrays["in/labels"]
        total, terms = segmentation_loss(logits, labels, LossConfig(1.0, 0.75))
        assert terms["cross_entropy"] == pytest.approx(float(arrays["out/loss_ce"]), rel=1e-5)
        assert terms["lovasz"] == pytest.approx(float(arrays["out/lovasz"]), rel=1e-5)
        assert total == pytest.approx(float(arrays["out/loss_total"]), rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"cross_entropy": 0.0}, "train.loss"),
        ({"lovasz": -1.0}, "train.loss"),
        ({"class_weights": (1.0, 0.0)}, "train.loss.class_weights"),
        ({"focal_gamma": 0.5}, "train.loss.focal_gamma"),
    ],
)
def test_impossible_losses_are_refused(fields, named):
    with pytest.raises(ConfigError, match=named):
        LossConfig(**fields)
