"""What all implementations share: errors, calling convention, shape checks, dtypes, step sizes.

Shape letters, here and in every implementation: b batch, l length, d channels, n d_state, g groups,
p = d / g channels of a group.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SOFTPLUS_THRESHOLD = 20.0  # torch's: softplus is the identity above it


class ShapeError(ValueError):
    """An argument of a kernel has a shape or dtype that does not fit the others."""


class UnavailableError(RuntimeError):
    """An implementation was asked for by name and cannot run here."""


class Scan(Protocol):
    """What an implementation looks like. Its arguments have been validated.

    It returns y (b, l, d) in u's dtype or a wider one, and the state after the last step in
    `state_dtype`. It must be differentiable, and work under jit and vmap.
    """

    def __call__(
        self,
        u: Float[Array, "b l d"],
        delta: Float[Array, "b l d"],
        A: Float[Array, "d n"],
        B: Float[Array, "b l g n"],
        C: Float[Array, "b l g n"],
        D: Float[Array, "d"] | None,
        delta_bias: Float[Array, "d"] | None,
        initial_state: Float[Array, "b d n"] | None,
        *,
        delta_softplus: bool,
        reverse: bool,
    ) -> tuple[Float[Array, "b l d"], Float[Array, "b d n"]]:
        """Runs the scan."""


class Forward(Protocol):
    """The first half of a kernel that XLA cannot look into; see `Kernel`."""

    def __call__(
        self,
        u: Float[Array, "b l d"],
        delta: Float[Array, "b l d"],
        A: Float[Array, "d n"],
        B: Float[Array, "b l g n"],
        C: Float[Array, "b l g n"],
        D: Float[Array, "d"] | None,
        delta_bias: Float[Array, "d"] | None,
        initial_state: Float[Array, "b d n"] | None,
        *,
        delta_softplus: bool,
        reverse: bool,
        tile: "Tile | None" = None,
        interpret: Any = False,
    ) -> tuple[Float[Array, "b l d"], Float[Array, "b d n"], Float[Array, "b k n d"]]:
        """Gives y, the last state, and what the backward half wants kept."""


class Backward(Protocol):
    """The second half of a kernel that XLA cannot look into; see `Kernel`."""

    def __call__(
        self,
        u: Float[Array, "b l d"],
        delta: Float[Array, "b l d"],
        A: Float[Array, "d n"],
        B: Float[Array, "b l g n"],
        C: Float[Array, "b l g n"],
        D: Float[Array, "d"] | None,
        delta_bias: Float[Array, "d"] | None,
        initial_state: Float[Array, "b d n"] | None,
        kept: Float[Array, "b k n d"],
        y_gradient: Float[Array, "b l d"],
        state_gradient: Float[Array, "b d n"],
        *,
        delta_softplus: bool,
        reverse: bool,
        tile: "Tile | None" = None,
        interpret: Any = False,
    ) -> tuple[Array | None, ...]:
        """Gives the gradients of the eight operands, in their shapes; None for None."""


@dataclass(frozen=True)
class Kernel:
    """A scan as two functions without gradients of their own.

    `partition.differentiable` makes a scan of it: it adds the gradient, folds `vmap` into batch or
    channels, and splits both halves over a mesh. What is kept is therefore of a fixed form.

    Attributes:
      forward: gives y, the last state and `kept`, the latter two in `state_dtype`.
      backward: gives the gradients.
      kept: how many states along the length `kept` has, given the length, d_state and tile. Neither
        batch nor channels may have a say in it: each device sees only a part of them.
    """

    forward: Forward
    backward: Backward
    kept: Callable[[int, int, "Tile | None"], int]


class Tile(NamedTuple):
    """Sizes of the block that a kernel works on at a time; it may be no multiple of the operands.

    Attributes:
      steps: time steps.
      channels: channels; None leaves it to the kernel.
      warps: warps of a GPU program; None leaves it to the kernel, and other kernels ignore it.
    """

    steps: int
    channels: int | None = None
    warps: int | None = None


class KernelScan(Scan, Protocol):
    """A scan that runs a `Kernel`."""

    def __call__(
        self,
        u: Float[Array, "b l d"],
        delta: Float[Array, "b l d"],
        A: Float[Array, "d n"],
        B: Float[Array, "b l g n"],
        C: Float[Array, "b l g n"],
        D: Float[Array, "d"] | None,
        delta_bias: Float[Array, "d"] | None,
        initial_state: Float[Array, "b d n"] | None,
        *,
        delta_softplus: bool,
        reverse: bool,
        tile: Tile | None = None,
        interpret: Any = False,
    ) -> tuple[Float[Array, "b l d"], Float[Array, "b d n"]]:
        """Runs the scan; `tile` None is the kernel's own choice, `interpret` is pallas_call's."""


def _runs_everywhere() -> str | None:
    return None


def _takes_everything(*operands: Array | None) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to compute the scan.

    Attributes:
      scan: the function.
      unavailable: says why `scan` cannot run on this machine, or returns None if it can.
      unsupported: given the eight operands (arrays, or anything with their shape and dtype), says
        why `scan` cannot take them, or returns None if it can.
      tiled: whether `scan` takes a keyword `tile`, a `Tile` or None.
    """

    scan: Scan
    unavailable: Callable[[], str | None] = _runs_everywhere
    unsupported: Callable[..., str | None] = _takes_everything
    tiled: bool = False


def output(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *, like: Array
) -> jax.ShapeDtypeStruct:
    """Type of a kernel's result, for `pallas_call(out_shape=...)`.

    Inside `shard_map` a type also says over which mesh axes a value varies; a result varies over
    those that the operand `like` varies over. `partition` makes all operands vary over the same.
    """
    varies = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varies)


def zeros(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *, like: Array) -> Array:
    """Zeros that, inside `shard_map`, vary over the mesh axes that `like` varies over.

    What a loop carries must start as it goes on, in this respect too.
    """
    axes = tuple(sorted(jax.typeof(like).manual_axis_type.varying))
    x = jnp.zeros(shape, dtype)
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def state_dtype(*arrays: Array | None) -> jnp.dtype:
    """The dtype of the state and all arithmetic: float64 if any array is float64, else float32."""
    wide = any(a is not None and a.dtype == jnp.float64 for a in arrays)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def softplus(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """log(1 + exp(x)), and x itself above torch's threshold; gradients are finite everywhere."""
    below = jnp.log1p(jnp.exp(jnp.minimum(x, SOFTPLUS_THRESHOLD)))
    return jnp.where(x > SOFTPLUS_THRESHOLD, x, below)


def step_size(
    delta: Float[Array, "... d"],
    delta_bias: Float[Array, "d"] | None,
    *,
    delta_softplus: bool,
    dtype: jnp.dtype,
) -> Float[Array, "... d"]:
    """The step sizes that the recurrence uses: bias added, then softplus, in `dtype`."""
    step = delta.astype(dtype)
    if delta_bias is not None:
        step = step + delta_bias.astype(dtype)
    return softplus(step) if delta_softplus else step


def compose(earlier: tuple[Array, Array], later: tuple[Array, Array]) -> tuple[Array, Array]:
    """Composition of the maps h -> decay h + drive, each given as (decay, drive)."""
    (decay_1, drive_1), (decay_2, drive_2) = earlier, later
    return decay_1 * decay_2, decay_2 * drive_1 + drive_2


def validate(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    delta_bias: Array | None,
    initial_state: Array | None,
) -> None:
    """Checks that the arguments of a scan fit together.

    Raises:
      ShapeError: names the first argument that does not fit, what it is and what was expected.
    """
    expect_floating(
        u=u, delta=delta, A=A, B=B, C=C, D=D, delta_bias=delta_bias, initial_state=initial_state
    )
    if u.ndim != 3 or 0 in u.shape:
        raise ShapeError(f"u has shape {u.shape}: expected (batch, length, channels), all >= 1")
    batch, length, d = u.shape
    expect_shape("delta", delta, u.shape)
    if A.ndim != 2 or A.shape[0] != d or A.shape[1] < 1:
        raise ShapeError(f"A has shape {A.shape}: expected ({d}, d_state >= 1)")
    n = A.shape[1]
    if B.ndim != 4 or B.shape[:2] != (batch, length) or B.shape[3] != n:
        raise ShapeError(f"B has shape {B.shape}: expected ({batch}, {length}, groups, {n})")
    groups = B.shape[2]
    if groups < 1 or d % groups:
        raise ShapeError(
            f"B has shape {B.shape}: expected groups, axis 2, to divide the {d} channels of u"
        )
    expect_shape("C", C, B.shape)
    expect_shape("D", D, (d,))
    expect_shape("delta_bias", delta_bias, (d,))
    expect_shape("initial_state", initial_state, (batch, d, n))


def expect_floating(**arrays: Array | None) -> None:
    """Raises ShapeError unless every array is None or floating."""
    for name, array in arrays.items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ShapeError(f"{name} has dtype {array.dtype}: expected a floating dtype")


def expect_shape(name: str, array: Array | None, expected: tuple[int, ...]) -> None:
    """Raises ShapeError unless `array` is None or has the expected shape."""
    if array is not None and array.shape != tuple(expected):
        raise ShapeError(f"{name} has shape {array.shape}: expected {tuple(expected)}")


def as_array(x: jax.typing.ArrayLike) -> Array:
    """What a caller gave (a numpy array too) as a jax array."""
    return jnp.asarray(x)


def as_optional_array(x: jax.typing.ArrayLike | None) -> Array | None:
    """As `as_array`; None stays None."""
    return None if x is None else jnp.asarray(x)
