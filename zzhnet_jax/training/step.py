"""The training step: one compiled program, its state donated, every array placed by name.

A step never waits for the host. It reports whether loss and gradient were finite and leaves the
state as it was where they were not, so that the loop may find out a step later and what it would
save is still good. What processes must tell each other at every step, whether one was asked to
stop, travels with the batch.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from zzhnet_jax.models import functional
from zzhnet_jax.models.blocks import RematPolicy, block_mode
from zzhnet_jax.models.placement import placed

from .config import LossConfig
from .gradients import Batch, loss_and_gradient
from .packing import Packed, Packing
from .rules import DEFAULT_RULES, ShardingRules
from .sharding import (
    batch_parts,
    batch_sharding,
    computed,
    image_sharding,
    keep_split,
    placement,
    replicated,
)
from .state import TrainState, moving_average

Metrics = dict[str, Array]
TrainStep = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]


def compile_train_step(*arguments: Any, **options: Any) -> Any:
    """Compiles what `lower_train_step` traces; takes the same arguments.

    Returns:
      `step(state, batch, key) -> (state, metrics)`, a `jax.stages.Compiled`.
    """
    return lower_train_step(*arguments, **options).compile()


def lower_train_step(
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
    rules: ShardingRules = DEFAULT_RULES,
    accumulation: int = 1,
    remat: RematPolicy | None = None,
) -> jax.stages.Lowered:
    """Traces the step for one shape of batch; a batch of another shape will be an error.

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
      rules: how parameters and activations are split.
      accumulation: parts that a batch is computed in.
      remat: what blocks compute again in the backward pass; None leaves it to the network.

    Returns:
      The traced `step(state, batch, key) -> (state, metrics)`. The batch has `pre`, `post` float32
      (b, h, w, c), `label` int32 (b, h, w) and `host` (see `put_batch`, which makes all of it); the
      key is the same at every step, which folds its number in. The given state's arrays must not be
      used again. Metrics are float32 scalars: `loss`, its terms, `gradient_norm`, `learning_rate`,
      `data_wait`; and the booleans `finite` and `stop`.
    """
    network_params = _network_params(packing, state, mesh, rules)
    moments = _placements(state)

    def forward(
        params: Packed, stats: functional.Tree, part: Batch, key: jax.Array
    ) -> tuple[Array, functional.Tree]:
        images = part["pre"], part["post"]
        tree = network_params(params)
        return functional.apply(graphdef, tree, stats, *images, train=True, key=key)

    def place(gradient: Packed) -> Packed:
        return jax.tree.map(jax.lax.with_sharding_constraint, gradient, moments)

    def train_step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        examples = {name: batch[name] for name in ("pre", "post", "label")}
        with placed(placement(mesh, rules)), block_mode(remat=remat, loops=True):
            total, terms, batch_stats, gradient = loss_and_gradient(
                forward, loss, state.params, state.batch_stats, examples, key,
                parts=accumulation, place=place,
            )  # fmt: skip
        gradient = place(gradient)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = moving_average(ema, params, state.step, ema_decay)
        proposed = TrainState(state.step + 1, params, batch_stats, opt_state, ema)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        stop, data_wait = jnp.max(batch["host"], axis=0)
        metrics = terms | {
            "loss": total,
            "gradient_norm": norm,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "data_wait": data_wait,
            "finite": finite,
            "stop": stop > 0,
        }
        return jax.tree.map(partial(jnp.where, finite), proposed, state), metrics

    images = jax.ShapeDtypeStruct(image_shape, jnp.float32)
    batch = {
        "pre": images,
        "post": images,
        "label": jax.ShapeDtypeStruct(image_shape[:3], jnp.int32),
        "host": jax.ShapeDtypeStruct((batch_parts(mesh), 2), jnp.float32),
    }
    as_images = dict.fromkeys(("pre", "post", "label"), image_sharding(mesh))
    state_placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(state_placed, as_images | {"host": batch_sharding(mesh)}, replicated(mesh)),
        out_shardings=(state_placed, replicated(mesh)),
    )
    # The mesh tells what the step is for: it is traced for no other platform, and kernels for
    # devices that are not here ask it what they are.
    with jax.set_mesh(mesh):
        return step.lower(state, batch, jax.eval_shape(lambda: jax.random.key(0)))


def _placements(state: TrainState) -> Packed:
    """Where gradients are summed: where the optimizer keeps what it knows of each parameter."""
    found = optax.tree.get_all_with_path(state.opt_state, "mu")
    return jax.tree.map(lambda leaf: leaf.sharding, found[0][1])


def _network_params(
    packing: Packing, state: TrainState, mesh: Mesh, rules: ShardingRules
) -> Callable[[Packed], functional.Tree]:
    """From stored parameters to the network's, as each device computes with them."""
    if mesh.size == 1:
        return packing.unpack
    gather = {
        name: keep_split(computed(name, leaf.shape, mesh, rules), leaf.sharding)
        for name, leaf in state.params.items()
    }
    split = packing.map_paths(lambda path, shape: computed(path, shape, mesh, rules))

    def unpack(params: Packed) -> functional.Tree:
        tree = packing.unpack({name: gather[name](leaf) for name, leaf in params.items()})
        return jax.tree.map(jax.lax.with_sharding_constraint, tree, split)

    return unpack
