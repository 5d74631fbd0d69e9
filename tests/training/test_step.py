"""The compiled step: what it changes, what it leaves alone, and that its input is given up."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zzhnet_jax.kernels.platforms import by_platform
from zzhnet_jax.models import functional
from zzhnet_jax.training.config import LossConfig, MeshConfig, OptimConfig
from zzhnet_jax.training.losses import segmentation_loss
from zzhnet_jax.training.optimizer import decay_mask, make_optimizer, make_schedule
from zzhnet_jax.training.packing import Packing
from zzhnet_jax.training.sharding import make_mesh, put_batch
from zzhnet_jax.training.state import StateMaker
from zzhnet_jax.training.step import compile_train_step

LOSS = LossConfig(cross_entropy=1.0, dice=0.5)
OPTIM = OptimConfig(learning_rate=1e-2, schedule="constant", warmup_fraction=0.0, ema_decay=0.9)


class Setting:
    """A small network, its state maker and its step."""

    def __init__(self, build):
        self.graphdef, *shapes = functional.abstract(build)
        params = shapes[0]
        self.packing = Packing(params, decay_mask(params))
        schedule = make_schedule(OPTIM, 10)
        self.optimizer = make_optimizer(OPTIM, schedule, self.packing.decay_mask)
        self.mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        self.maker = StateMaker(
            build, tuple(shapes), self.packing, self.optimizer, self.mesh, ema=True
        )
        self.step = compile_train_step(
            self.graphdef, self.packing, self.optimizer, schedule, self.maker.abstract, self.mesh,
            image_shape=(4, 16, 16, 3), loss=LOSS, ema_decay=OPTIM.ema_decay,
        )  # fmt: skip
        self.key = jax.random.key(7)

    def batch(self, seed):
        rng = np.random.default_rng(seed)
        images = rng.normal(size=(2, 4, 16, 16, 3)).astype(np.float32)
        label = rng.integers(0, 2, (4, 16, 16)).astype(np.int32)
        return {"pre": images[0], "post": images[1], "label": label}

    def run(self, state, batch):
        return self.step(state, put_batch(batch, self.mesh), self.key)


@pytest.fixture(scope="module")
def setting(small):
    return Setting(small.build)


def test_a_step_is_traced_for_its_devices_only(small):
    def refuse(x):
        raise AssertionError("traced for a platform that the mesh has no device of")

    class Network(small.SmallNetwork):
        def __call__(self, pre, post, *, key=None):
            logits = super().__call__(pre, post, key=key)
            return by_platform(logits, cpu=lambda x: x, default=refuse)

    Setting(lambda rngs: Network(small.SmallConfig(), rngs=rngs))


def host(tree):
    return jax.tree.map(np.array, tree)


def test_a_step_equals_gradient_and_update_written_out(setting):
    state = setting.maker.create(jax.random.key(0))
    before, batch = host(state), setting.batch(0)

    old_stats = jax.tree.map(jnp.asarray, before.batch_stats)

    def objective(params):
        logits, stats = functional.apply(
            setting.graphdef, params, old_stats, batch["pre"], batch["post"],
            train=True, key=jax.random.fold_in(setting.key, 0),
        )  # fmt: skip
        return segmentation_loss(logits, batch["label"], LOSS)[0], stats

    params = setting.packing.unpack_on_host(before.params)
    (loss, stats), gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
    norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(gradient)))
    after, metrics = setting.run(state, batch)
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-5)
    assert metrics["learning_rate"] == pytest.approx(1e-2)
    assert metrics["finite"] and after.step == 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), after.batch_stats, stats)
    # The first step of Adam has size 1 wherever there is a gradient, whatever its size.
    new = setting.packing.unpack_on_host(after.params)
    mask = decay_mask(params)
    for old, now, g, decays in zip(
        *map(jax.tree.leaves, (params, new, gradient, mask)), strict=True
    ):
        clear = np.abs(g) > 1e-4 * norm
        expected = old - 1e-2 * (np.sign(g) + (0.05 * old if decays else 0))
        np.testing.assert_allclose(now[clear], expected[clear], rtol=1e-3, atol=1e-5)


def test_the_average_follows_its_recursion(setting):
    state = setting.maker.create(jax.random.key(1))
    average = host(state.ema)
    jax.tree.map(np.testing.assert_array_equal, average, host(state.params))
    for step in range(3):
        state, _ = setting.run(state, setting.batch(step))
        decay = min(0.9, (1 + step) / (10 + step))
        average = jax.tree.map(
            lambda a, p, d=decay: d * a + (1 - d) * np.asarray(p), average, state.params
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), average,
                 host(state.ema))  # fmt: skip
    assert not np.allclose(average["decayed"], state.params["decayed"], rtol=1e-3)


def test_dropout_differs_by_step_and_repeats_by_key(setting):
    batch = setting.batch(0)
    first, again = (
        setting.run(setting.maker.create(jax.random.key(0)), batch)[1] for _ in range(2)
    )
    assert first["loss"] == again["loss"]
    state = setting.maker.create(jax.random.key(0))
    later = dataclasses.replace(state, step=jnp.int32(5))
    assert setting.run(later, batch)[1]["loss"] != first["loss"]


def test_a_step_that_is_not_finite_changes_nothing(setting):
    state = setting.maker.create(jax.random.key(0))
    before, batch = host(state), setting.batch(0)
    batch["post"][2, 3, 4] = np.nan
    after, metrics = setting.run(state, batch)
    assert not metrics["finite"]
    jax.tree.map(np.testing.assert_array_equal, host(after), before)


def test_the_old_state_is_donated(setting):
    state = setting.maker.create(jax.random.key(0))
    setting.run(state, setting.batch(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))


def test_another_batch_shape_is_an_error_rather_than_a_second_compilation(setting):
    batch = {name: array[:2] for name, array in setting.batch(0).items()}
    with pytest.raises(TypeError, match=r"float32\[2,16,16,3\]"):
        setting.run(setting.maker.create(jax.random.key(0)), batch)
