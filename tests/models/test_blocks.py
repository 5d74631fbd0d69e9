"""Blocks of a stage as a loop: what they are one after another, traced once."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zzhnet_jax.models import functional
from zzhnet_jax.models.blocks import block_mode, call_each
from zzhnet_jax.models.vssm.config import BlockConfig, SS2DConfig, VSSMConfig
from zzhnet_jax.models.vssm.vssm import Stage, VSSBlock

BLOCK = BlockConfig(ssm=SS2DConfig(ssm_ratio=2.0), mlp_ratio=2.0)
CONFIG = VSSMConfig(dims=8, block=BLOCK)
RATES = (0.0, 0.25, 0.5, 0.125)
X = np.random.default_rng(0).normal(size=(3, 8, 8, 8)).astype(np.float32)


def stage(norm="layer", rates=RATES):
    config = replace(CONFIG, block=replace(BLOCK, norm=norm))
    return functional.split(Stage(8, None, config, rates, rngs=nnx.Rngs(0)))


def run(parts, *, loops, remat=None, key=None):
    """Loss, gradients and batch statistics of a stage, jitted."""
    graphdef, params, stats = parts

    @jax.jit
    def both(params, x):
        def objective(params):
            with block_mode(remat=remat, loops=loops):
                (y, _), after = functional.apply(graphdef, params, stats, x, train=True, key=key)
            return jnp.sum(jnp.sin(y)), after

        (total, after), gradient = jax.value_and_grad(objective, has_aux=True)(params)
        return total, gradient, after

    return both(params, X)


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_a_loop_computes_what_its_blocks_do_one_by_one(norm):
    """With drop path, whose draws depend on the block."""
    parts, key = stage(norm), jax.random.key(1)
    found, expected = (run(parts, loops=loops, key=key) for loops in (True, False))
    assert bool(found[2]) == (norm == "batch")
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_loop_traces_a_block_once(monkeypatch):
    calls = []
    plain = VSSBlock.__call__
    monkeypatch.setattr(VSSBlock, "__call__", lambda *a, **k: calls.append(1) or plain(*a, **k))
    graphdef, params, stats = stage()

    for loops, count in ((True, 1), (False, len(RATES))):
        calls.clear()
        with block_mode(loops=loops):
            jax.eval_shape(lambda *a: functional.apply(graphdef, *a), params, stats, X)
        assert len(calls) == count


def test_a_loop_recomputes_its_blocks_where_asked():
    parts, key = stage(), jax.random.key(1)
    found, expected = (run(parts, loops=True, remat=p, key=key) for p in ("blocks+scan", "none"))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_modules_that_differ_in_more_than_weights_are_refused():
    modules = [VSSBlock(8, replace(BLOCK, norm=n), rngs=nnx.Rngs(0)) for n in ("layer", "batch")]
    with pytest.raises(ValueError, match="differ in more than their weights"):
        call_each(modules, jnp.stack([X, X]))
