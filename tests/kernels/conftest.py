"""What the kernel tests share: a scan written out in numpy, random arguments, implementations."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from zzhnet_jax.kernels.selective_scan.api import IMPLEMENTATIONS

INTERPRETED = ("pallas_tpu", "pallas_gpu")


def numpy_scan(u, delta, A, B, C, D, delta_bias, initial_state, *, delta_softplus, reverse):
    """The recurrence in float64 numpy, channel by channel index."""
    u, delta, A, B, C = (np.asarray(x, np.float64) for x in (u, delta, A, B, C))
    (b, length, d), n = u.shape, A.shape[1]
    group = np.arange(d) // (d // B.shape[2])
    step = delta + (0 if delta_bias is None else np.asarray(delta_bias, np.float64))
    if delta_softplus:
        step = np.where(step > 20, step, np.logaddexp(0, step))
    zeros = np.zeros((b, d, n))
    state = zeros if initial_state is None else np.asarray(initial_state, np.float64)
    y = np.empty_like(u)
    for t in reversed(range(length)) if reverse else range(length):
        state = np.exp(step[:, t, :, None] * A) * state
        state = state + (step[:, t] * u[:, t])[..., None] * B[:, t][:, group]
        y[:, t] = (state * C[:, t][:, group]).sum(-1)
        if D is not None:
            y[:, t] += np.asarray(D, np.float64) * u[:, t]
    return y, state


def scan_arguments(
    *, b=2, length=7, d=8, n=3, groups=2, seed=0, with_D=True, with_bias=True, with_state=True
):
    """Positional arguments of an implementation, float32 numpy."""
    draw = np.random.default_rng(seed).standard_normal
    arrays = [
        draw((b, length, d)),
        draw((b, length, d)) * 0.5 - 1,
        -np.exp(draw((d, n)) * 0.5),
        draw((b, length, groups, n)),
        draw((b, length, groups, n)),
        draw(d) if with_D else None,
        draw(d) * 0.5 if with_bias else None,
        draw((b, d, n)) if with_state else None,
    ]
    return tuple(None if x is None else x.astype(np.float32) for x in arrays)


@pytest.fixture(scope="session")
def scans():
    """`scans.numpy_scan` and `scans.arguments`."""
    return SimpleNamespace(numpy_scan=numpy_scan, arguments=scan_arguments)


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.accelerator) if name in INTERPRETED else name
        for name in IMPLEMENTATIONS
    ]
)
def implementation(request, monkeypatch):
    """Name of an implementation that runs here: elsewhere than on their device, Pallas kernels are
    interpreted."""
    name = request.param
    item = IMPLEMENTATIONS[name]
    if name in INTERPRETED and item.unavailable():
        scan = partial(item.scan, interpret=True)
        monkeypatch.setitem(
            IMPLEMENTATIONS, name, replace(item, scan=scan, unavailable=lambda: None)
        )
    elif reason := item.unavailable():
        pytest.skip(f"{name}: {reason}")
    return name
