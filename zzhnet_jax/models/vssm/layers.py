"""Linear layers, convolutions, norms, MLPs and drop path, for channel-last images."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from zzhnet_jax.kernels.convolution import convolution
from zzhnet_jax.kernels.matmul import matmul
from zzhnet_jax.models.placement import constrain
from zzhnet_jax.models.vssm.config import Activation, NormKind
from zzhnet_jax.models.vssm.initializers import LinearInit, linear_initializers, torch_uniform

_EPSILON = 1e-5
_BATCH_MOMENTUM = 0.1


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """X times the normal distribution function, exactly (Hendrycks & Gimpel 2016).

    Keeps only x for its gradient; JAX's own keeps two more arrays of the size of an MLP's hidden
    layer, which are a fifth of what a training step holds.
    """
    return jax.nn.gelu(x, approximate=False)


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    return jax.nn.gelu(x, approximate=False), x


def _gelu_backward(x: Array, cotangent: Array) -> tuple[Array]:
    distribution = 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))
    density = jnp.exp(-0.5 * jnp.square(x)) / math.sqrt(2 * math.pi)
    return ((distribution + x * density) * cotangent,)


gelu.defvjp(_gelu_forward, _gelu_backward)

ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": gelu,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
}


def fold_key(key: jax.Array | None, index: int) -> jax.Array | None:
    """The key of part `index` of a computation that was given `key`; None stays None."""
    return None if key is None else jax.random.fold_in(key, index)


def _dot_general(x: Array, kernel: Array, dimensions: Any, **precision: Any) -> Array:
    """`matmul` in the form in which a linear layer calls it."""
    return matmul(x, kernel)


def make_linear(
    d_in: int,
    d_out: int,
    *,
    use_bias: bool = True,
    init: LinearInit = "truncated_normal",
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A linear layer over the channels with the initial values named by `init`."""
    kernel_init, bias_init = linear_initializers(init, d_in)
    return nnx.Linear(
        d_in,
        d_out,
        use_bias=use_bias,
        kernel_init=kernel_init,
        bias_init=bias_init,
        dot_general=_dot_general,
        dtype=dtype,
        rngs=rngs,
    )


def _conv_general_dilated(
    x: Array, kernel: Array, strides: Any, padding: Any, **settings: Any
) -> Array:
    """`convolution` in the form in which a convolution layer calls it."""
    return convolution(x, kernel, stride=strides[0], padding=padding[0][0])


def make_conv(
    d_in: int,
    d_out: int,
    kernel_size: int,
    *,
    stride: int = 1,
    padding: int = 0,
    use_bias: bool = True,
    init: nnx.Initializer | None = None,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A square convolution with explicit padding, as PyTorch has it.

    Initial values are drawn by `init`; by PyTorch's default if None.
    """
    init = init or torch_uniform(d_in * kernel_size**2)
    return nnx.Conv(
        d_in,
        d_out,
        (kernel_size, kernel_size),
        strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        use_bias=use_bias,
        kernel_init=init,
        bias_init=init,
        conv_general_dilated=_conv_general_dilated,
        dtype=dtype,
        rngs=rngs,
    )


class BatchNorm(nnx.Module):
    """Batch normalisation over every axis but the last, as PyTorch defines it.

    The running variance collects the unbiased variance of each batch, and running = 0.9 running +
    0.1 batch. Arithmetic is in float32.
    """

    def __init__(self, d: int, *, dtype: DTypeLike = jnp.float32) -> None:
        self.scale = nnx.Param(jnp.ones(d, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(d, jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros(d, jnp.float32))
        self.var = nnx.BatchStat(jnp.ones(d, jnp.float32))
        self.count = nnx.BatchStat(jnp.zeros((), jnp.int32))
        self.use_running_average = True
        self.dtype = dtype

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """Normalises; in training mode with the batch's statistics, which it collects."""
        wide = x.astype(jnp.float32)
        if self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            axes = tuple(range(x.ndim - 1))
            mean = jnp.mean(wide, axes)
            var = jnp.mean(jnp.square(wide - mean), axes)
            count = x.size // x.shape[-1]
            self._collect(mean, var * (count / max(count - 1, 1)))
        y = (wide - mean) * (jax.lax.rsqrt(var + _EPSILON) * self.scale[...]) + self.bias[...]
        return y.astype(self.dtype)

    def _collect(self, mean: Array, var: Array) -> None:
        for running, batch in ((self.mean, mean), (self.var, var)):
            old = running[...]
            running.set_value(old + _BATCH_MOMENTUM * (jax.lax.stop_gradient(batch) - old))
        self.count.set_value(self.count[...] + 1)


def make_norm(
    kind: NormKind, d: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
) -> nnx.LayerNorm | BatchNorm:
    """A norm over `d` channels: "layer" per pixel, "batch" per channel.

    Epsilon 1e-5, statistics in float32.
    """
    if kind == "batch":
        return BatchNorm(d, dtype=dtype)
    return nnx.LayerNorm(d, epsilon=_EPSILON, use_fast_variance=False, dtype=dtype, rngs=rngs)


def _drop(x: Array, rate: float | Array, key: jax.Array | None, shape: Sequence[int]) -> Array:
    """Sets values to 0 at random and scales the rest by 1 / (1 - rate).

    Args:
      x: values.
      rate: share that is dropped; the number 0 drops nothing and needs no key.
      key: random key.
      shape: of the random choice, which is broadcast.
    """
    if isinstance(rate, float | int) and rate == 0:
        return x
    if key is None:
        raise ValueError(f"training mode with drop rate {rate} needs key=")
    keep = jax.random.bernoulli(key, 1 - rate, shape)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


class Dropout(nnx.Module):
    """Sets values to 0 at random in training mode and scales the rest by 1 / (1 - rate).

    Args:
      rate: share of values dropped.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.deterministic = True

    def __call__(self, x: Array, *, key: jax.Array | None = None) -> Array:
        """Drops.

        Raises:
          ValueError: in training mode with a rate above 0 and no key.
        """
        return x if self.deterministic else _drop(x, self.rate, key, x.shape)


class DropPath(nnx.Module):
    """Stochastic depth: drops a residual branch of whole samples in training mode.

    The rate is an argument of the call, so that blocks of a stage differ in their weights alone.
    """

    def __init__(self) -> None:
        self.deterministic = True

    def __call__(
        self, x: Float[Array, "b *c"], rate: float | Array, *, key: jax.Array | None = None
    ) -> Float[Array, "b *c"]:
        """Drops.

        Raises:
          ValueError: in training mode with a rate above 0 and no key.
        """
        shape = x.shape[:1] + (1,) * (x.ndim - 1)
        return x if self.deterministic else _drop(x, rate, key, shape)


class Mlp(nnx.Module):
    """Two linear layers with an activation between.

    Args:
      d_model: width in and out.
      d_hidden: width between.
      activation: its name.
      dropout: rate after each layer.
      linear_init: initial values of the linear layers.
      dtype: compute type.
      rngs: source of the initial weights.
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        *,
        activation: Activation = "gelu",
        dropout: float = 0.0,
        linear_init: LinearInit = "truncated_normal",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        make = partial(make_linear, init=linear_init, dtype=dtype, rngs=rngs)
        self.fc1 = make(d_model, d_hidden)
        self.fc2 = make(d_hidden, d_model)
        self.dropout = Dropout(dropout)
        self.activation = activation

    def __call__(
        self, x: Float[Array, "*b d_model"], *, key: jax.Array | None = None
    ) -> Float[Array, "*b d_model"]:
        """Applies the layer."""
        x = self.fc1(x)
        if x.ndim == 4:
            x = constrain(x, "batch rows columns hidden")
        x = ACTIVATIONS[self.activation](x)
        x = self.dropout(x, key=fold_key(key, 0))
        return self.dropout(self.fc2(x), key=fold_key(key, 1))


class GatedMlp(nnx.Module):
    """fc2(u * act(v)) with [u, v] = fc1(x). The arguments are those of `Mlp`."""

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        *,
        activation: Activation = "gelu",
        dropout: float = 0.0,
        linear_init: LinearInit = "truncated_normal",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        make = partial(make_linear, init=linear_init, dtype=dtype, rngs=rngs)
        self.fc1 = make(d_model, 2 * d_hidden)
        self.fc2 = make(d_hidden, d_model)
        self.dropout = Dropout(dropout)
        self.activation = activation

    def __call__(
        self, x: Float[Array, "*b d_model"], *, key: jax.Array | None = None
    ) -> Float[Array, "*b d_model"]:
        """Applies the layer."""
        u, v = jnp.split(self.fc1(x), 2, axis=-1)
        return self.dropout(self.fc2(u * ACTIVATIONS[self.activation](v)), key=key)
