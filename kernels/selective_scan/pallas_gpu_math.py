"""Functions of a scan as GPUs compute them fastest, one instruction each.

Natural exponentials are powers of two whose exponent was scaled before, so that the scaling can be
part of a constant. XLA keeps compilers from joining a product and a sum, so that is asked for here.
Errors are within what the recurrence is allowed (`docs/kernels.md`).
"""

from collections.abc import Callable
from typing import Any

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


def fma(a: Any, b: Any, c: Any, *, interpret: bool) -> Float[Array, "c"]:
    """The sum a b + c in float32, rounded once; of scalars and rows of channels."""
    if interpret:
        return a * b + c
    return _instructions("fma.rn.f32 $0, $1, $2, $3;", *jnp.broadcast_arrays(a, b, c))


def exp2(x: Float[Array, "c"], *, interpret: bool) -> Float[Array, "c"]:
    """2^x in float32, to 2 units in the last place; 0 where that is below 2^-126."""
    return jnp.exp2(x) if interpret else _instructions("ex2.approx.ftz.f32 $0, $1;", x)


def exp2_of_minus_abs(x: Float[Array, "c"], *, interpret: bool) -> Float[Array, "c"]:
    """2^-|x|, as `exp2`: sign and magnitude cost nothing within the instruction."""
    if interpret:
        return jnp.exp2(-jnp.abs(x))
    return _instructions("abs.f32 $0, $1; neg.f32 $0, $0; ex2.approx.ftz.f32 $0, $0;", x)


def reciprocal(x: Float[Array, "c"], *, interpret: bool) -> Float[Array, "c"]:
    """1 / x in float32, to 1 unit in the last place."""
    return 1 / x if interpret else _instructions("rcp.approx.ftz.f32 $0, $1;", x)


def softplus_of_log2(
    x: Float[Array, "c"], *, interpret: bool
) -> tuple[Float[Array, "c"], Callable[[], Float[Array, "c"]]]:
    """softplus(x ln 2), and its slope there when that is called.

    With t = 2^-|x| it is ln 2 (max(x, 0) + log2(1 + t)), and the slope 1 / (1 + t), or t / (1 + t)
    below zero. Above 20 it is the identity in float32, as PyTorch has it.
    """
    t = exp2_of_minus_abs(x, interpret=interpret)
    series = jnp.full_like(t, _LOG2_OF_ONE_PLUS[-1])
    for coefficient in reversed(_LOG2_OF_ONE_PLUS[:-1]):
        series = fma(series, t, jnp.float32(coefficient), interpret=interpret)

    def slope() -> Float[Array, "c"]:
        return jnp.where(x >= 0, 1.0, t) * reciprocal(1 + t, interpret=interpret)

    return fma(t, series, jnp.maximum(x, 0.0), interpret=interpret) * LN_2, slope


def _instructions(assembly: str, *arguments: Float[Array, "c"]) -> Float[Array, "c"]:
    """PTX, from $1 and so on to $0."""
    (result,) = plgpu.elementwise_inline_asm(
        assembly,
        args=arguments,
        constraints=",".join(["=f", *["f"] * len(arguments)]),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(arguments[0].shape, arguments[0].dtype)],
    )
    return result
