"""Arguments that do not fit are refused by name, with what was expected."""

import numpy as np
import pytest

from zzhnet_jax.kernels.selective_scan import (
    ShapeError,
    UnavailableError,
    available_implementations,
    selective_scan,
    selective_scan_step,
)
from zzhnet_jax.kernels.selective_scan.api import IMPLEMENTATIONS
from zzhnet_jax.kernels.selective_scan.base import Implementation

SHAPES = dict(
    u=(2, 5, 8), delta=(2, 5, 8), A=(8, 3), B=(2, 5, 4, 3), C=(2, 5, 4, 3), D=(8,),
    delta_bias=(8,), initial_state=(2, 8, 3),
)  # fmt: skip


def arguments(**shapes):
    return {name: np.ones(shape, np.float32) for name, shape in (SHAPES | shapes).items()}


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("u", (5, 8), r"u has shape \(5, 8\): expected \(batch, length, channels\), all >= 1"),
        ("u", (2, 0, 8), r"u has shape \(2, 0, 8\): expected \(batch, length, channels\), all"),
        ("delta", (2, 5, 1), r"delta has shape \(2, 5, 1\): expected \(2, 5, 8\)"),
        ("A", (3, 8), r"A has shape \(3, 8\): expected \(8, d_state >= 1\)"),
        ("A", (8,), r"A has shape \(8,\): expected \(8, d_state >= 1\)"),
        ("B", (2, 5, 3), r"B has shape \(2, 5, 3\): expected \(2, 5, groups, 3\)"),
        ("B", (2, 4, 4, 3), r"B has shape \(2, 4, 4, 3\): expected \(2, 5, groups, 3\)"),
        (
            "B",
            (2, 5, 3, 3),
            r"B has shape \(2, 5, 3, 3\): expected groups, axis 2, to divide the 8",
        ),
        ("C", (2, 5, 2, 3), r"C has shape \(2, 5, 2, 3\): expected \(2, 5, 4, 3\)"),
        ("D", (1,), r"D has shape \(1,\): expected \(8,\)"),
        ("delta_bias", (4, 2), r"delta_bias has shape \(4, 2\): expected \(8,\)"),
        ("initial_state", (8, 3), r"initial_state has shape \(8, 3\): expected \(2, 8, 3\)"),
    ],
)
def test_wrong_shape(name, shape, expected):
    with pytest.raises(ShapeError, match=expected):
        selective_scan(**arguments(**{name: shape}))


@pytest.mark.parametrize("name", SHAPES)
def test_integers_are_refused(name):
    given = arguments()
    given[name] = given[name].astype(np.int32)
    with pytest.raises(ShapeError, match=f"{name} has dtype int32: expected a floating dtype"):
        selective_scan(**given)


def test_unknown_implementation():
    message = r"'cuda' cannot run here: there is none of that name; available: sequential, assoc"
    with pytest.raises(UnavailableError, match=message):
        selective_scan(**arguments(), implementation="cuda")


def test_unavailable_implementation(monkeypatch):
    """It is left out of the list and says why; the default does not depend on it."""
    scan = IMPLEMENTATIONS["sequential"].scan
    item = Implementation(scan, unavailable=lambda: "it needs a moon base")
    monkeypatch.setitem(IMPLEMENTATIONS, "lunar", item)
    assert "lunar" not in available_implementations()
    with pytest.raises(UnavailableError, match="'lunar' cannot run here: it needs a moon base; "):
        selective_scan(**arguments(), implementation="lunar")
    assert selective_scan(**arguments()).shape == (2, 5, 8)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("state", (2, 3, 8), r"state has shape \(2, 3, 8\): expected \(2, 8, 3\)"),
        ("u_t", (2, 1, 8), r"u_t has shape \(2, 1, 8\): expected 2 axes"),
        ("delta_t", (2, 7), r"delta_t has shape \(2, 7\): expected \(2, 8\)"),
        ("B_t", (2, 4, 2), r"B_t has shape \(2, 4, 2\): expected \(2, 4, 3\)"),
        ("B_t", (2, 3, 3), r"B has shape \(2, 1, 3, 3\): expected groups"),
        ("C_t", (2, 2, 3), r"C_t has shape \(2, 2, 3\): expected \(2, 4, 3\)"),
        ("D", (3,), r"D has shape \(3,\): expected \(8,\)"),
    ],
)
def test_wrong_shape_of_a_step(name, shape, expected):
    shapes = dict(
        state=(2, 8, 3), u_t=(2, 8), delta_t=(2, 8), A=(8, 3), B_t=(2, 4, 3), C_t=(2, 4, 3)
    )
    given = {k: np.ones(v, np.float32) for k, v in (shapes | {name: shape}).items()}
    if shape == (2, 3, 3):  # a number of groups that does not divide the channels, in both
        given["C_t"] = given["B_t"]
    with pytest.raises(ShapeError, match=expected):
        selective_scan_step(**given)
