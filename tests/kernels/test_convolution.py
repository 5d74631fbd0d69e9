"""The convolution and its gradients against those that JAX derives, and that they run by Eigen."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zzhnet_jax.kernels.convolution import convolution

# Images, height, width, channels in and out, side of the kernel, stride, padding.
CASES = {
    "3x3": (2, 7, 6, 3, 5, 3, 1, 1),
    "3x3 stride 2": (2, 9, 8, 3, 4, 3, 2, 1),
    "2x2 patches with a row left over": (1, 7, 6, 4, 2, 2, 2, 0),
    "4x4 patches": (3, 8, 12, 3, 8, 4, 4, 0),
    "1x1": (2, 4, 5, 3, 6, 1, 1, 0),
    "1x1 stride 2": (2, 5, 5, 3, 6, 1, 2, 0),
    "padding beyond the kernel": (1, 4, 4, 2, 3, 2, 1, 2),
}


def derived(x, kernel, *, stride, padding):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((padding, padding),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def operands(case, dtype=jnp.float32):
    b, h, w, d_in, d_out, k, stride, padding = CASES[case]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(b, h, w, d_in)), dtype)
    kernel = jnp.asarray(rng.normal(size=(k, k, d_in, d_out)), dtype)
    return x, kernel, {"stride": stride, "padding": padding}


def with_gradients(convolve, x, kernel, how):
    y, pull = jax.vjp(lambda *given: convolve(*given, **how), x, kernel)
    # Eighths, which every dtype holds.
    cotangent = jnp.asarray(np.random.default_rng(1).integers(-16, 17, y.shape) / 8, y.dtype)
    return y, *pull(cotangent)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case):
    x, kernel, how = operands(case)
    ours = jax.jit(lambda *given: with_gradients(convolution, *given, how))(x, kernel)
    with jax.enable_x64(True):
        wide = (jnp.asarray(np.asarray(a, np.float64)) for a in (x, kernel))
        oracle = with_gradients(derived, *wide, how)
        for got, wanted in zip(ours, oracle, strict=True):
            assert got.dtype == jnp.float32
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_narrow_inputs():
    x, kernel, how = operands("3x3 stride 2", jnp.bfloat16)
    ours = with_gradients(convolution, x, kernel, how)
    oracle = with_gradients(derived, *(a.astype(jnp.float32) for a in (x, kernel)), how)
    for got, wanted in zip(ours, oracle, strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(jnp.float32), wanted, rtol=1e-2, atol=2e-2)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA's CPU backend")
def test_convolutions_in_a_loop_have_the_order_that_eigen_takes():
    x, kernel, how = operands("3x3 stride 2")

    def loop(convolve):
        def part(total, x):
            def squares(*given):
                return jnp.sum(jnp.square(convolve(*given, **how)))

            of_x, of_kernel = jax.grad(squares, (0, 1))(x, kernel)
            return total + of_kernel, of_x

        return jax.jit(lambda parts: jax.lax.scan(part, jnp.zeros_like(kernel), parts))

    def orders(convolve):
        text = loop(convolve).lower(jnp.stack([x, x])).compile().as_text()
        return re.findall(r" convolution\(.*dim_labels=(\S+?)[,\s]", text)

    ours = orders(convolution)
    assert len(ours) == 3 and set(ours) == {"b01f_01io->b01f"}
    assert set(orders(derived)) != {"b01f_01io->b01f"}
