"""What a run computes: network, optimizer, the places of all arrays, and the step made of them.

Nothing here holds data or arrays, so that the same program can be made for devices that are not
there.
"""

import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from zzhnet_jax.errors import ConfigError
from zzhnet_jax.models import functional, registry
from zzhnet_jax.models.cost import replace_everywhere
from zzhnet_jax.models.io import read_weights

from .config import ExperimentConfig, ModelSpec
from .optimizer import decay_mask, make_optimizer, make_schedule
from .packing import Packing
from .rules import rules_for
from .sharding import check_batch
from .state import Build, StateMaker, TrainState
from .step import lower_train_step


def model_builder(spec: ModelSpec) -> Build:
    """The function that makes a run's network from its random streams."""
    config = registry.override(registry.preset(spec.name), spec.overrides)
    task = getattr(config, "task", "bcd")
    if registry.num_images(spec.name) != 2 or task != "bcd":
        raise ConfigError(
            "model.name", spec.name, "a network of two images that tells change and nothing else"
        )
    if spec.compute_dtype is not None:
        config = replace_everywhere(config, "dtype", spec.compute_dtype)

    def build(rngs: nnx.Rngs) -> nnx.Module:
        return registry.build(spec.name, config, spec.num_classes, rngs=rngs)

    return build


class Program:
    """One experiment on one mesh.

    Attributes:
      config: the experiment.
      mesh: the devices.
      graphdef: the network's structure.
      rules: how its parameters and activations are split.
      packing: layout of its parameters in the training state.
      maker: makes training states, and tells their shapes and shardings.
      parameters: how many the network has.
    """

    def __init__(self, config: ExperimentConfig, mesh: Mesh, build: Build | None = None) -> None:
        """Puts the parts together; nothing is computed or allocated.

        Args:
          config: the experiment.
          mesh: devices, possibly of a topology that is only described.
          build: makes the network; that of `config.model` if None.

        Raises:
          ConfigError: a batch or crop cannot be split as the mesh asks, or a field does not fit.
        """
        check_batch(config, mesh)
        _check_offload(config, mesh)
        build = build or model_builder(config.model)
        self.config, self.mesh = config, mesh
        self.rules = rules_for(config.model.name)
        self.graphdef, params, self._stats = functional.abstract(build)
        self._params = params
        self.parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
        self.packing = Packing(params, decay_mask(params, config.optim.decayed))
        self._schedule = make_schedule(config.optim, config.train.steps)
        self._optimizer = make_optimizer(config.optim, self._schedule, self.packing.decay_mask)
        self.maker = StateMaker(
            build,
            (params, self._stats),
            self.packing,
            self._optimizer,
            mesh,
            ema=config.optim.ema_decay > 0,
            rules=self.rules,
            shard_optimizer=config.mesh.shard_optimizer,
        )

    def load(self, path: str) -> TrainState:
        """A fresh state with the weights of a saved model.

        Args:
          path: as for `load_model`.

        Raises:
          CheckpointError: there is no model, or it is of another network.
        """
        shapes = {"params": self._params, "stats": self._stats}
        tree = read_weights(path, jax.tree.map(_shape, shapes))
        return self.maker.start(tree["params"], tree["stats"])

    @property
    def network(self) -> Any:
        """The network with shapes for arrays."""
        return functional.merge(self.graphdef, self._params, self._stats)

    def lower(self) -> jax.stages.Lowered:
        """Traces the training step; `.compile()` it for the mesh's devices."""
        data, train = self.config.data, self.config.train
        return lower_train_step(
            self.graphdef,
            self.packing,
            self._optimizer,
            self._schedule,
            self.maker.abstract,
            self.mesh,
            image_shape=(data.batch_size, data.crop_size, data.crop_size, len(data.mean)),
            loss=train.loss,
            ema_decay=self.config.optim.ema_decay,
            rules=self.rules,
            accumulation=train.accumulation,
            remat=train.remat,
        )


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _check_offload(config: ExperimentConfig, mesh: Mesh) -> None:
    """Raises `ConfigError` where activations are to wait in a host memory that devices lack."""
    platform = mesh.devices.flat[0].platform
    if config.train.remat == "offload" and platform == "cpu":
        allowed = "'none', 'blocks' or 'blocks+scan' on a CPU, whose memory is the host's already"
        raise ConfigError("train.remat", "offload", allowed)
