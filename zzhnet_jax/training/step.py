"""The training step: one compiled program, its state donated, every array placed by name.

A step never waits for the host. It reports whether loss and gradient were finite and leaves the
state as it was where they were not, so that the loop may find out a step later and what it would
save is still good.
"""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from zzhnet_jax.models import functional

from .config import LossConfig
from .losses import segmentation_loss
from .packing import Packed, Packing
from .sharding import batch_sharding, replicated
from .state import TrainState, moving_average

Batch = Mapping[str, Array]
Metrics = dict[str, Array]
TrainStep = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]


def compile_train_step(
    graphdef: nnx.GraphDef,
    packing: Packing,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    state: TrainState,
    mesh: Mesh,
    *,
    image_shape: tuple[int, int, int, int],
    loss: LossConfig,
    ema_decay: float,
) -> TrainStep:
    """Compiles the step for one shape of batch; a batch of another shape will be an error.

    Args:
      graphdef: the network's structure.
      packing: layout of its parameters.
      optimizer: turns gradients into updates.
      schedule: the optimizer's learning rate, for the report.
      state: shapes and shardings of the states it will be given.
      mesh: devices; the first axis of a batch is split over them.
      image_shape: (b, h, w, c) of `pre` and of `post`, over all devices.
      loss: terms and weights.
      ema_decay: decay of the parameters' moving average, where the state has one.

    Returns:
      `step(state, batch, key) -> (state, metrics)`. The batch has `pre`, `post` float32
      (b, h, w, c) and `label` int32 (b, h, w); the key is the same at every step, which folds its
      number in. The given state's arrays must not be used again. Metrics are float32 scalars:
      `loss`, its terms, `gradient_norm`, `learning_rate`; and the boolean `finite`.
    """

    def objective(
        params: Packed, state: TrainState, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[functional.Tree, Metrics]]:
        images = batch["pre"], batch["post"]
        logits, batch_stats = functional.apply(
            graphdef, packing.unpack(params), state.batch_stats, *images, train=True, key=key
        )
        total, terms = segmentation_loss(logits, batch["label"], loss)
        return total, (batch_stats, terms)

    def train_step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        (total, (batch_stats, terms)), gradient = jax.value_and_grad(objective, has_aux=True)(
            state.params, state, batch, key
        )
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = moving_average(ema, params, state.step, ema_decay)
        proposed = TrainState(state.step + 1, params, batch_stats, opt_state, ema)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        metrics = terms | {
            "loss": total,
            "gradient_norm": norm,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "finite": finite,
        }
        return jax.tree.map(partial(jnp.where, finite), proposed, state), metrics

    images = jax.ShapeDtypeStruct(image_shape, jnp.float32)
    batch = {
        "pre": images,
        "post": images,
        "label": jax.ShapeDtypeStruct(image_shape[:3], jnp.int32),
    }
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(placed, batch_sharding(mesh), replicated(mesh)),
        out_shardings=(placed, replicated(mesh)),
    )
    return step.lower(state, batch, jax.eval_shape(lambda: jax.random.key(0))).compile()
