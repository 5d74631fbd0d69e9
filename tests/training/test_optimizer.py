"""Schedule, decay mask, packing and AdamW against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zzhnet_jax.training.config import OptimConfig
from zzhnet_jax.training.optimizer import decay_mask, make_optimizer, make_schedule
from zzhnet_jax.training.packing import LARGE, Packing


def network(rng):
    """Parameters as networks name them."""
    arrays = {
        "conv": {"kernel": (3, 3, 2, 4), "bias": (4,)},
        "norm": {"scale": (4,), "bias": (4,)},
        "blocks": {
            0: {
                "op": {"A_log": (4, 8, 1), "D": (4, 8), "dt_bias": (4, 8), "x_proj": (4, 8, 3)},
                "mlp_scale": (8,),
                "large": (LARGE // 64, 64),
            }
        },
    }
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32),
        arrays,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


def test_only_linear_maps_and_filters_decay():
    assert decay_mask(network(np.random.default_rng(0))) == {
        "conv": {"kernel": True, "bias": False},
        "norm": {"scale": False, "bias": False},
        "blocks": {
            0: {
                "op": {"A_log": False, "D": False, "dt_bias": False, "x_proj": True},
                "mlp_scale": False,
                "large": True,
            }
        },
    }


def test_everything_decays_when_asked():
    mask = decay_mask(network(np.random.default_rng(0)), "all")
    assert all(jax.tree.leaves(mask))


def test_a_real_network_decays_in_all_its_matrices_and_nothing_else():
    from zzhnet_jax.models import functional
    from zzhnet_jax.training.config import ModelSpec
    from zzhnet_jax.training.loop import model_builder

    _, params, _ = functional.abstract(model_builder(ModelSpec("zzhnet_nano")))
    mask = decay_mask(params)
    decayed, undecayed = set(), set()
    for path, decays in jax.tree_util.tree_flatten_with_path(mask)[0]:
        (decayed if decays else undecayed).add(str(path[-1].key))
    assert not decayed & {"A_log", "D", "dt_bias", "bias", "scale", "scan_scale", "mlp_scale"}
    assert decayed >= {"kernel", "x_proj", "dt_proj"}
    assert undecayed >= {"A_log", "D", "dt_bias", "bias", "scale"}


def test_packing_there_and_back_with_gradients():
    tree = network(np.random.default_rng(1))
    packing = Packing(tree, decay_mask(tree))
    packed = packing.pack(jax.tree.map(jnp.asarray, tree))
    assert set(packed) == {"decayed", "undecayed", "blocks.0.large"}
    assert packing.decay_mask == {"decayed": True, "undecayed": False, "blocks.0.large": True}
    assert all(packed[part].shape == (1024,) for part in ("decayed", "undecayed"))
    for back in (packing.unpack(packed), packing.unpack_on_host(packed)):
        jax.tree.map(np.testing.assert_array_equal, back, tree)

    def weighted(packed):
        leaves = jax.tree.leaves(packing.unpack(packed))
        return sum((i + 1.0) * leaf.sum() for i, leaf in enumerate(leaves))

    gradient = packing.unpack_on_host(jax.grad(weighted)(packed))
    for i, leaf in enumerate(jax.tree.leaves(gradient)):
        np.testing.assert_array_equal(leaf, np.full(leaf.shape, i + 1.0, np.float32))


def test_schedules():
    config = OptimConfig(learning_rate=2.0, warmup_fraction=0.1, final_fraction=0.25)
    rate = make_schedule(config, 100)
    steps = np.array([0, 5, 10, 55, 100])
    half_cosine = 0.25 + 0.75 * 0.5
    np.testing.assert_allclose([rate(s) for s in steps], [0, 1, 2, 2 * half_cosine, 0.5], rtol=1e-6)
    constant = make_schedule(OptimConfig(learning_rate=2.0, schedule="constant"), 100)
    np.testing.assert_allclose([constant(s) for s in (0, 4, 5, 99)], [0, 1.6, 2, 2], rtol=1e-6)
    falling = OptimConfig(
        learning_rate=2.0, schedule="step", warmup_fraction=0.0, step_every=10, step_factor=0.5
    )
    falling = make_schedule(falling, 100)
    np.testing.assert_allclose([falling(s) for s in (0, 9, 10, 19, 20)], [2, 2, 1, 1, 0.5])
    at_once = make_schedule(OptimConfig(learning_rate=2.0, warmup_fraction=0.0), 1)
    assert at_once(0) == 2.0


@pytest.mark.parametrize("clip", [None, 0.5])
def test_adamw_equals_its_formula(clip):
    rng = np.random.default_rng(2)
    params = {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)}
    gradients = [
        {k: rng.normal(size=v.shape).astype(np.float32) for k, v in params.items()}
        for _ in range(3)
    ]
    config = OptimConfig(
        learning_rate=0.1, schedule="constant", warmup_fraction=0.0, weight_decay=0.3,
        beta1=0.8, beta2=0.95, epsilon=1e-6, clip_norm=clip,
    )  # fmt: skip
    optimizer = make_optimizer(config, make_schedule(config, 3), decay_mask(params))
    state, value = optimizer.init(params), {k: jnp.float32(v) for k, v in params.items()}
    mean, square = (dict.fromkeys(params, 0.0) for _ in range(2))
    expected = dict(params)
    for t, gradient in enumerate(gradients, 1):
        updates, state = optimizer.update(gradient, state, value)
        value = {k: value[k] + updates[k] for k in value}
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        shrink = 1.0 if clip is None else min(1.0, clip / norm)
        for name, g in gradient.items():
            g = g * shrink
            mean[name] = 0.8 * mean[name] + 0.2 * g
            square[name] = 0.95 * square[name] + 0.05 * g**2
            step = mean[name] / (1 - 0.8**t) / (np.sqrt(square[name] / (1 - 0.95**t)) + 1e-6)
            decay = 0.3 * expected[name] if name == "kernel" else 0.0
            expected[name] = expected[name] - 0.1 * (step + decay)
    for name in params:
        np.testing.assert_allclose(value[name], expected[name], rtol=2e-5, atol=1e-6)
