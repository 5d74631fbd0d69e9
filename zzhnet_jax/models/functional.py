"""The one place that turns Flax NNX modules into functions of plain pytrees, and back.

Training, conversion and checkpoints only ever see `(params, batch_stats)`: nested dicts of arrays.
Everything that depends on the version of Flax stands here.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
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
    return split(nnx.eval_shape(lambda: build(cast(nnx.Rngs, _OneKey()))))


class _OneKey:
    """Stands for `nnx.Rngs` where only shapes matter.

    The counting that `nnx.Rngs` does for each key takes time quadratic in their number when traced:
    7.7 s against 0.6 s for mambabcd_tiny.
    """

    def __init__(self) -> None:
        self._key = jax.random.key(0)

    def params(self) -> jax.Array:
        return self._key


def initializer(
    build: Build,
) -> Callable[[jax.Array], tuple[Tree, Tree]]:
    """A function from a key to fresh `(params, batch_stats)`.

    Jit it with output shardings, and no array is ever whole on one device.
    """

    def init(key: jax.Array) -> tuple[Tree, Tree]:
        _, params, stats = split(build(nnx.Rngs(key)))
        return params, stats

    return init


def remat(block: nnx.Module, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Calls `block(x, key=key)`, keeping only its input for the backward pass.

    Batch statistics are updated as in a plain call.
    """
    graphdef, params, stats = split(block)

    @jax.checkpoint
    def run(
        params: Tree, stats: Tree, x: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, Tree]:
        inner = merge(graphdef, params, stats)
        y = inner(x, key=key)
        return y, nnx.to_pure_dict(nnx.state(inner, nnx.BatchStat))

    y, stats = run(params, stats, x, key)
    if stats:
        nnx.update(block, stats)
    return y


def apply_each(
    modules: Sequence[nnx.Module], x: jax.Array, key: jax.Array | None = None
) -> jax.Array:
    """Calls module i on x[i], all of them as one vectorised computation.

    For modules of one structure with weights of their own. The program holds the computation once,
    so it compiles in the time of one module. Batch statistics are updated as in plain calls.

    Args:
      modules: m of them, equal but for their weights.
      x: inputs, stacked along a first axis of size m.
      key: random key, or None; each module gets one of its own.

    Returns:
      The outputs, stacked alike.
    """
    parts = [split(module) for module in modules]
    graphdef = parts[0][0]
    params, stats = (
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
        for trees in ([part[1] for part in parts], [part[2] for part in parts])
    )
    keys = None if key is None else jax.random.split(key, len(modules))

    def run(params: Tree, stats: Tree, x: jax.Array, key: jax.Array | None) -> Any:
        inner = merge(graphdef, params, stats)
        return inner(x, key=key), nnx.to_pure_dict(nnx.state(inner, nnx.BatchStat))

    y, stats = jax.vmap(run)(params, stats, x, keys)
    if stats:
        for i, module in enumerate(modules):
            nnx.update(module, jax.tree.map(lambda leaf, i=i: leaf[i], stats))
    return y
