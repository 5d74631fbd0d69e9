"""Mamba-2's scan: one decay a head, so that a chunk of the sequence is a few matrix products."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from zzhnet_jax.kernels.cross_scan import cross_merge, cross_scan
from zzhnet_jax.models.vssm.config import SS2DConfig
from zzhnet_jax.models.vssm.initializers import torch_uniform
from zzhnet_jax.models.vssm.scans import ROUTES, initial_A_log, initial_dt_bias

_CHUNK = 64


def ssd(
    x: Float[Array, "b l h p"],
    log_decay: Float[Array, "b l h"],
    B: Float[Array, "b l n"],
    C: Float[Array, "b l n"],
) -> Float[Array, "b l h p"]:
    """Scan with a scalar decay a head; B and C are shared by the heads.

        S_t = exp(log_decay_t) S_{t-1} + x_t B_t^T        (p, n)
        y_t = S_t C_t

    Within a chunk of 64 steps y is a masked matrix product; chunks pass their last state on.
    Padding steps have x = 0 and no decay.

    Args:
      x: input, already multiplied by the step size; float32.
      log_decay: A times the step size, at most 0.
      B: input matrix.
      C: output matrix.

    Source: Dao & Gu, "Transformers are SSMs", 2024, section 6.
    """
    length = x.shape[1]
    x, log_decay, B, C = (_chunks(array) for array in (x, log_decay, B, C))
    total = jnp.cumsum(log_decay, axis=2)
    causal = jnp.tril(jnp.ones((total.shape[2],) * 2, bool))[:, :, None]
    between = total[:, :, :, None] - total[:, :, None]
    weights = jnp.exp(jnp.where(causal, between, -jnp.inf))
    scores = jnp.einsum("bkin,bkjn->bkij", C, B)
    y = jnp.einsum("bkijh,bkjhp->bkihp", scores[..., None] * weights, x)

    remaining = jnp.exp(total[:, :, -1:] - total)
    added = jnp.einsum("bkjn,bkjhp->kbhpn", B, x * remaining[..., None])
    decay = jnp.exp(jnp.moveaxis(total[:, :, -1], 1, 0))[..., None, None]
    before = _states_before(decay, added)
    y = y + jnp.einsum("bkin,kbhpn->bkihp", C, before) * jnp.exp(total)[..., None]
    return y.reshape(y.shape[0], -1, *y.shape[3:])[:, :length]


def _chunks(array: Array) -> Array:
    """(b, l, ...) -> (b, ceil(l / chunk), chunk, ...), zeros at the end."""
    chunk = min(_CHUNK, array.shape[1])
    padding = [(0, 0), (0, -array.shape[1] % chunk)] + [(0, 0)] * (array.ndim - 2)
    return jnp.pad(array, padding).reshape(array.shape[0], -1, chunk, *array.shape[2:])


def _states_before(decay: Array, added: Array) -> Array:
    """State before every chunk, given each chunk's decay and what it adds; the chunks lead."""

    def step(state: Array, chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        decay, added = chunk
        return decay * state + added, state

    return jax.lax.scan(step, jnp.zeros_like(added[0]), (decay, added))[1]


class HeadScan(nnx.Module):
    """Makes the parameters of Mamba-2's scan from its input, for four cross routes, and scans.

    Attributes:
      x_proj: (d, 4, heads + 2 n) map to [step of each head, B, C].
      dt_bias: (4, heads) added before the softplus.
      A_log: (4, heads); A = -exp(A_log).
      D: (4, heads, d / heads) weights of the direct path.
    """

    def __init__(self, d: int, heads: int, config: SS2DConfig, *, rngs: nnx.Rngs) -> None:
        n = config.d_state
        init = torch_uniform(fan_in=d)
        self.x_proj = nnx.Param(init(rngs.params(), (d, ROUTES, heads + 2 * n), jnp.float32))
        self.dt_bias = nnx.Param(initial_dt_bias(config, (ROUTES, heads), rngs))
        self.A_log = nnx.Param(initial_A_log(config, (ROUTES, heads), rngs))
        self.D = nnx.Param(jnp.ones((ROUTES, heads, d // heads), jnp.float32))
        self.heads, self.n = heads, n

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        """Scans the image; arithmetic is float32, the result is in x's dtype."""
        b, height, width, d = x.shape
        routes = cross_scan(x, "cross")
        features = jnp.einsum(
            "bkld,dkf->bklf",
            routes,
            self.x_proj[...].astype(x.dtype),
            preferred_element_type=jnp.float32,
        )
        step, B, C = jnp.split(features, (self.heads, self.heads + self.n), axis=-1)
        delta = jax.nn.softplus(step + self.dt_bias[...][:, None])
        log_decay = -jnp.exp(self.A_log[...])[:, None] * delta
        u = routes.reshape(*routes.shape[:3], self.heads, -1).astype(jnp.float32)
        merged = [a.reshape(-1, *a.shape[2:]) for a in (u * delta[..., None], log_decay, B, C)]
        y = ssd(*merged).reshape(u.shape) + self.D[...][:, None] * u
        y = cross_merge(y.reshape(b, ROUTES, -1, d), height=height, width=width, pattern="cross")
        return y.astype(x.dtype)
