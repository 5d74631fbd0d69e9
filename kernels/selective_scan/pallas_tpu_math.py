"""Functions of a scan as Mosaic computes them with few instructions and to full precision.

Both take exp(-|x|), which is never more than 1: no case needs to be told apart from the others.
"""

import math

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

# log1p(z) / z on [0, 1], rising powers: interpolated at Chebyshev nodes, to 2.2e-7 of the value.
_LOG1P = (
    *(0.9999997615814209, -0.49997174739837646, 0.3327192962169647, -0.24474774301052094),
    *(0.1768747717142105, -0.1068500280380249, 0.04349390044808388, -0.00837115291506052),
)

# JAX moved it after 0.10.
_reciprocal = pltpu.reciprocal if hasattr(pltpu, "reciprocal") else pl.reciprocal


def softplus(x: Float[Array, "*x"]) -> Float[Array, "*x"]:
    """As `base.softplus`; above torch's threshold the two agree in float32.

    max(x, 0) + log1p(exp(-|x|)), with log1p(z) = z p(z) on [0, 1] from a polynomial: Mosaic's own
    log1p takes the logarithm of 1 + z, which leaves few correct digits of a small step size.
    """
    z = _decayed(x)
    p = jnp.float32(_LOG1P[-1])
    for coefficient in _LOG1P[-2::-1]:
        p = p * z + coefficient
    return jnp.maximum(x, 0.0) + z * p


def logistic(x: Float[Array, "*x"]) -> Float[Array, "*x"]:
    """1 / (1 + exp(-x)); a divisor between 1 and 2 costs half the instructions of any."""
    z = _decayed(x)
    inverse = _reciprocal(1.0 + z, full_range=False)
    return jnp.where(x < 0, z * inverse, inverse)


def _decayed(x: Float[Array, "*x"]) -> Float[Array, "*x"]:
    """exp(-|x|)."""
    return jnp.exp2(jnp.abs(x) * -math.log2(math.e))
