"""The one place that turns Flax NNX modules into functions of plain pytrees, and back.

Training, conversion and checkpoints only ever see `(params, batch_stats)`: nested dicts of arrays.
Everything that depends on the version of Flax stands here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

Tree = dict[str, Any]
Build = Callable[[nnx.Rngs], nnx.Module]

RematPolicy = Literal["none", "blocks", "blocks+scan", "offload"]

# What scans keep for their gradient carries the second of these names, see `kernels`.
_BLOCK_INPUT, _SCAN_STATES = "block_input", "scan_states"

_remat_policy: ContextVar[RematPolicy | None] = ContextVar("remat_policy", default=None)


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


@contextmanager
def remat_policy(policy: RematPolicy | None) -> Iterator[None]:
    """Networks traced inside keep for the backward pass what `policy` says; None leaves it to them.

    "none" keeps everything. The others keep the input of every block and compute the rest again:
    "blocks" except the scans, "blocks+scan" these too, "offload" as well, with the inputs waiting
    in the host's memory.
    """
    token = _remat_policy.set(policy)
    try:
        yield
    finally:
        _remat_policy.reset(token)


def call_block(
    block: nnx.Module, x: jax.Array, key: jax.Array | None = None, *, remat: bool
) -> jax.Array:
    """Calls `block(x, key=key)` under the remat policy in force.

    Args:
      block: a part of a network that gives one array.
      x: its input.
      key: random key, or None.
      remat: what the network's own config wants where no policy is in force.

    Returns:
      What a plain call gives; batch statistics are updated as in one.
    """
    policy = _remat_policy.get() or ("blocks+scan" if remat else "none")
    if policy == "none":
        return cast(Any, block)(x, key=key)
    graphdef, params, stats = split(block)

    @partial(jax.checkpoint, policy=_what_to_keep(policy))
    def run(
        params: Tree, stats: Tree, x: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, Tree]:
        inner = merge(graphdef, params, stats)
        y = inner(checkpoint_name(x, _BLOCK_INPUT), key=key)
        return y, nnx.to_pure_dict(nnx.state(inner, nnx.BatchStat))

    y, stats = run(params, stats, x, key)
    if stats:
        nnx.update(block, stats)
    return y


def _what_to_keep(policy: RematPolicy) -> Callable[..., Any] | None:
    """The policy in the form in which `jax.checkpoint` takes it."""
    policies = jax.checkpoint_policies
    if policy == "blocks":
        return policies.save_only_these_names(_SCAN_STATES)
    if policy == "offload":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[_BLOCK_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    return None


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
