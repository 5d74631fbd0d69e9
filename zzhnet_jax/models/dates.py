"""Both dates of every sample as one batch, and back.

The two images of a sample stand next to each other, so that a batch that is split over devices is
split between samples: putting the dates together or apart moves nothing between devices.
"""

import jax.numpy as jnp
from jaxtyping import Array


def join_dates(pre: Array, post: Array) -> Array:
    """(b, ...) twice -> (2b, ...): pre and post of the first sample, of the second, and so on."""
    return jnp.stack((pre, post), axis=1).reshape(-1, *pre.shape[1:])


def split_dates(both: Array) -> tuple[Array, Array]:
    """The two dates back from `join_dates`."""
    pairs = both.reshape(-1, 2, *both.shape[1:])
    return pairs[:, 0], pairs[:, 1]
