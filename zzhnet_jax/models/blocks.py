"""How a network calls its blocks: one after another, as a loop, or side by side; recomputed or not.

Blocks of a stage differ in their weights alone. As a loop over stacked weights the program holds a
block once, and tracing and compiling it take the time of one. Training does so; elsewhere, where
there is less to compile, the copy of the weights that stacking makes at every call is not worth it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from .functional import Tree, merge, split

RematPolicy = Literal["none", "blocks", "blocks+scan", "offload"]

# Fewer blocks than this compile faster one by one: stacking and slicing weights takes code as well.
_FEWEST_OF_LOOP = 4

# What scans keep for their gradient carries the second of these names, see `kernels`.
_BLOCK_INPUT, _SCAN_STATES = "block_input", "scan_states"


@dataclass(frozen=True)
class _Mode:
    """What is in force while a network is traced."""

    remat: RematPolicy | None = None
    loops: bool = False


_PLAIN = _Mode()
_mode: ContextVar[_Mode] = ContextVar("block_mode", default=_PLAIN)


@contextmanager
def block_mode(*, remat: RematPolicy | None = None, loops: bool) -> Iterator[None]:
    """Decides how the networks traced inside call their blocks.

    Args:
      remat: what is kept for the backward pass; None leaves it to the networks. "none" keeps
        everything. The others keep the input of every block and compute the rest again: "blocks"
        except the scans, "blocks+scan" these too, "offload" as well, with the inputs waiting in the
        host's memory.
      loops: four blocks or more that differ in their weights alone become one loop.
    """
    token = _mode.set(_Mode(remat, loops))
    try:
        yield
    finally:
        _mode.reset(token)


def call_block(
    block: nnx.Module,
    x: jax.Array,
    key: jax.Array | None = None,
    *,
    remat: bool,
    **arguments: Any,
) -> jax.Array:
    """Calls `block(x, key=key, **arguments)` under the remat policy in force.

    Args:
      block: a part of a network that gives one array.
      x: its input.
      key: random key, or None.
      remat: what the network's own config wants where no policy is in force.
      arguments: arrays or numbers that it also takes.

    Returns:
      What a plain call gives; batch statistics are updated as in one.
    """
    policy = _mode.get().remat or ("blocks+scan" if remat else "none")
    if policy == "none":
        return cast(Any, block)(x, key=key, **arguments)
    graphdef, params, stats = split(block)

    @partial(jax.checkpoint, policy=_what_to_keep(policy))
    def run(params: Tree, stats: Tree, x: jax.Array, key: jax.Array | None, traced: Any) -> Any:
        x = checkpoint_name(x, _BLOCK_INPUT)
        return _call(graphdef, params, stats, x, key, **constants, **traced)

    # Numbers stay numbers, so that a rate of 0 costs nothing.
    traced = {name: value for name, value in arguments.items() if isinstance(value, jax.Array)}
    constants = {name: value for name, value in arguments.items() if name not in traced}
    y, stats = run(params, stats, x, key, traced)
    if stats:
        nnx.update(block, stats)
    return y


def _call(
    graphdef: nnx.GraphDef,
    params: Tree,
    stats: Tree,
    x: jax.Array,
    key: jax.Array | None,
    **arguments: Any,
) -> tuple[jax.Array, Tree]:
    """A module's output and new batch statistics."""
    module = merge(graphdef, params, stats)
    y = cast(Any, module)(x, key=key, **arguments)
    return y, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))


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


def call_blocks(
    blocks: Sequence[nnx.Module],
    x: jax.Array,
    key: jax.Array | None = None,
    *,
    drop_path: Sequence[float],
    remat: bool,
) -> jax.Array:
    """Calls blocks one after another, each on what the one before gave.

    Args:
      blocks: equal but for their weights; they give what they take.
      x: input of the first.
      key: random key, or None; block i gets it with i folded in.
      drop_path: rate of each block, its argument `drop_path`.
      remat: as in `call_block`.

    Returns:
      The output of the last; batch statistics are updated.
    """
    if not _mode.get().loops or len(blocks) < _FEWEST_OF_LOOP:
        for i, (block, rate) in enumerate(zip(blocks, drop_path, strict=True)):
            own = None if key is None else jax.random.fold_in(key, i)
            x = call_block(block, x, own, remat=remat, drop_path=rate)
        return x
    graphdef, params, stats = _stack(blocks)
    rates = jnp.asarray(drop_path, jnp.float32) if any(drop_path) else None

    def step(x: jax.Array, given: tuple[Tree, Tree, jax.Array, jax.Array | None]) -> Any:
        params, stats, i, rate = given
        block = merge(graphdef, params, stats)
        own = None if key is None else jax.random.fold_in(key, i)
        x = call_block(block, x, own, remat=remat, drop_path=0.0 if rate is None else rate)
        return x, nnx.to_pure_dict(nnx.state(block, nnx.BatchStat))

    x, stats = jax.lax.scan(step, x, (params, stats, jnp.arange(len(blocks)), rates))
    _unstack(blocks, stats)
    return x


def call_each(
    modules: Sequence[nnx.Module], x: jax.Array, key: jax.Array | None = None
) -> jax.Array:
    """Calls module i on x[i], all of them as one vectorised computation.

    The program holds the computation once, so it compiles in the time of one module.

    Args:
      modules: m of them, equal but for their weights.
      x: inputs, stacked along a first axis of size m.
      key: random key, or None; each module gets one of its own.

    Returns:
      The outputs, stacked alike; batch statistics are updated as in plain calls.
    """
    graphdef, params, stats = _stack(modules)
    keys = None if key is None else jax.random.split(key, len(modules))
    y, stats = jax.vmap(partial(_call, graphdef))(params, stats, x, keys)
    _unstack(modules, stats)
    return y


def _stack(modules: Sequence[nnx.Module]) -> tuple[nnx.GraphDef, Tree, Tree]:
    """Their common structure; parameters and batch statistics, stacked along a first axis."""
    graphdefs, params, stats = zip(*map(split, modules), strict=True)
    if any(graphdef != graphdefs[0] for graphdef in graphdefs):
        raise ValueError("the modules differ in more than their weights")
    params, stats = (
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) for trees in (params, stats)
    )
    return graphdefs[0], params, stats


def _unstack(modules: Sequence[nnx.Module], stats: Tree) -> None:
    """Gives every module its part of stacked batch statistics."""
    if stats:
        for i, module in enumerate(modules):
            nnx.update(module, jax.tree.map(lambda leaf, i=i: leaf[i], stats))
