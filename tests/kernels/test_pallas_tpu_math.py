"""Softplus and its derivative in the kernels for TPUs, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zzhnet_jax.kernels.cross_scan import fused
from zzhnet_jax.kernels.selective_scan import pallas_tpu
from zzhnet_jax.kernels.selective_scan.pallas_tpu_math import logistic, softplus

X = np.concatenate([np.linspace(-87, 87, 20001), [-1e-30, 0.0, 1e-30]]).astype(np.float32)
EPSILON = 2.0**-24


@pytest.mark.parametrize(
    ("function", "exact"),
    [(softplus, lambda x: np.log1p(np.exp(x))), (logistic, lambda x: 1 / (1 + np.exp(-x)))],
    ids=["softplus", "logistic"],
)
def test_small_values_keep_their_digits(function, exact):
    """A rounding of the exponent of exp, up to |x|, and 8 more, all relative to the value."""
    expected = exact(X.astype(np.float64))
    allowed = (np.abs(X) * 1.5 + 8) * EPSILON * expected
    error = np.abs(np.asarray(jax.jit(function)(X), np.float64) - expected)
    assert (error / allowed).max() <= 1


def test_extremes():
    x = jnp.array([-1e4, 1e4, -jnp.inf, jnp.inf])
    np.testing.assert_array_equal(jax.jit(softplus)(x), [0, 1e4, 0, jnp.inf])
    np.testing.assert_array_equal(jax.jit(logistic)(x), [0, 1, 0, 1])


def test_kernels_take_no_logarithm():
    """Mosaic's log1p, the logarithm of 1 + z, would leave few digits; interpreters cannot tell."""
    f32, n = jnp.float32, 1
    route = [jax.ShapeDtypeStruct(s, f32) for s in ((1, 8, 128), (1, 8, 128), (128, n))]
    route += [jax.ShapeDtypeStruct(s, f32) for s in ((1, 8, 1, n), (1, 8, 1, n), (128,), (128,))]
    image = [jax.ShapeDtypeStruct(s, f32) for s in ((1, 8, 8, 128), (1, 8, 8, 4, 128))]
    image += [jax.ShapeDtypeStruct(s, f32) for s in ((4, 128, n), (1, 8, 8, 4, n), (1, 8, 8, 4, n))]
    image += [jax.ShapeDtypeStruct((4, 128), f32)] * 2

    def scan(*operands):
        flags = dict(delta_softplus=True, reverse=False, interpret=True)
        return pallas_tpu.forward(*operands, None, **flags)

    def scan_2d(*operands):
        options = dict(name="pallas_tpu", delta_softplus=True, pattern="cross", interpret=True)
        return fused.fused_scan(*operands, **options)

    for call, operands in ((scan, route), (scan_2d, image)):
        text = jax.jit(call).lower(*operands).as_text()
        assert "stablehlo.exp" in text and "stablehlo.log" not in text
