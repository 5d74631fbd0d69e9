"""Functions of a scan as GPUs compute them fastest: powers of two, one instruction each.

Natural exponentials are powers of two whose exponent was scaled before, so that the scaling can be
part of a constant. Errors are within what the recurrence is allowed (`docs/kernels.md`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453

# log2(1 + t) / t on [0, 1], fitted to the least largest relative error, 2^-25; lowest power first.
_LOG2_OF_ONE_PLUS = (
    1.442695,
    -0.72134021,
    0.48069295,
    -0.35840841,
    0.27564115,
    -0.19711841,
    0.11285553,
    -0.04256666,
    0.00754908,
)


def exp2(x: Float[Array, "c"], *, interpret: bool) -> Float[Array, "c"]:
    """2^x in float32, to 2 units in the last place; 0 where that is below 2^-126."""
    return jnp.exp2(x) if interpret else _instruction("ex2.approx.ftz.f32", x)


def reciprocal(x: Float[Array, "c"], *, interpret: bool) -> Float[Array, "c"]:
    """1 / x in float32, to 1 unit in the last place."""
    return 1 / x if interpret else _instruction("rcp.approx.ftz.f32", x)


def softplus_of_log2(
    x: Float[Array, "c"], *, interpret: bool
) -> tuple[Float[Array, "c"], Callable[[], Float[Array, "c"]]]:
    """softplus(x ln 2), and its slope there when that is called.

    With t = 2^-|x| it is ln 2 (max(x, 0) + log2(1 + t)), and the slope 1 / (1 + t), or t / (1 + t)
    below zero. Above 20 it is the identity in float32, as PyTorch has it.
    """
    t = exp2(-jnp.abs(x), interpret=interpret)
    series = jnp.full_like(t, _LOG2_OF_ONE_PLUS[-1])
    for coefficient in reversed(_LOG2_OF_ONE_PLUS[:-1]):
        series = series * t + coefficient

    def slope() -> Float[Array, "c"]:
        return jnp.where(x >= 0, 1.0, t) * reciprocal(1 + t, interpret=interpret)

    return (t * series + jnp.maximum(x, 0.0)) * LN_2, slope


def _instruction(name: str, x: Float[Array, "c"]) -> Float[Array, "c"]:
    """One instruction of PTX; its results are those of Triton's own `exp2` but for denormals."""
    (result,) = plgpu.elementwise_inline_asm(
        f"{name} $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return result
