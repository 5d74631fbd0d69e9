"""Functions of the Pallas scan for GPUs against float64, in units of float32's rounding."""

import numpy as np
import pytest

from zzhnet_jax.kernels.selective_scan.pallas_gpu_math import softplus_of_log2

UNIT = 2.0**-24


@pytest.mark.parametrize("most", [1, 20, 120])
def test_softplus(most):
    scaled = np.linspace(-most, most, 100001, dtype=np.float32)
    x = scaled.astype(np.float64) * np.log(2)
    expected = np.logaddexp(0, x)
    slope = np.exp(x - expected)
    value, find_slope = softplus_of_log2(scaled, interpret=True)
    # A CPU takes a power of two as an exponential, whose argument it rounds; a GPU does not.
    rounding = UNIT * np.abs(x) * (x < 0)
    assert np.all(np.abs(np.asarray(value, np.float64) / expected - 1) <= 8 * UNIT + rounding)
    assert np.all(np.abs(np.asarray(find_slope()) / slope - 1) <= 6 * UNIT + rounding)


def test_identity_where_it_is_large():
    """As PyTorch has it: from 20 on softplus(x) is x, to the last digit but one."""
    x = np.linspace(20, 1e4, 1001, dtype=np.float32)
    value, find_slope = softplus_of_log2((x * np.log2(np.e)).astype(np.float32), interpret=True)
    np.testing.assert_allclose(value, x, rtol=3 * UNIT)
    assert np.all(np.asarray(find_slope()) == 1)
