"""Binary counts, metrics and threshold sweep against hand or brute-force numbers."""

import json
import math

import numpy as np
import pytest

from zzhnet_jax.evaluation import (
    BinaryConfusion,
    ThresholdSweep,
    binary_metrics,
    change_mask,
    confusion_matrix,
    json_ready,
    multiclass_metrics,
    undefined_reasons,
)


def test_metrics_of_a_table_worked_by_hand():
    # 100 pixels: observed agreement 0.85; chance 0.30*0.25 + 0.70*0.75 = 0.60; kappa = 0.25 / 0.40.
    metrics = binary_metrics(BinaryConfusion(tp=20, fp=5, fn=10, tn=65))
    expected = dict(oa=0.85, precision=0.8, recall=2 / 3, f1=8 / 11, iou=4 / 7, kappa=0.625)
    assert metrics == pytest.approx(expected, rel=1e-15)


def test_counts_ignore_255_and_add_up():
    label = np.array([[0, 1, 255], [1, 0, 1]], np.uint8)
    prediction = np.array([[1, 1, 1], [0, 0, 1]], np.uint8)
    whole = BinaryConfusion.count(prediction, label)
    assert whole == BinaryConfusion(tp=2, fp=1, fn=1, tn=1)
    assert whole.total == 5 and whole.changed == 3
    rows = [BinaryConfusion.count(prediction[i], label[i]) for i in (0, 1)]
    assert rows[0] + rows[1] == whole
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        BinaryConfusion.count(prediction[:, :2], label)


def test_huge_counts_do_not_overflow():
    n = 10**12
    metrics = binary_metrics(BinaryConfusion(tp=n, fp=n, fn=n, tn=n))
    assert metrics["kappa"] == 0 and metrics["oa"] == 0.5


@pytest.mark.parametrize(
    ("confusion", "undefined"),
    [
        (BinaryConfusion(), {"oa", "precision", "recall", "f1", "iou", "kappa"}),
        (BinaryConfusion(tn=9), {"precision", "recall", "f1", "iou", "kappa"}),
        (BinaryConfusion(fn=3, tn=6), {"precision"}),
        (BinaryConfusion(fp=3, tn=6), {"recall"}),
        (BinaryConfusion(tp=1, fp=1, fn=1, tn=1), set()),
    ],
)
def test_undefined_metrics_are_null_with_a_reason(confusion, undefined):
    metrics = binary_metrics(confusion)
    assert {name for name, value in metrics.items() if math.isnan(value)} == undefined
    assert set(undefined_reasons(confusion)) == undefined
    written = json.loads(json.dumps(json_ready(metrics), allow_nan=False))
    assert {name for name, value in written.items() if value is None} == undefined
    if "recall" in undefined and confusion.total:
        assert undefined_reasons(confusion)["recall"] == "the labels hold no changed pixel"


def test_confusion_matrix_counts_every_pair():
    rng = np.random.default_rng(0)
    label, prediction = rng.integers(0, 4, (2, 50, 7))
    label[::5] = 255
    expected = [[np.sum((label == i) & (prediction == j)) for j in range(4)] for i in range(4)]
    np.testing.assert_array_equal(confusion_matrix(prediction, label, 4), expected)
    with pytest.raises(ValueError, match=r"label has values 0\.\.3"):
        confusion_matrix(prediction, label, 3)


def test_multiclass_metrics_agree_with_binary_and_leave_out_absent_classes():
    matrix = np.array([[65, 5, 0], [10, 20, 0], [0, 0, 0]])
    metrics = multiclass_metrics(matrix)
    binary = binary_metrics(BinaryConfusion(tp=20, fp=5, fn=10, tn=65))
    assert metrics["oa"] == binary["oa"] and metrics["kappa"] == pytest.approx(binary["kappa"])
    assert metrics["iou"][1] == binary["iou"] and metrics["f1"][1] == binary["f1"]
    assert math.isnan(metrics["iou"][2])
    assert metrics["miou"] == pytest.approx((65 / 80 + 20 / 35) / 2)


def sample(seed=0, size=4000, bins=11):
    rng = np.random.default_rng(seed)
    label = rng.choice([0, 1, 255], size, p=[0.7, 0.2, 0.1]).astype(np.uint8)
    probability = np.clip(rng.normal(0.3 + 0.3 * (label == 1), 0.25), 0, 1).astype(np.float32)
    on_grid = rng.random(size) < 0.3  # probabilities that equal a threshold exactly
    grid = (np.arange(bins) / (bins - 1)).astype(np.float32)
    return np.where(on_grid, grid[rng.integers(0, bins, size)], probability), label


def test_sweep_equals_thresholding_at_every_threshold():
    probability, label = sample()
    sweep = ThresholdSweep(11)
    sweep.update(probability, label)
    assert sweep.counts.dtype == np.int64
    brute = [BinaryConfusion.count(change_mask(probability, t), label) for t in sweep.thresholds]
    assert [sweep.confusion(i) for i in range(11)] == brute
    f1 = [binary_metrics(c)["f1"] for c in brute]
    np.testing.assert_allclose(sweep.f1(), f1, rtol=1e-15)
    threshold, best = sweep.best()
    assert best == max(f1) and threshold == sweep.thresholds[int(np.argmax(f1))]


def test_sweeps_of_parts_add_up_to_the_whole():
    probability, label = sample()
    whole, first, second = ThresholdSweep(), ThresholdSweep(), ThresholdSweep()
    whole.update(probability, label)
    first.update(probability[:1000], label[:1000])
    second.update(probability[1000:], label[1000:])
    np.testing.assert_array_equal((first + second).counts, whole.counts)
    gathered = ThresholdSweep(counts=np.stack([first.counts, second.counts]).sum(0))
    assert gathered.best() == whole.best()


def test_best_threshold_is_the_middle_of_equally_good_ones():
    sweep = ThresholdSweep()
    sweep.update(np.array([0.2, 0.8], np.float32), np.array([0, 1]))
    assert sweep.best() == (pytest.approx(0.5, abs=2e-3), 1.0)


def test_sweep_without_change_has_no_best_f1():
    sweep = ThresholdSweep()
    sweep.update(np.full((4, 4), 0.1, np.float32), np.zeros((4, 4), np.uint8))
    threshold, f1 = sweep.best()
    assert threshold == 0.5 and math.isnan(f1)


@pytest.mark.parametrize("bad", [np.nan, -0.1, 1.1])
def test_sweep_refuses_what_is_no_probability(bad):
    with pytest.raises(ValueError, match=r"not within 0\.\.1"):
        ThresholdSweep().update(np.array([0.5, bad], np.float32), np.array([0, 1]))
