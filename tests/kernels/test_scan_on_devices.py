"""Scans split over batch, channels and length, on eight forced host devices and for four TPUs."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zzhnet_jax.kernels.selective_scan.base import Kernel
from zzhnet_jax.kernels.selective_scan.partition import differentiable
from zzhnet_jax.kernels.selective_scan.reference import sequential_scan

pytestmark = pytest.mark.accelerator

SCRIPT = Path(__file__).with_name("scan_on_devices.py")
FLAGS = dict(delta_softplus=True, reverse=True)


def run(*arguments):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize("part", ["jit", "declared"])
def test_a_kernel_on_a_mesh(part):
    run(part)


@pytest.mark.parametrize("name", ["sequential", "associative", "chunked", "None", "pallas_tpu"])
def test_inside_shard_map(name):
    run("shard_map", name)


@pytest.mark.parametrize("name", ["associative", "chunked", "None"])
def test_sequence_over_devices(name):
    run("sequence", name)


@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_gpu"])
def test_sequence_over_devices_with_kernels(name):
    run("sequence", name)


def test_fused_scan_2d_on_a_mesh():
    run("fused")


def kept_states(length, n, tile):
    return 2


def forward(*operands, tile, interpret, **flags):
    y, state = sequential_scan(*operands, **flags)
    return y, state, jnp.ones((state.shape[0], 2, state.shape[2], state.shape[1]))


def backward(*arrays, tile, interpret, **flags):
    *operands, kept, y, state = arrays
    assert kept.shape == (state.shape[0], 2, state.shape[2], state.shape[1])
    return jax.vjp(lambda *x: sequential_scan(*x, **flags), *operands)[1]((y, state))


@pytest.mark.parametrize("mapped", ["u", "A", "delta B", "u delta A B C D delta_bias state"])
def test_vmap_of_a_kernel(scans, mapped):
    """Folded into the batch or the channels, gradients of what is not mapped apart for each."""
    names = "u delta A B C D delta_bias state".split()
    one = dict(zip(names, map(jnp.asarray, scans.arguments(length=5)), strict=True))
    axes = {k: 0 if k in mapped.split() else None for k in names}
    x = {k: jnp.stack([v, v / 2, v * 0.9]) if axes[k] == 0 else v for k, v in one.items()}

    def gradients(scan):
        def loss(x):
            y, state = scan(*(x[k] for k in names), **FLAGS)
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(state))

        return jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(axes,)))(x)

    got = gradients(differentiable(Kernel(forward, backward, kept_states)))
    expected = gradients(sequential_scan)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
