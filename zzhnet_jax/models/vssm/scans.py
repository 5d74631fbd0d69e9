"""The selective scan with its parameters, as SS2D runs it over an image."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from zzhnet_jax.kernels.cross_scan import normalize_channels, scan_lines, selective_scan_2d
from zzhnet_jax.models.placement import constrain, locally
from zzhnet_jax.models.vssm.config import SS2DConfig
from zzhnet_jax.models.vssm.initializers import draw, step_bias, torch_uniform

ROUTES = 4


def initial_A_log(
    config: SS2DConfig, shape: tuple[int, ...], rngs: nnx.Rngs
) -> Float[Array, "..."]:
    """Initial log(-A): log(1..n) along the last axis, normal, or 0."""
    if config.initialization == "mamba":
        row = jnp.log(jnp.arange(1, shape[-1] + 1, dtype=jnp.float32))
        return jnp.broadcast_to(row, shape)
    if config.initialization == "uniform":
        return jnp.zeros(shape, jnp.float32)
    return draw(jax.random.normal, rngs.params(), shape)


def initial_dt_bias(
    config: SS2DConfig, shape: tuple[int, ...], rngs: nnx.Rngs
) -> Float[Array, "..."]:
    """Initial bias of the step sizes."""
    if config.initialization == "mamba":
        draws = draw(jax.random.uniform, rngs.params(), shape)
        return step_bias(
            draws, dt_min=config.dt_min, dt_max=config.dt_max, floor=config.dt_init_floor
        )
    return _draw_dt(config, shape, rngs)


def initial_dt_proj(
    config: SS2DConfig, shape: tuple[int, int, int], rngs: nnx.Rngs
) -> Float[Array, "k r d"]:
    """Initial step-size projection (routes, rank, d_inner)."""
    if config.initialization != "mamba":
        return _draw_dt(config, shape, rngs)
    bound = config.dt_scale / math.sqrt(shape[1])
    if config.dt_init == "constant":
        return jnp.full(shape, bound, jnp.float32)
    sample = partial(jax.random.uniform, minval=-bound, maxval=bound)
    return draw(sample, rngs.params(), shape)


def _draw_dt(config: SS2DConfig, shape: tuple[int, ...], rngs: nnx.Rngs) -> Array:
    if config.initialization == "uniform":
        return 0.1 * draw(jax.random.uniform, rngs.params(), shape)
    scale = 0.1 if config.initialization == "small_normal" else 1.0
    return scale * draw(jax.random.normal, rngs.params(), shape)


def scan_image(
    scan: Callable[..., Array],
    u: Float[Array, "b h w d"],
    delta: Float[Array, "b h w k d"] | Float[Array, "b h w k r"],
    A: Float[Array, "k d n"],
    B: Float[Array, "b h w k n"],
    C: Float[Array, "b h w k n"],
    D: Float[Array, "k d"],
    delta_bias: Float[Array, "k d"],
    dt_proj: Float[Array, "k r d"] | None,
) -> Float[Array, "b h w d"]:
    """Calls `scan` with these arguments, on every device with its own samples and channels.

    A device that holds some rows of the image exchanges them for all rows of some channels, and
    back: an all-to-all of the scan's input and output, while its much larger step sizes are made
    where they are used.
    """
    image = "batch whole columns"

    y = locally(
        lambda *arrays: scan(*arrays[:6], delta_bias=arrays[6], dt_proj=arrays[7]),
        (u, delta, A, B, C, D, delta_bias, dt_proj),
        (
            f"{image} scanned",
            f"{image} routes {'scanned' if dt_proj is None else 'rank'}",
            "routes scanned states",
            f"{image} routes states",
            f"{image} routes states",
            "routes scanned",
            "routes scanned",
            "routes rank scanned",
        ),
        f"{image} scanned",
    )
    return constrain(y, "batch rows columns inner")


class SelectiveScan(nnx.Module):
    """Makes the per-pixel parameters of the scan from its input, and scans.

    Every pixel's features give, for each route, a low-rank step size and the matrices B and C by
    one linear map, computed once, in image layout, for all four routes; a second map, applied by
    the scan, raises the step size to all channels.

    Attributes:
      x_proj: (d, 4, rank + 2 n) map to [step, B, C].
      dt_proj: (4, rank, d) map of the step sizes.
      dt_bias: (4, d) added before the softplus.
      A_log: (4, d, n); A = -exp(A_log).
      D: (4, d) weights of the direct path.
    """

    def __init__(self, d: int, rank: int, config: SS2DConfig, *, rngs: nnx.Rngs) -> None:
        n = config.d_state
        init = torch_uniform(fan_in=d)
        self.x_proj = nnx.Param(init(rngs.params(), (d, ROUTES, rank + 2 * n), jnp.float32))
        self.dt_proj = nnx.Param(initial_dt_proj(config, (ROUTES, rank, d), rngs))
        self.dt_bias = nnx.Param(initial_dt_bias(config, (ROUTES, d), rngs))
        self.A_log = nnx.Param(initial_A_log(config, (ROUTES, d, n), rngs))
        self.D = nnx.Param(jnp.ones((ROUTES, d), jnp.float32))
        self.config = config

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        """Scans the image; the scan and what feeds it are float32, the result is in x's dtype."""
        if self.config.pattern == "cascade":
            for routes, columns in ((slice(0, 2), False), (slice(2, 4), True)):
                x = normalize_channels(x)
                lines = partial(
                    scan_lines,
                    columns=columns,
                    delta_softplus=True,
                    implementation=self.config.scan_implementation,
                )
                x = scan_image(lines, *self._arguments(x, routes))
            return x
        scan = partial(
            selective_scan_2d,
            delta_softplus=True,
            pattern=self.config.pattern,
            implementation=self.config.scan_implementation,
        )
        return scan_image(scan, *self._arguments(x, slice(0, ROUTES)))

    def _arguments(self, x: Array, routes: slice) -> tuple[Array, ...]:
        """Arguments of the scan along the given routes, in the order of `scan_image`'s."""
        rank, n = self.dt_proj.shape[1], self.config.d_state
        x_proj = self.x_proj[...][:, routes].astype(x.dtype)
        features = jnp.einsum("bhwd,dkf->bhwkf", x, x_proj, preferred_element_type=jnp.float32)
        features = constrain(features, "batch whole columns routes features")
        low, B, C = jnp.split(features, (rank, rank + n), axis=-1)
        A = -jnp.exp(self.A_log[routes])
        return x, low, A, B, C, self.D[routes], self.dt_bias[routes], self.dt_proj[routes]
