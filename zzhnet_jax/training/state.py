"""What a training step changes, as one pytree, and how it is made where it will live."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from zzhnet_jax.models import functional

from .packing import Packed, Packing
from .sharding import tree_shardings

Build = Callable[[nnx.Rngs], nnx.Module]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that changes from step to step.

    Attributes:
      step: optimizer steps done, int32.
      params: the network's parameters, packed, float32.
      batch_stats: running statistics of its BatchNorm layers.
      opt_state: the optimizer's.
      ema: moving average of `params`; None when it is off.
    """

    step: jax.Array
    params: Packed
    batch_stats: functional.Tree
    opt_state: optax.OptState
    ema: Packed | None

    @property
    def best_params(self) -> Packed:
        """The parameters to validate and export: the average where there is one."""
        return self.params if self.ema is None else self.ema


@dataclass(frozen=True)
class StateMaker:
    """Makes training states of one network.

    Attributes:
      build: makes the network from its random streams.
      shapes: those of its parameters and of its batch statistics.
      packing: layout of its parameters.
      optimizer: whose state to make.
      mesh: devices to spread the arrays over.
      ema: whether to keep a moving average of the parameters.
    """

    build: Build
    shapes: tuple[functional.Tree, functional.Tree]
    packing: Packing
    optimizer: optax.GradientTransformation
    mesh: Mesh
    ema: bool

    @cached_property
    def abstract(self) -> TrainState:
        """Shapes, dtypes and shardings, into which a checkpoint is restored."""
        state = jax.eval_shape(self._assemble, *self.shapes)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state,
            tree_shardings(state, self.mesh),
        )

    def create(self, key: jax.Array) -> TrainState:
        """Fresh parameters and optimizer state; no array is ever whole on one device."""
        init = functional.initializer(self.build)
        # It runs once: on CPUs, to compile it well takes far longer than to run it badly.
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        initial = jax.jit(
            lambda key: self._assemble(*init(key)),
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, self.abstract),
            compiler_options={"xla_backend_optimization_level": 0} if on_cpu else {},
        )
        return initial(key)

    def _assemble(self, tree: functional.Tree, batch_stats: functional.Tree) -> TrainState:
        params = self.packing.pack(tree)
        average = jax.tree.map(jnp.copy, params) if self.ema else None
        return TrainState(jnp.int32(0), params, batch_stats, self.optimizer.init(params), average)


def moving_average(average: Packed, params: Packed, step: jax.Array, decay: float) -> Packed:
    """The average moved towards the parameters: decay x average + (1 - decay) x params.

    While it is smaller, (1 + step) / (10 + step) is the decay, so that the average soon forgets the
    random start.
    """
    rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, p: rate * a + (1 - rate) * p, average, params)
