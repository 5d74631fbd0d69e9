"""Blocks and networks: what their switches do, beside what the golden arrays check."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zzhnet_jax.errors import ConfigError
from zzhnet_jax.kernels.selective_scan import selective_scan
from zzhnet_jax.models import functional
from zzhnet_jax.models.vssm import VSSM, Backbone, BlockConfig, SS2DConfig, VSSBlock, VSSMConfig
from zzhnet_jax.models.vssm.ssd import ssd

PLAIN = SS2DConfig(scan_implementation="sequential")
SMALL = VSSMConfig(depths=(1, 1), dims=8, block=BlockConfig(ssm=PLAIN, mlp_ratio=2.0))


@pytest.mark.parametrize("length", [5, 130])
def test_ssd_is_a_selective_scan_with_shared_decay(length):
    rng = np.random.default_rng(length)
    b, heads, p, n = 2, 3, 4, 5
    x = rng.normal(size=(b, length, heads, p)).astype(np.float32)
    decay = -rng.uniform(0, 2, size=(b, length, heads)).astype(np.float32)
    B, C = rng.normal(size=(2, b, length, n)).astype(np.float32)

    def reference(x, decay, B, C):
        """A = -1 and delta = -decay; the drive of ssd is x itself, so u = x / delta."""
        delta = jnp.repeat(-decay, p, axis=-1)
        u = x.reshape(b, length, -1) / delta
        A = -jnp.ones((heads * p, n))
        y = selective_scan(u, delta, A, B[:, :, None], C[:, :, None], implementation="sequential")
        return y.reshape(x.shape)

    cotangent = rng.normal(size=x.shape).astype(np.float32)

    @compiled
    def both(*inputs):
        results = []
        for function in (ssd, reference):
            y, pull = jax.vjp(function, *inputs)
            results.append((y, *pull(cotangent)))
        return results

    for got, want in zip(*both(x, decay, B, C), strict=True):
        assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


# Halves the time of these tests, which compile far longer than they run.
compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def run(model, x, **options):
    """The model's output, compiled as one program; the caches are the same for equal structures."""
    graphdef, params, stats = functional.split(model)
    return _apply(graphdef, params, stats, x, **options)[0]


@partial(compiled, static_argnums=0)
def _apply(graphdef, params, stats, x):
    return functional.apply(graphdef, params, stats, x)


def outputs_and_gradients(model, x, key, train):
    graphdef, params, stats = functional.split(model)

    @compiled
    def run(params):
        def loss(params):
            y, _ = functional.apply(graphdef, params, stats, x, train=train, key=key)
            return jnp.sum(y**2), y

        return jax.grad(loss, has_aux=True)(params)

    gradients, y = run(params)
    return [y, *jax.tree.leaves(gradients)]


def test_remat_changes_nothing():
    """Not even what is dropped: the recomputation draws the same numbers."""
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    results = []
    for remat in (False, True):
        block = BlockConfig(ssm=PLAIN, mlp_ratio=2.0, mlp_dropout=0.3, remat=remat)
        config = VSSMConfig(depths=(1,), dims=8, block=block)
        model = VSSM(config, 3, rngs=nnx.Rngs(0))
        results.append(outputs_and_gradients(model, x, jax.random.key(2), train=True))
    for plain, recomputed in zip(*results, strict=True):
        np.testing.assert_allclose(plain, recomputed, rtol=2e-4, atol=1e-5)


def test_bfloat16_is_near_float32_and_keeps_float32_parameters():
    x = jax.random.normal(jax.random.key(1), (1, 16, 16, 3))
    model = Backbone(SMALL, out_indices=(1,), rngs=nnx.Rngs(0))
    config = VSSMConfig(depths=SMALL.depths, dims=8, block=SMALL.block, dtype="bfloat16")
    half = Backbone(config, out_indices=(1,), rngs=nnx.Rngs(0))
    (exact,), (rounded,) = run(model, x), run(half, x)
    assert rounded.dtype == jnp.bfloat16 and exact.dtype == jnp.float32
    assert 0 < np.abs(exact - rounded.astype(jnp.float32)).max() < 0.1
    assert {leaf.dtype for leaf in jax.tree.leaves(functional.split(half)[1])} == {
        jnp.dtype("float32")
    }


def test_drop_path_needs_a_key_only_in_training():
    model = VSSM(SMALL, 2, rngs=nnx.Rngs(0))
    x = jnp.ones((1, 8, 8, 3))
    first = run(model, x)
    model.train()
    with pytest.raises(ValueError, match="key="):
        jax.eval_shape(model, x)
    model.eval()
    np.testing.assert_array_equal(first, run(model, x))


def test_drop_path_rates_grow_linearly():
    config = VSSMConfig(depths=(2, 3), dims=8, drop_path_rate=0.4)
    np.testing.assert_allclose(sum(config.drop_path_rates, ()), [0, 0.1, 0.2, 0.3, 0.4])
    assert VSSMConfig(depths=(1,)).drop_path_rates == ((0.0,),)


def test_branches_can_be_left_out():
    def parameters(**changes):
        block = VSSBlock(8, BlockConfig(**changes), rngs=nnx.Rngs(0))
        return set(functional.split(block)[1])

    assert parameters() == {"norm", "op", "norm2", "mlp"}
    assert parameters(mlp_ratio=0.0) == {"norm", "op"}
    assert parameters(ssm=SS2DConfig(ssm_ratio=0.0)) == {"norm2", "mlp"}


def test_position_embedding_is_for_one_size():
    config = VSSMConfig(
        depths=(1,), dims=8, position_embedding=True, image_size=16, block=SMALL.block
    )
    model = VSSM(config, 2, rngs=nnx.Rngs(0))
    assert model.pos_embed.shape == (1, 4, 4, 8)
    x = jnp.ones((1, 16, 16, 3))
    before = run(model, x)
    model.pos_embed.set_value(model.pos_embed[...].at[0, 0, 0, 0].add(5.0))
    assert np.abs(before - run(model, x)).max() > 1e-4
    with pytest.raises(ValueError, match="position embedding"):
        jax.eval_shape(model, jnp.ones((1, 32, 16, 3)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SS2DConfig(gate="yes"), "gate = 'yes': it must be one of 'activated'"),
        (lambda: SS2DConfig(d_conv=4), "d_conv = 4: it must be odd"),
        (lambda: SS2DConfig(d_state=0), "d_state = 0"),
        (lambda: SS2DConfig(operator="ssd"), "initialization = 'mamba'"),
        (lambda: SS2DConfig(operator="xv1a", gate="linear"), "gate = 'linear'"),
        (lambda: SS2DConfig(multiply_input=True), "multiply_input = True"),
        (lambda: BlockConfig(mlp_ratio=-1.0), "mlp_ratio = -1.0"),
        (lambda: VSSMConfig(dims=(8, 16)), r"dims = \(8, 16\): it must be one width or 4"),
        (lambda: VSSMConfig(depths=()), r"depths = \(\)"),
        (lambda: VSSMConfig(patch_size=3), "patch_size = 3"),
        (lambda: Backbone(SMALL, out_indices=(2,), rngs=nnx.Rngs(0)), "out_indices"),
    ],
)
def test_impossible_fields_are_named(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
