"""Semantic-change and damage figures, by hand and against the public implementations' numbers."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from zzhnet_jax.evaluation import BinaryConfusion, binary_metrics, confusion_matrix
from zzhnet_jax.evaluation.damage import BuildingDamage, harmonic_mean
from zzhnet_jax.evaluation.metrics import multiclass_metrics
from zzhnet_jax.evaluation.semantic import SemanticChange, transition_index

GOLDENS = os.environ.get("ZZHNET_GOLDENS")
FILES = sorted(Path(GOLDENS).glob("change_detection/metrics_*.npz")) if GOLDENS else []
needs_goldens = pytest.mark.skipif(
    not FILES, reason="ZZHNET_GOLDENS is not set or holds no change_detection/metrics_*.npz"
)


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def golden(request):
    with np.load(request.param) as arrays:
        case = dict(arrays)
    noise = json.loads(str(case["config"]))["noise_rel_max"]
    return case, dict(rtol=max(20 * noise, 1e-5))


@needs_goldens
def test_binary_golden(golden):
    case, tolerance = golden
    metrics = binary_metrics(BinaryConfusion.count(case["in/bcd_preds"], case["in/bcd_labels"]))
    order = ("recall", "precision", "oa", "f1", "iou", "kappa")
    np.testing.assert_allclose([metrics[name] for name in order], case["out/bcd"], **tolerance)


@needs_goldens
def test_semantic_golden(golden):
    case, tolerance = golden
    index = {
        kind: transition_index(*(case[f"in/scd_{part}_{kind}"] for part in ("change", "t1", "t2")))
        for kind in ("pred", "label")
    }
    np.testing.assert_array_equal(index["pred"], case["out/scd_pred_index"])
    np.testing.assert_array_equal(index["label"], case["out/scd_label_index"])
    metrics = SemanticChange.count(index["pred"], index["label"]).metrics()
    order = ("kappa_n0", "fscd", "miou", "sek", "oa")
    np.testing.assert_allclose([metrics[name] for name in order], case["out/scd"], **tolerance)


@needs_goldens
def test_damage_golden(golden):
    case, tolerance = golden
    metrics = BuildingDamage.count(
        building_prediction=case["in/bda_loc_pred"],
        damage_prediction=case["in/bda_clf_pred"],
        building_label=case["in/bda_loc_label"],
        damage_label=case["in/bda_clf_label"],
    ).metrics()
    order = ("localisation_f1", "damage_f1", "overall")
    np.testing.assert_allclose([metrics[name] for name in order], case["out/bda"], **tolerance)
    np.testing.assert_allclose(metrics["class_f1"], case["out/bda_per_class_f1"], **tolerance)


@needs_goldens
def test_multiclass_golden(golden):
    case, tolerance = golden
    metrics = multiclass_metrics(confusion_matrix(case["in/mc_pred"], case["in/mc_label"], 4))
    order = ("oa", "miou", "kappa")
    np.testing.assert_allclose([metrics[name] for name in order], case["out/mc"], **tolerance)
    np.testing.assert_allclose(metrics["iou"], case["out/mc_iou"], **tolerance)


def test_transitions_are_numbered_and_a_class_outside_is_refused():
    change = np.array([1, 1, 1, 0])
    before, after = np.array([1, 6, 2, 0]), np.array([1, 6, 5, 3])
    np.testing.assert_array_equal(transition_index(change, before, after), [1, 36, 11, 0])
    with pytest.raises(ValueError, match=r"before has classes 0\.\.6 at changed pixels"):
        transition_index(change, np.array([1, 6, 0, 0]), after)


def test_semantic_figures_by_hand():
    # two images of 4 pixels; classes 1..2, so transitions 0..4
    label = np.array([[[0, 0], [1, 2]], [[0, 3], [3, 4]]])
    prediction = np.array([[[0, 0], [1, 3]], [[2, 3], [0, 4]]])
    counts = SemanticChange.count(prediction, label, num_classes=2)
    halves = [
        SemanticChange.count(prediction[i : i + 1], label[i : i + 1], num_classes=2) for i in (0, 1)
    ]
    np.testing.assert_array_equal((halves[0] + halves[1]).matrix, counts.matrix)
    metrics = counts.metrics()
    # changed: 5 labelled, 5 predicted, 4 in both, 3 with the right transition; 2 of 8 rightly not
    iou_changed = 4 / 6
    # without rightly unchanged, n = 6: rows (1, 1, 1, 2, 1), columns (1, 1, 1, 2, 1), trace 3
    kappa = (6 * 3 - 8) / (36 - 8)
    expected = dict(
        kappa_n0=kappa,
        fscd=2 * 3 / (5 + 5),
        miou=(2 / 4 + iou_changed) / 2,
        sek=kappa * math.exp(iou_changed - 1),
        oa=(3 / 4 + 2 / 4) / 2,
    )
    assert metrics == pytest.approx(expected, rel=1e-12)


def test_damage_figures_by_hand():
    counts = BuildingDamage.count(
        building_prediction=np.array([1, 1, 1, 0, 1, 0]),
        damage_prediction=np.array([1, 2, 1, 3, 4, 0]),
        building_label=np.array([1, 1, 1, 1, 0, 0]),
        damage_label=np.array([1, 2, 2, 3, 0, 0]),
    )
    metrics = counts.metrics()
    # class 1: 1 hit of 2 predicted, 1 labelled; class 2: 1 of 1, 2; class 3: right; class 4: none
    np.testing.assert_allclose(metrics["class_f1"], [2 / 3, 2 / 3, 1, np.nan])
    assert metrics["damage_f1"] == pytest.approx(3 / (1.5 + 1.5 + 1))
    assert metrics["localisation_f1"] == pytest.approx(2 * 3 / (4 + 4))
    assert metrics["overall"] == pytest.approx(0.3 * 0.75 + 0.7 * 0.75)
    doubled = (counts + counts).metrics()
    np.testing.assert_allclose(doubled["class_f1"], metrics["class_f1"])


def test_harmonic_mean_edge_cases():
    assert harmonic_mean(np.array([0.5, 0.0])) == 0
    assert math.isnan(harmonic_mean(np.array([])))
