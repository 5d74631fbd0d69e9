"""The evaluation report: pooled and per-image figures, groups, JSON."""

import json
import math

import numpy as np
import pytest

from zzhnet_jax.evaluation import (
    BinaryConfusion,
    binary_metrics,
    evaluate_predictions,
    evaluate_source,
)


def sample(name, seed, changed=True):
    rng = np.random.default_rng(seed)
    pre, post = rng.integers(0, 256, (2, 6, 8, 3), dtype=np.uint8)
    label = (rng.random((6, 8)) < 0.3).astype(np.uint8) if changed else np.zeros((6, 8), np.uint8)
    label[0, 0] = 255
    return dict(pre=pre, post=post, label=label, name=name)


def probability(pre, post):
    return np.abs(post[..., 0].astype(np.float32) - pre[..., 0]) / 255


SOURCE = [sample("oscd_a_0", 1), sample("levir_b_0", 2), sample("oscd_c_1", 3, changed=False)]


def brute_force(samples, threshold):
    counts = dict(tp=0, fp=0, fn=0, tn=0)
    for s in samples:
        predicted = probability(s["pre"], s["post"]) >= np.float32(threshold)
        for p, t in zip(predicted.ravel(), s["label"].ravel(), strict=True):
            if t != 255:
                counts[("t" if p == t else "f") + ("p" if p else "n")] += 1
    return BinaryConfusion(**counts)


def test_report_equals_counting_pixel_by_pixel():
    report = evaluate_source(probability, SOURCE, threshold=0.4)
    assert report.confusion == brute_force(SOURCE, 0.4)
    assert report.metrics == binary_metrics(brute_force(SOURCE, 0.4))
    for image, s in zip(report.images, SOURCE, strict=True):
        assert image.name == s["name"] and image.confusion == brute_force([s], 0.4)
    assert report.groups == {
        "oscd": brute_force([SOURCE[0], SOURCE[2]], 0.4),
        "levir": brute_force([SOURCE[1]], 0.4),
    }
    grid = [binary_metrics(brute_force(SOURCE, t))["f1"] for t in np.arange(0, 1001, 50) / 1000]
    assert report.sweep.best()[1] >= max(grid)


def test_stream_and_source_agree():
    stream = ((probability(s["pre"], s["post"]), s["label"], s["name"]) for s in SOURCE)
    streamed = evaluate_predictions(stream, threshold=0.4)
    assert streamed.to_json() == evaluate_source(probability, SOURCE, threshold=0.4).to_json()


def test_json_says_why_a_figure_is_missing():
    report = evaluate_source(probability, SOURCE[2:], threshold=0.4)
    written = json.loads(json.dumps(report.to_json(per_group=True), allow_nan=False))
    assert written["metrics"]["recall"] is None
    assert written["undefined"] == {"recall": "the labels hold no changed pixel"}
    assert written["metrics"]["f1"] == 0  # false alarms are a defined failure
    assert written["best_on_these_images"] == {"threshold": 0.5, "f1": None}
    assert written["pixels"] == 47 and written["changed_share"] == 0
    assert written["per_image"][0]["name"] == "oscd_c_1"
    assert list(written["groups"]) == ["oscd"]


def test_shape_mismatch_is_refused():
    with pytest.raises(ValueError, match="its label"):
        evaluate_predictions([(np.zeros((4, 4)), np.zeros((5, 4)), "a")], threshold=0.5)


def test_empty_stream_gives_an_undefined_report():
    report = evaluate_predictions([], threshold=0.5)
    assert math.isnan(report.metrics["oa"]) and report.to_json()["images"] == 0
