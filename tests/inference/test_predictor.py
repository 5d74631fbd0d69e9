"""The predictor, with small networks whose answers can be computed in numpy."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zzhnet_jax.errors import CheckpointError, ConfigError, DataError
from zzhnet_jax.inference import predictor as module
from zzhnet_jax.inference.predictor import Predictor, predict


@dataclass(frozen=True)
class Card:
    mean: tuple[float, ...] = (10.0, 20.0, 30.0)
    std: tuple[float, ...] = (50.0, 60.0, 70.0)
    threshold: float = 0.5


class Stub(nnx.Module):
    """Logits of each pixel: minus and plus gain * mean(post - pre / 2), moved `right` columns.

    With `right`, the answer depends on the pixel to the left and on which date comes first.
    """

    def __init__(self, gain=2.0, right=0, output="logits"):
        self.gain = nnx.Param(jnp.asarray(gain))
        self.right, self.output, self.card = right, output, Card()

    def __call__(self, pre, post, *, key=None):
        z = self.gain[...] * jnp.roll((post - pre / 2).mean(-1), self.right, axis=2)
        logits = jnp.stack([-z, z], axis=-1)
        return logits if self.output == "logits" else {self.output: logits}


def expected(pre, post, gain=2.0):
    pre, post = ((image - np.array(Card.mean)) / Card.std for image in (pre, post))
    return 1 / (1 + np.exp(-2 * gain * (post - pre / 2).mean(-1)))


def pair(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (2, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(16, 16), (37, 50), (5, 9)])
def test_probability_equals_the_formula_at_any_size(shape):
    pre, post = pair(*shape)
    probability = Predictor(Stub(), tile_size=16, overlap=4, batch_size=3).probability(pre, post)
    assert probability.dtype == np.float32 and probability.shape == shape
    np.testing.assert_allclose(probability, expected(pre, post), atol=1e-6)


def test_stream_keeps_order_shares_batches_and_compiles_once():
    shapes = [(16, 16), (40, 17), (3, 3), (16, 16), (16, 16)]  # 1 + 8 + 1 + 1 + 1 tiles
    samples = [
        dict(zip(("pre", "post"), pair(*s, seed=i), strict=True), name=f"n{i}")
        for i, s in enumerate(shapes)
    ]
    predictor = Predictor(Stub(), tile_size=16, overlap=4, batch_size=4)
    launched = []
    forward = predictor._forward
    predictor._forward = lambda *images: launched.append(images[0].shape) or forward(*images)
    before = module._change_probability._cache_size()
    results = list(predictor.stream(iter(samples)))
    assert module._change_probability._cache_size() <= before + 1
    assert launched == [(4, 16, 16, 3)] * 3
    assert [sample["name"] for sample, _ in results] == ["n0", "n1", "n2", "n3", "n4"]
    for sample, probability in results:
        truth = expected(sample["pre"], sample["post"])
        np.testing.assert_allclose(probability, truth, atol=1e-6)


def test_stream_reads_no_more_than_it_needs():
    read = []

    def samples():
        for index in range(50):
            read.append(index)
            pre, post = pair(16, 16, index)
            yield {"pre": pre, "post": post}

    stream = Predictor(Stub(), tile_size=16, overlap=4, batch_size=4).stream(samples())
    next(stream)
    assert len(read) <= 8


def test_new_weights_are_used_without_compiling_again():
    pre, post = pair(16, 16)
    first = Predictor(Stub(2.0), tile_size=16, overlap=4, batch_size=1).probability(pre, post)
    compiled = module._change_probability._cache_size()
    second = Predictor(Stub(0.5), tile_size=16, overlap=4, batch_size=1).probability(pre, post)
    assert module._change_probability._cache_size() == compiled
    np.testing.assert_allclose(first, expected(pre, post, 2.0), atol=1e-6)
    np.testing.assert_allclose(second, expected(pre, post, 0.5), atol=1e-6)


def shifted(pre, post):
    return np.roll(expected(pre, post), 1, axis=1)


@pytest.mark.parametrize("exchange", [False, True])
def test_flips_and_exchange_average_the_views(exchange):
    pre, post = pair(8, 8)
    options = dict(tile_size=8, overlap=0, batch_size=1)
    views = []
    for a, b in [(pre, post), (post, pre)][: 1 + exchange]:
        for axes in [(), (0,), (1,), (0, 1)]:
            views.append(np.flip(shifted(np.flip(a, axes), np.flip(b, axes)), axes))
    predictor = Predictor(Stub(right=1), flips=True, exchange_dates=exchange, **options)
    np.testing.assert_allclose(predictor.probability(pre, post), np.mean(views, 0), atol=1e-6)
    if exchange:
        both = Predictor(Stub(right=1), exchange_dates=True, **options).probability(pre, post)
        truth = (shifted(pre, post) + shifted(post, pre)) / 2
        np.testing.assert_allclose(both, truth, atol=1e-6)


def test_predict_thresholds_with_the_card_unless_told_otherwise():
    pre, post = pair(20, 12)
    found = predict(Stub(), pre, post)
    np.testing.assert_allclose(found.probability, expected(pre, post), atol=1e-6)
    assert found.mask.dtype == np.uint8
    np.testing.assert_array_equal(found.mask, found.probability >= 0.5)
    lower = predict(Stub(), pre, post, threshold=0.2).mask
    np.testing.assert_array_equal(lower, found.probability >= np.float32(0.2))
    assert lower.sum() > found.mask.sum()


def test_a_dict_with_change_is_understood_and_one_without_refused():
    pre, post = pair(8, 8)
    np.testing.assert_allclose(
        predict(Stub(output="change"), pre, post).probability, expected(pre, post), atol=1e-6
    )
    with pytest.raises(CheckpointError, match="tells damage, not change"):
        predict(Stub(output="damage"), pre, post)


def test_an_answer_that_is_no_number_is_refused():
    with pytest.raises(CheckpointError, match="not a number"):
        predict(Stub(gain=np.nan), *pair(8, 8))


@pytest.mark.parametrize(
    ("pre", "post", "message"),
    [
        (np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8), "8x8 and 9x8 pixels"),
        (
            np.zeros((8, 8), np.uint8),
            np.zeros((8, 8), np.uint8),
            r"the pre image has shape \(8, 8\)",
        ),
        (np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 4), np.uint8), r"\(height, width, 3\)"),
        (np.zeros((8, 8, 3)), np.zeros((8, 8, 3)), "float64; give uint8"),
        (np.zeros((0, 8, 3), np.uint8), np.zeros((0, 8, 3), np.uint8), "shape"),
    ],
)
def test_unusable_images_are_refused(pre, post, message):
    with pytest.raises(DataError, match=message):
        predict(Stub(), pre, post)


@pytest.mark.parametrize(
    "option", [{"threshold": 1.5}, {"tile_size": 0}, {"overlap": 256}, {"batch_size": 0}]
)
def test_unusable_options_are_refused(option):
    pre, post = pair(8, 8)
    with pytest.raises(ConfigError, match=next(iter(option))):
        predict(Stub(), pre, post, **option)
