"""What a training step changes, as one pytree, and how it is made where it will live."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from zzhnet_jax.models import functional

from .packing import Packed, Packing
from .processes import meet
from .rules import DEFAULT_RULES, ShardingRules
from .sharding import replicated, stored

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
      rules: how parameters are split; the optimizer's state and the average follow them.
      shard_optimizer: split the optimizer's state over `data` too.
    """

    build: Build
    shapes: tuple[functional.Tree, functional.Tree]
    packing: Packing
    optimizer: optax.GradientTransformation
    mesh: Mesh
    ema: bool
    rules: ShardingRules = DEFAULT_RULES
    shard_optimizer: bool = False

    @cached_property
    def abstract(self) -> TrainState:
        """Shapes, dtypes and shardings, into which a checkpoint is restored."""
        state = jax.eval_shape(self._assemble, *self.shapes)
        whole = replicated(self.mesh)
        return TrainState(
            step=_at(state.step, whole),
            params=self._split(state.params, over=("fsdp",)),
            batch_stats=jax.tree.map(lambda leaf: _at(leaf, whole), state.batch_stats),
            opt_state=self._split(
                state.opt_state, over=("fsdp", "data") if self.shard_optimizer else ("fsdp",)
            ),
            ema=self._split(state.ema, over=("fsdp",)),
        )

    def _split(self, tree: Any, *, over: Sequence[str]) -> Any:
        """Shapes with shardings; the last name on the way to a leaf is its parameter's path."""

        def split(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
            names = [str(part.key) for part in path if isinstance(part, jax.tree_util.DictKey)]
            name = names[-1] if names else ""
            return _at(leaf, stored(name, leaf.shape, self.mesh, self.rules, over=over))

        return jax.tree_util.tree_map_with_path(split, tree)

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
        compiled = initial.lower(key).compile()
        meet("initial state")
        return compiled(key)

    def start(self, tree: functional.Tree, batch_stats: functional.Tree) -> TrainState:
        """A state that begins with given parameters and batch statistics."""
        assemble = jax.jit(
            self._assemble,
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, self.abstract),
        )
        return assemble(tree, batch_stats)

    def _assemble(self, tree: functional.Tree, batch_stats: functional.Tree) -> TrainState:
        params = self.packing.pack(tree)
        average = jax.tree.map(jnp.copy, params) if self.ema else None
        return TrainState(jnp.int32(0), params, batch_stats, self.optimizer.init(params), average)


def _at(leaf: Any, sharding: NamedSharding) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def moving_average(average: Packed, params: Packed, step: jax.Array, decay: float) -> Packed:
    """The average moved towards the parameters: decay x average + (1 - decay) x params.

    While it is smaller, (1 + step) / (10 + step) is the decay, so that the average soon forgets the
    random start.
    """
    rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, p: rate * a + (1 - rate) * p, average, params)
