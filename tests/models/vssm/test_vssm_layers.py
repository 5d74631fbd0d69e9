"""Layers of the hierarchy: the depthwise convolution, norms, dropping and initial values."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zzhnet_jax.models.vssm.depthwise import depthwise_conv
from zzhnet_jax.models.vssm.initializers import torch_uniform, truncated_normal
from zzhnet_jax.models.vssm.layers import BatchNorm, Dropout, DropPath, make_norm
from zzhnet_jax.models.vssm.patches import PatchEmbed


def grouped_conv(x, kernel):
    """XLA's grouped convolution, in float64 loops of numpy's making."""
    k = kernel.shape[0]
    padded = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (k, k), axis=(1, 2))
    return np.einsum("bhwcij,ijc->bhwc", windows, kernel)


@pytest.mark.parametrize("k", [3, 5])
def test_depthwise_conv_and_gradient(k):
    rng = np.random.default_rng(0)
    x, cotangent = rng.normal(size=(2, 2, 4, 6, 3))
    kernel = rng.normal(size=(k, k, 3))
    y, pull = jax.vjp(depthwise_conv, jnp.float32(x), jnp.float32(kernel))
    d_x, d_kernel = pull(jnp.float32(cotangent))
    np.testing.assert_allclose(y, grouped_conv(x, kernel), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        d_x, grouped_conv(cotangent, kernel[::-1, ::-1]), rtol=1e-4, atol=1e-5
    )
    basis = np.eye(k * k * 3).reshape(-1, k, k, 3)
    expected = [np.sum(grouped_conv(x, direction) * cotangent) for direction in basis]
    np.testing.assert_allclose(d_kernel.ravel(), expected, rtol=1e-4, atol=1e-4)


def test_depthwise_conv_in_bfloat16_sums_its_gradient_in_float32():
    x = jnp.ones((1, 64, 64, 1), jnp.bfloat16)
    kernel = jnp.ones((3, 3, 1), jnp.bfloat16)
    d_kernel = jax.vjp(depthwise_conv, x, kernel)[1](x)[1]
    assert d_kernel.dtype == jnp.bfloat16
    assert float(d_kernel[1, 1, 0]) == 4096  # a bfloat16 sum of ones stops at 256
    assert float(d_kernel[0, 0, 0]) == float(jnp.bfloat16(63 * 63))


def test_batch_norm_collects_as_pytorch_does():
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, size=(2, 3, 4, 5)), jnp.float32)
    norm = BatchNorm(5)
    np.testing.assert_allclose(norm(x), x / math.sqrt(1 + 1e-5), rtol=1e-6)
    norm.train()
    y = np.asarray(norm(x))
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(y.var((0, 1, 2)), 1, rtol=1e-4)
    flat = np.asarray(x).reshape(-1, 5)
    np.testing.assert_allclose(norm.mean[...], 0.1 * flat.mean(0), rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-5)
    assert int(norm.count[...]) == 1


def test_layer_norm_keeps_precision_far_from_zero():
    x = jnp.asarray([[1e4, 1e4 + 1, 1e4 + 2, 1e4 + 3]], jnp.float32)
    y = make_norm("layer", 4, rngs=nnx.Rngs(0))(x)
    expected = (np.arange(4) - 1.5) / np.sqrt(1.25 + 1e-5)
    np.testing.assert_allclose(y[0], expected, rtol=1e-5)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    drop = DropPath()
    x = jnp.ones((4000, 2, 1))
    assert drop(x, 0.25) is x  # evaluation
    drop.train()
    assert drop(x, 0.0) is x
    y = np.asarray(drop(x, 0.25, key=jax.random.key(0)))
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert (y[:, 0] == y[:, 1]).all()
    assert abs(y.mean() - 1) < 0.03
    with pytest.raises(ValueError, match="key="):
        drop(x, 0.25)


def test_dropout_drops_single_values():
    drop = Dropout(0.5)
    drop.train()
    y = np.asarray(drop(jnp.ones((10, 100)), key=jax.random.key(0)))
    assert 0.4 < (y == 0).mean() < 0.6 and (y.std(1) > 0).all()


@pytest.mark.parametrize("shape", [(7,), (30, 50), (3, 3, 40)])
def test_initial_values(shape):
    key = jax.random.key(3)
    uniform = np.asarray(torch_uniform(25)(key, shape))
    assert uniform.shape == shape and np.abs(uniform).max() <= 0.2
    normal = np.asarray(truncated_normal()(key, shape))
    assert normal.shape == shape
    if normal.size > 300:
        assert uniform.min() < -0.18 and uniform.max() > 0.18
        assert abs(normal.std() - 0.02) < 0.002
    assert not np.array_equal(uniform, torch_uniform(25)(jax.random.key(4), shape))


@pytest.mark.parametrize(("version", "patch_size"), [(1, 4), (2, 4), (1, 2), (2, 2)])
def test_patch_embedding_covers_the_image(version, patch_size):
    embed = PatchEmbed(3, 8, version=version, patch_size=patch_size, norm=None, rngs=nnx.Rngs(0))
    x = jnp.zeros((1, 16, 24, 3))
    far = x.at[0, -1, -1].set(1.0)
    plain, changed = embed(x), embed(far)
    if patch_size == 4:
        assert plain.shape == (1, 4, 6, 8)
    difference = np.abs(np.asarray(changed - plain)).sum((0, 3))
    assert difference[-1, -1] > 0 and difference[0, 0] == 0
