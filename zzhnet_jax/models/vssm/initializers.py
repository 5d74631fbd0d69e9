"""Initial values as the PyTorch originals draw them."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float

LinearInit = Literal["truncated_normal", "uniform"]

_TRUNCATION = 2.0


def draw(
    sample: Callable[[jax.Array, tuple[int, ...]], Array], key: jax.Array, shape: Sequence[int]
) -> Float[Array, "..."]:
    """Random values of the given shape, taken from the next power of two.

    XLA compiles a random generator for every shape anew, 0.3 s each; a network has some hundred
    shapes of parameters but fewer than twenty powers of two among their sizes.
    """
    size = math.prod(shape)
    return _shaped(sample(key, (1 << (size - 1).bit_length(),)), tuple(shape))


@partial(jax.jit, static_argnames="shape")
def _shaped(x: Array, shape: tuple[int, ...]) -> Array:
    return x[: math.prod(shape)].reshape(shape)


def torch_uniform(fan_in: int) -> Initializer:
    """Uniform within +-1 / sqrt(fan_in): PyTorch's default for weights and biases alike."""
    bound = 1 / math.sqrt(fan_in)

    def init(
        key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32, out_sharding: Any = None
    ) -> Array:
        sample = partial(jax.random.uniform, minval=-bound, maxval=bound)
        return draw(sample, key, shape).astype(dtype)

    return init


def truncated_normal(std: float = 0.02) -> Initializer:
    """Normal with the given deviation, cut at the absolute values +-2 (not at two deviations)."""
    cut = _TRUNCATION / std

    def sample(key: jax.Array, shape: tuple[int, ...]) -> Array:
        return std * jax.random.truncated_normal(key, -cut, cut, shape)

    def init(
        key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32, out_sharding: Any = None
    ) -> Array:
        return draw(sample, key, shape).astype(dtype)

    return init


def linear_initializers(kind: LinearInit, fan_in: int) -> tuple[Initializer, Initializer]:
    """Initializers of the kernel and bias of a linear layer.

    "truncated_normal" is what VMamba's hierarchy gives its linear layers (deviation 0.02, bias 0),
    "uniform" is PyTorch's own default, which the decoders keep.
    """
    if kind == "uniform":
        return torch_uniform(fan_in), torch_uniform(fan_in)
    return truncated_normal(), jax.nn.initializers.zeros


def step_bias(
    uniform: Float[Array, "..."], *, dt_min: float, dt_max: float, floor: float
) -> Float[Array, "..."]:
    """Bias whose softplus is a step size log-uniform in [dt_min, dt_max], clamped below at `floor`.

    Args:
      uniform: draws from [0, 1).
      dt_min: smallest step.
      dt_max: largest step.
      floor: steps are at least this.
    """
    log_min, log_max = math.log(dt_min), math.log(dt_max)
    dt = jnp.maximum(jnp.exp(uniform * (log_max - log_min) + log_min), floor)
    return dt + jnp.log(-jnp.expm1(-dt))
