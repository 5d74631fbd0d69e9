"""The selective scan as its users call it: validate, choose an implementation, call it, cast.

A new implementation is one more file and one more line in `IMPLEMENTATIONS`; the tests run for
everything listed there. `rules.py` says which runs where nobody names one.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, Literal, overload

import jax
from jaxtyping import Array, Float

from ..platforms import by_platform
from .associative import associative_scan
from .base import (
    Implementation,
    Scan,
    Tile,
    UnavailableError,
    as_array,
    as_optional_array,
    validate,
)
from .chunked import chunked_scan
from .partition import varying_alike
from .reference import sequential_scan
from .rules import Choice, Chosen, choose
from .sequence_sharded import sequence_sharded_scan
from .tiling import tuned_tile


def _in_module(module: str, name: str) -> Callable[..., Any]:
    """A function of a module that is imported when it is called."""

    def call(*args: Any, **options: Any) -> Any:
        return getattr(import_module(f".{module}", __package__), name)(*args, **options)

    return call


def _kernel(module: str, scan: str) -> Implementation:
    """The implementation in a module that is imported only when it is used."""
    return Implementation(
        scan=_in_module(module, scan),
        unavailable=_in_module(module, "unavailable"),
        unsupported=_in_module(module, "unsupported"),
        tiled=True,
    )


def _chunked(*operands: Any, tile: Tile | None = None, **flags: Any) -> tuple[Array, Array]:
    """`chunked_scan`, which has blocks of steps only."""
    return chunked_scan(*operands, **flags, chunk=None if tile is None else tile.steps)


IMPLEMENTATIONS: dict[str, Implementation] = {
    "sequential": Implementation(sequential_scan),
    "associative": Implementation(associative_scan),
    "chunked": Implementation(_chunked, tiled=True),
    "pallas_tpu": _kernel("pallas_tpu", "pallas_tpu_scan"),
    "pallas_gpu": _kernel("pallas_gpu", "pallas_gpu_scan"),
    "triton": _kernel("triton_gpu", "triton_scan"),
}


def available_implementations() -> tuple[str, ...]:
    """Names of the implementations that can run on this machine."""
    return tuple(name for name, item in IMPLEMENTATIONS.items() if item.unavailable() is None)


@overload
def selective_scan(
    u: Float[Array, "b l d"],
    delta: Float[Array, "b l d"],
    A: Float[Array, "d n"],
    B: Float[Array, "b l g n"],
    C: Float[Array, "b l g n"],
    D: Float[Array, "d"] | None = None,
    *,
    delta_bias: Float[Array, "d"] | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    initial_state: Float[Array, "b d n"] | None = None,
    return_final_state: Literal[False] = False,
    implementation: str | None = None,
    tile: Tile | None = None,
    axis_name: str | None = None,
) -> Float[Array, "b l d"]: ...


@overload
def selective_scan(
    u: Float[Array, "b l d"],
    delta: Float[Array, "b l d"],
    A: Float[Array, "d n"],
    B: Float[Array, "b l g n"],
    C: Float[Array, "b l g n"],
    D: Float[Array, "d"] | None = None,
    *,
    delta_bias: Float[Array, "d"] | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    initial_state: Float[Array, "b d n"] | None = None,
    return_final_state: Literal[True],
    implementation: str | None = None,
    tile: Tile | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, "b l d"], Float[Array, "b d n"]]: ...


def selective_scan(
    u: Float[Array, "b l d"],
    delta: Float[Array, "b l d"],
    A: Float[Array, "d n"],
    B: Float[Array, "b l g n"],
    C: Float[Array, "b l g n"],
    D: Float[Array, "d"] | None = None,
    *,
    delta_bias: Float[Array, "d"] | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    initial_state: Float[Array, "b d n"] | None = None,
    return_final_state: bool = False,
    implementation: str | None = None,
    tile: Tile | None = None,
    axis_name: str | None = None,
) -> Float[Array, "b l d"] | tuple[Float[Array, "b l d"], Float[Array, "b d n"]]:
    """Linear recurrence whose coefficients depend on the input (the S6 operator of Mamba).

        h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t
        y_t = C_t . h_t + D u_t

    with delta_t the step size after bias and softplus. Channel k * (d / g) + j uses group k of B
    and C. Differentiable in every array, the initial state included, and from both results; works
    under jit, vmap, jax.checkpoint, and with batch or channels sharded over a mesh.

    Args:
      u: input; bfloat16, float16, float32 or float64.
      delta: step sizes before bias and softplus.
      A: diagonal of the state matrix of each channel; usually negative.
      B: input matrix of each time step and group.
      C: output matrix of each time step and group.
      D: weight of the direct path from u to y; None leaves that path out.
      delta_bias: added to delta before the softplus.
      delta_softplus: apply log(1 + exp(.)) to the step sizes; the identity above 20, as in torch.
      reverse: run from the last time step to the first; y keeps the order of u.
      initial_state: state before the first step in scan order; zeros if None.
      return_final_state: also return the state after the last step in scan order.
      implementation: one of `available_implementations()`, or None for the best one on the platform
        that the program is compiled for, by the rules in `rules.py`.
      tile: block sizes for the named implementation; None leaves them to what was measured here
        (see `tuning.py`), or else to the implementation.
      axis_name: inside `shard_map`, the mesh axis over which the length is split: u, delta, B and C
        are this device's part, all else, and the final state, the same on all devices.

    Returns:
      y in u's dtype; with `return_final_state` also the state, in the dtype of the arithmetic:
      float64 if any array is float64, else float32.

    Raises:
      ShapeError: shapes or dtypes do not fit together.
      UnavailableError: the named implementation does not exist, cannot run here, or cannot take
        these operands.
      ValueError: `tile` is given for an implementation without blocks, or for none, or `axis_name`
        is no axis of a surrounding `shard_map`.

    Source: Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023,
      algorithm 2 and section 3.3.
    """
    u, delta, A, B, C = (as_array(x) for x in (u, delta, A, B, C))
    D, delta_bias, initial_state = (as_optional_array(x) for x in (D, delta_bias, initial_state))
    validate(u, delta, A, B, C, D, delta_bias, initial_state)
    operands = (u, delta, A, B, C, D, delta_bias, initial_state)
    if axis_name is not None:
        _check_axis(axis_name)
    y, state = _run(
        *operands,
        choice=choose_implementation(implementation, operands, tile),
        axis_name=axis_name,
        delta_softplus=bool(delta_softplus),
        reverse=bool(reverse),
    )
    return (y, state) if return_final_state else y


@partial(jax.jit, static_argnames=("choice", "axis_name", "delta_softplus", "reverse"))
def _run(
    u: Float[Array, "b l d"],
    *others: Array | None,
    choice: Choice,
    axis_name: str | None,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Float[Array, "b l d"], Float[Array, "b d n"]]:
    """Calls what was chosen; compiled, so that a call outside of any jit is fast too."""
    flags: dict[str, Any] = dict(delta_softplus=delta_softplus, reverse=reverse)

    def runner(chosen: Chosen) -> Callable[..., tuple[Array, Array]]:
        scan = _bind_tile(chosen)
        if axis_name is not None:
            scan = partial(sequence_sharded_scan, scan, axis_name)

        def run(u: Float[Array, "b l d"], *others: Any) -> tuple[Array, Array]:
            y, state = scan(u, *others, **flags)
            return y.astype(u.dtype), state

        return run

    operands = varying_alike(u, *others)
    default = runner(choice.default)
    if not choice.on_platform:
        return default(*operands)
    branches = {platform: runner(chosen) for platform, chosen in choice.on_platform}
    return by_platform(*operands, default=default, **branches)


def _bind_tile(chosen: Chosen) -> Scan:
    scan: Any = IMPLEMENTATIONS[chosen.name].scan
    return scan if chosen.tile is None else partial(scan, tile=chosen.tile)


def choose_implementation(
    name: str | None, operands: tuple[Any, ...], tile: Tile | None = None
) -> Choice:
    """What to run: the named implementation, or the best on each platform.

    Args:
      name: an implementation, or None.
      operands: the eight operands, or anything with their shapes and dtypes.
      tile: block sizes, or None.

    Raises:
      UnavailableError: `name` is given and that implementation does not exist, cannot run here, or
        cannot take the operands.
      ValueError: `tile` is given and the implementation is not, or has no blocks.
    """
    if name is None:
        if tile is not None:
            raise ValueError(
                f"tile = {tile}: it needs an implementation, named, whose blocks it is"
            )
        choice = choose(IMPLEMENTATIONS, operands)
        return Choice(
            _with_tuned_tile(choice.default, operands),
            tuple((at, _with_tuned_tile(item, operands)) for at, item in choice.on_platform),
        )
    known = IMPLEMENTATIONS.get(name)
    if known is None:
        raise _unavailable(name, "cannot run here: there is none of that name")
    if (reason := known.unavailable()) is not None:
        raise _unavailable(name, f"cannot run here: {reason}")
    if (reason := known.unsupported(*operands)) is not None:
        raise _unavailable(name, f"cannot take these operands: {reason}")
    if tile is not None and not known.tiled:
        raise ValueError(f"tile = {tile}: implementation {name!r} has no blocks to size")
    chosen = Chosen(name, tile)
    return Choice(chosen if tile is not None else _with_tuned_tile(chosen, operands))


def _with_tuned_tile(chosen: Chosen, operands: tuple[Any, ...]) -> Chosen:
    """With the block sizes that were measured to be best here, if any were."""
    if not IMPLEMENTATIONS[chosen.name].tiled:
        return chosen
    return Chosen(chosen.name, tuned_tile(chosen.name, operands))


def _unavailable(name: str, reason: str) -> UnavailableError:
    available = ", ".join(available_implementations())
    return UnavailableError(f"implementation {name!r} {reason}; available: {available}")


def _check_axis(axis_name: str) -> None:
    """Raises ValueError unless a surrounding `shard_map` has that axis."""
    axes = jax.sharding.get_abstract_mesh().manual_axes
    if axis_name not in axes:
        there = ", ".join(axes) if axes else "there is no surrounding shard_map"
        raise ValueError(f"axis_name = {axis_name!r}: expected an axis of shard_map ({there})")
