"""The one place that turns Flax NNX modules into functions of plain pytrees, and back.

Training, conversion and checkpoints only ever see `(params, batch_stats)`: nested dicts of arrays.
Everything that depends on the version of Flax stands here.
"""

from collections.abc import Callable
from typing import Any, cast

import jax
from flax import nnx

Tree = dict[str, Any]
Build = Callable[[nnx.Rngs], nnx.Module]


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Tree, Tree]:
    """Takes a module apart into its static structure, parameters and batch statistics.

    Returns:
      graphdef (hashable, static), params and batch_stats: nested dicts whose keys are attribute
      names (list positions are integers).
    """
    parts: Any = nnx.split(model, nnx.Param, nnx.BatchStat)
    graphdef, params, stats = parts
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(stats)


def merge(graphdef: nnx.GraphDef, params: Tree, batch_stats: Tree) -> nnx.Module:
    """Builds a module with variables of its own, so that it may be called in any transformation."""
    return nnx.merge(graphdef, params, batch_stats, copy=True)


def apply(
    graphdef: nnx.GraphDef,
    params: Tree,
    batch_stats: Tree,
    *inputs: jax.Array,
    train: bool = False,
    key: jax.Array | None = None,
) -> tuple[Any, Tree]:
    """Runs a network as a pure function.

    Args:
      graphdef: structure from `split`.
      params: parameters.
      batch_stats: running statistics of the network's BatchNorm layers; `{}` when it has none.
      *inputs: the network's positional arguments, images (b, h, w, c).
      train: batch statistics from this batch (and updated), dropout and drop path on.
      key: random key of this call; needed when `train` and the network drops anything.

    Returns:
      The network's output and the new batch statistics (the old ones unless `train`).
    """
    model = merge(graphdef, params, batch_stats)
    if train:
        model.train()
    else:
        model.eval()
    output = model(*inputs, key=key)
    return output, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


def abstract(build: Build) -> tuple[nnx.GraphDef, Tree, Tree]:
    """Like `split(build(rngs))` with shapes for arrays: nothing is computed or allocated."""
    return split(nnx.eval_shape(lambda: build(_rngs(jax.random.key(0)))))


def initializer(
    build: Build,
) -> Callable[[jax.Array], tuple[Tree, Tree]]:
    """A function from a key to fresh `(params, batch_stats)`, those of `build(nnx.Rngs(key))`.

    Jit it with output shardings, and no array is ever whole on one device.
    """

    def init(key: jax.Array) -> tuple[Tree, Tree]:
        _, params, stats = split(build(_rngs(key)))
        return params, stats

    return init


class _Keys:
    """Draws the keys that `nnx.Rngs` draws, for a network that is built while it is traced.

    `nnx.Rngs` counts them in an array, and tracing that takes time quadratic in their number: 7.7 s
    against 0.6 s for mambabcd_tiny.
    """

    def __init__(self, key: jax.Array) -> None:
        self._key = key
        self._drawn = 0

    def params(self) -> jax.Array:
        self._drawn += 1
        return jax.random.fold_in(self._key, self._drawn - 1)


def _rngs(key: jax.Array) -> nnx.Rngs:
    return cast(nnx.Rngs, _Keys(key))
