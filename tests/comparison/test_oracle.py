"""The oracle against an independent one, and its bound against scans that are right and wrong."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zzhnet_jax.comparison.accuracy import compare, compare_all, growth_along_sequence, spacing
from zzhnet_jax.comparison.cases import HARD_CASES, make_case
from zzhnet_jax.comparison.oracle import reference
from zzhnet_jax.comparison.recurrence import recurrence, recurrence_backward
from zzhnet_jax.kernels.selective_scan import selective_scan
from zzhnet_jax.kernels.selective_scan.shapes import ScanShape

SMALL = ScanShape("small", 2, 37, 8, 2, 3)
HARD = [name for name in HARD_CASES if name != "very_long"]


def float64_results(case):
    """Values and gradients by JAX: the sequential scan in float64, differentiated."""
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(x, jnp.float64) for name, x in case.arguments.items()}

        def scan(arguments):
            return selective_scan(
                **arguments,
                delta_softplus=case.delta_softplus,
                return_final_state=True,
                implementation="sequential",
            )

        y, pull, state = jax.vjp(scan, wide, has_aux=True)
        gradients = pull(jnp.asarray(case.cotangent, jnp.float64))[0]
        return jax.device_get({"y": y, "state": state} | gradients)


def float32_results(case, change=lambda arguments: arguments):
    def scan(arguments):
        return selective_scan(**change(arguments), delta_softplus=True, implementation="chunked")

    y, pull = jax.vjp(scan, {name: jnp.asarray(x) for name, x in case.arguments.items()})
    return jax.device_get({"y": y} | pull(jnp.asarray(case.cotangent, y.dtype))[0])


@pytest.mark.parametrize("length", [1, 2, 5, 16, 17])
def test_recurrence_in_pieces_is_the_recurrence(length):
    draw = np.random.default_rng(0).uniform
    decay, drive = draw(0.1, 1, (length, 3)), draw(-1, 1, (length, 3))
    expected, state = [], 0
    for t in range(length):
        state = decay[t] * state + drive[t]
        expected.append(state)
    np.testing.assert_allclose(recurrence(decay, drive), expected, rtol=1e-13)
    expected, reaching = [], 0
    for t in reversed(range(length)):
        reaching = drive[t] + (decay[t + 1] * reaching if t + 1 < length else 0)
        expected.append(reaching)
    np.testing.assert_allclose(recurrence_backward(decay, drive), expected[::-1], rtol=1e-13)


@pytest.mark.parametrize("changes", ["all", "no D", "no bias", "plain steps"])
def test_oracle_equals_jax_in_float64(changes):
    case = make_case(SMALL)
    arguments = dict(case.arguments)
    if changes == "no D":
        del arguments["D"]
    if changes == "no bias":
        del arguments["delta_bias"]
    if changes == "plain steps":
        case = replace(case, delta_softplus=False)
        arguments["delta"] = np.abs(arguments["delta"])
        del arguments["delta_bias"]
    case = replace(case, arguments=arguments)
    oracle, expected = reference(case, gradients=True), float64_results(case)
    assert oracle.values.keys() == oracle.bounds.keys() == expected.keys()
    for name, value in expected.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(oracle.values[name], value, rtol=1e-11, atol=1e-13 * scale)
        assert (oracle.bounds[name] > 0).all()


@pytest.mark.parametrize("name", HARD)
def test_a_right_scan_stays_within_the_bound(name):
    case = HARD_CASES[name]()
    figures = compare_all(float32_results(case), reference(case, gradients=True))
    assert {name: e.of_bound for name, e in figures.items() if not e.passed} == {}
    assert figures["y"].of_bound > 0.05  # the bound is of the order of what rounding does


WRONG = {
    "A by 2e-5": lambda x: x | {"A": x["A"] * (1 + 2e-5)},
    "steps in bfloat16": lambda x: x | {"delta": x["delta"].astype(jnp.bfloat16)},
    "C by 1e-5": lambda x: x | {"C": x["C"] * (1 + 1e-5)},
    "groups exchanged": lambda x: x | {"B": x["B"][:, :, ::-1]},
    "no D": lambda x: x | {"D": 0 * x["D"]},
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_scan_leaves_the_bound(what):
    case = make_case(SMALL)
    figures = compare_all(float32_results(case, WRONG[what]), reference(case, gradients=True))
    assert not figures["y"].passed and figures["y"].of_bound > 1


def test_a_wrong_gradient_leaves_the_bound():
    case = make_case(SMALL)
    results = float32_results(case)
    results["A"] = results["A"] * np.float32(1 + 1e-3)
    figures = compare_all(results, reference(case, gradients=True))
    assert [name for name, e in figures.items() if not e.passed] == ["A"]


def test_figures_of_known_errors():
    expected = np.array([1.0, -2.0, 4.0, 0.0])
    x = (expected + np.array([0, 2.0**-22, -(2.0**-20), 0])).astype(np.float32)
    figures = compare(x, expected, np.full(4, 2.0**-19))
    assert figures.max_abs == 2.0**-20 and figures.mean_abs == (2.0**-22 + 2.0**-20) / 4
    assert figures.max_rel == 2.0**-22 and figures.mean_rel == (2.0**-23 + 2.0**-22) / 3
    # A unit in the last place is 2^-22 at 2 and 2^-21 at 4.
    assert figures.max_ulp == 2 and figures.mean_ulp == 1
    assert figures.max_of_scale == 2.0**-22 and figures.of_bound == 0.5 and figures.passed
    assert not compare(np.array([np.nan]), np.ones(1), np.ones(1)).passed
    assert not compare(np.array([np.inf]), np.ones(1), np.full(1, np.inf)).passed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_spacing_is_the_distance_of_neighbours(dtype):
    values = jnp.asarray([1.0, 1.5, 3.0, 0.37, 1e-3], dtype)
    after = jnp.nextafter(values, jnp.asarray(jnp.inf, dtype))
    distance = np.asarray(after, np.float64) - np.asarray(values, np.float64)
    np.testing.assert_array_equal(spacing(np.asarray(values, np.float64), values.dtype), distance)


def test_growth_is_told_by_pieces_of_the_sequence():
    expected = np.ones((1, 100, 2))
    y = expected.copy()
    y[:, 70] += 0.5
    pieces = growth_along_sequence(y, expected, expected)
    assert [(p.first, p.last) for p in pieces] == [(1, 16), (17, 64), (65, 100)]
    assert [p.max_of_scale for p in pieces] == [0, 0, 0.5]
    assert pieces[2].norm == pytest.approx(0.5 / 6) and pieces[2].bound_norm == 1
