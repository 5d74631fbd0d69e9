"""Remat policies: the same gradients, and less kept for the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zzhnet_jax.models import functional
from zzhnet_jax.models.blocks import block_mode, call_block
from zzhnet_jax.models.vssm.config import BlockConfig, SS2DConfig
from zzhnet_jax.models.vssm.vssm import VSSBlock


@pytest.fixture(scope="module")
def block():
    config = BlockConfig(ssm=SS2DConfig(ssm_ratio=2.0), mlp_ratio=2.0)
    return functional.split(VSSBlock(8, config, rngs=nnx.Rngs(0)))


def loss(block, policy):
    graphdef, params, stats = block

    def value(params, x):
        with block_mode(remat=policy, loops=False):
            module = functional.merge(graphdef, params, stats)
            y = call_block(module, x, remat=False)
        return jnp.sum(jnp.sin(y))

    return value, params


X = np.random.default_rng(0).normal(size=(1, 8, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("policy", ["blocks", "blocks+scan", "offload"])
def test_gradients_are_those_of_keeping_everything(block, policy):
    plain, params = loss(block, "none")
    value, _ = loss(block, policy)
    expected = jax.jit(jax.grad(plain, argnums=(0, 1)))(params, X)
    found = jax.jit(jax.grad(value, argnums=(0, 1)))(params, X)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def kept(block, policy):
    """Bytes that wait for the backward pass, parameters excluded."""
    value, params = loss(block, policy)
    residuals = jax.eval_shape(lambda p, x: jax.vjp(value, p, x)[1], params, X)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals)]
    return sum(sizes) - sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_each_policy_keeps_less_than_the_one_before(block):
    none, blocks, all_again = (kept(block, p) for p in ("none", "blocks", "blocks+scan"))
    # The block's input, and its output for the gradient of the sine.
    assert all_again <= 2 * X.nbytes < blocks < none / 3


def test_blocks_does_not_scan_again_but_blocks_and_scan_does(block):
    def loops(policy):
        value, params = loss(block, policy)
        return str(jax.make_jaxpr(jax.grad(value))(params, X)).count("scan_states")

    assert loops("blocks") < loops("blocks+scan")
