"""What depends on size: memory of the gradient, accuracy over long sequences, several devices."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zzhnet_jax.kernels.selective_scan import (
    chunked_base,
    chunked_steps,
    chunked_wide,
    selective_scan,
)

SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from zzhnet_jax.kernels.selective_scan import available_implementations, selective_scan

b, l, d, g, n = 4, 12, 16, 4, 2
draw = np.random.default_rng(0).standard_normal
specs = dict(u=P("data", None, "channel"), delta=P("data", None, "channel"), A=P("channel"),
             B=P("data", None, "channel"), C=P("data", None, "channel"), D=P("channel"))
shapes = dict(u=(b, l, d), delta=(b, l, d), A=(d, n), B=(b, l, g, n), C=(b, l, g, n), D=(d,))
given = {k: jnp.asarray(draw(s), jnp.float32) for k, s in shapes.items()}
given["A"] = -jnp.abs(given["A"])
mesh = jax.make_mesh((4, 2), ("data", "channel"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
placed = {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in given.items()}
assert jax.device_count() == 8
for name in available_implementations():
    def loss(x):
        y = selective_scan(**x, delta_softplus=True, reverse=True, implementation=name)
        return jnp.sum(jnp.sin(y)), y
    run = jax.jit(jax.grad(loss, has_aux=True))
    expected, got = run(given), run(placed)
    assert got[1].sharding.is_equivalent_to(placed["u"].sharding, 3), got[1].sharding
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    print(name, "ok")
"""


def test_sharded_over_batch_and_channels():
    root = Path(__file__).parents[2]
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "chunked ok" in done.stdout


def gradient_of(implementation):
    def loss(u, delta, A, B, C, D):
        y = selective_scan(u, delta, A, B, C, D, delta_softplus=True, implementation=implementation)
        return jnp.sum(y)

    return jax.jit(jax.grad(loss, argnums=range(6)))


def shapes(length, d, groups, n):
    sequence, matrix = (1, length, d), (1, length, groups, n)
    return sequence, sequence, (d, n), matrix, matrix, (d,)


def test_gradient_memory():
    """Of a long scan with 16 states: an eighth of what the plain parallel scan takes, or less."""
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes(4096, 768, 4, 16)]
    chunked, associative = (
        gradient_of(name).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
        for name in ("chunked", "associative")
    )
    assert chunked <= associative / 8
    state = 4096 * 768 * 16 * 4
    assert chunked <= state / 4  # no array of size length x d_state, not even one


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_lowers_for(platform):
    """The gradient becomes a program for each platform, with a loop over steps on CPUs only."""
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes(64, 8, 2, 2)]
    traced = gradient_of("chunked").trace(*arguments)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    loops = text.count("stablehlo.while")
    assert loops == (5 if platform == "cpu" else 2)  # chunks forward and backward; steps in three


def test_long_sequence():
    """4096 steps, 16 states: float32 within 1e-5 of the float64 oracle."""
    draw = np.random.default_rng(0).standard_normal
    arguments = [draw(s) for s in shapes(4096, 32, 4, 16)]
    arguments[1] = arguments[1] * 0.5 - 1
    arguments[2] = -np.exp(arguments[2] * 0.5)
    narrow = [jnp.asarray(x, jnp.float32) for x in arguments]

    def value_and_gradient(implementation, arguments):
        def run(*x):
            return selective_scan(*x, delta_softplus=True, implementation=implementation)

        y, pull = jax.vjp(run, *arguments)
        return y, *pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    got = [np.asarray(x) for x in value_and_gradient("chunked", narrow)]
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in narrow]
        expected = [np.asarray(x) for x in value_and_gradient("sequential", wide)]
    for name, one, other in zip(("y", *"u delta A B C D".split()), got, expected, strict=True):
        assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max(), name


@pytest.mark.parametrize("implementation", [None, "chunked"])
def test_default_is_available_at_any_size(implementation):
    for length in (1, 2, 65):
        u = jnp.ones((1, length, 2))
        B = jnp.ones((1, length, 1, 1))
        y = selective_scan(u, u, -jnp.ones((2, 1)), B, B, implementation=implementation)
        assert y.shape == u.shape


def test_softplus_of_chunks():
    """The rational form is as close to log(1 + exp(x)) as float32 allows, and right at the ends."""
    x = np.concatenate([np.linspace(-85, 85, 20001), 10.0 ** np.arange(-8, 3)]).astype(np.float32)
    expected = np.logaddexp(0, x.astype(np.float64))
    np.testing.assert_allclose(chunked_base.softplus(jnp.asarray(x)), expected, rtol=4e-7)
    ends = chunked_base.softplus(jnp.array([-jnp.inf, -1e30, 1e30, jnp.inf], jnp.float32))
    np.testing.assert_array_equal(ends, np.array([0, 0, 1e30, np.inf], np.float32))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("n", [1, 5])
def test_both_ways_through_a_chunk_agree(n, reverse):
    """Step by step and all steps at once give the same, whichever of them this platform takes."""
    draw = np.random.default_rng(2).standard_normal
    b, t, g, p = 2, 6, 2, 50
    row, matrix, state = (b, t, g, p), (b, t, n, g), (b, n, g, p)
    shapes = (row, row, (n, g, p), matrix, matrix, (g, p), (g, p), state, row, state)
    arrays = [jnp.asarray(draw(shape), jnp.float32) for shape in shapes]
    arrays[2] = -jnp.abs(arrays[2])
    x, others = chunked_base.Operands(*arrays[:7]), arrays[7:]
    options = chunked_base.Options(chunk=t, delta_softplus=True, reverse=reverse)

    def both(way):
        return way.outputs(x, others[0], options), way.gradient(x, *others, options)

    results = [
        jax.tree.leaves(jax.jit(both, static_argnums=0)(w)) for w in (chunked_steps, chunked_wide)
    ]
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
