"""Every implementation of the selective scan against a float64 oracle: values and all gradients.

An implementation listed in `IMPLEMENTATIONS` gets the whole suite. Blocks are made small where it
has blocks, so that short sequences reach several of them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zzhnet_jax.kernels.selective_scan import Tile, selective_scan, selective_scan_step
from zzhnet_jax.kernels.selective_scan.api import IMPLEMENTATIONS
from zzhnet_jax.kernels.selective_scan.chunked import chunk_length
from zzhnet_jax.kernels.selective_scan.chunked_wide import recurrence_by_prefix, recurrence_by_step

CHUNK = 8
NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias", "initial_state")

# Each value of each axis occurs more than once, in different company.
CASES = {
    "one step": dict(length=1, n=1, groups=1),
    "short": dict(length=7, n=16, groups=4, reverse=True),
    "one chunk": dict(length=CHUNK, n=1, groups=4, reverse=True, with_state=False),
    "one more": dict(length=CHUNK + 1, n=16, groups=1, with_D=False),
    "many states": dict(length=CHUNK + 1, n=64, groups=1, b=1, reverse=True),
    "three chunks": dict(length=3 * CHUNK, n=1, groups=4),
    "three chunks back": dict(length=3 * CHUNK, n=3, groups=2, reverse=True, with_bias=False),
    "no softplus": dict(length=CHUNK + 1, n=1, groups=1, softplus=False, with_D=False),
    "huge steps": dict(length=CHUNK + 1, n=2, scale=(1e4, 1e-4, -80.0)),
    "huge plain steps": dict(
        length=CHUNK + 1, n=2, scale=(1e4, 1e-4, 0.0), softplus=False, with_bias=False
    ),
    "half precision": dict(length=CHUNK + 1, n=3, dtype=jnp.bfloat16),
}


def make_case(scans, name):
    """Arguments (float32) and flags of a named case.

    Where steps are huge the decay underflows to zero, and where they vanish it is one.
    """
    case = dict(CASES[name])
    flags = {k: case.pop(k) for k in ("softplus", "reverse") if k in case}
    scale, dtype = case.pop("scale", None), case.pop("dtype", np.float32)
    arguments = list(scans.arguments(**case))
    if scale:
        rows = np.resize(np.array(scale, np.float32), case["length"])
        arguments[1] = np.abs(arguments[1]) * rows[:, None]
    rounded = (None if x is None else x.astype(dtype).astype(np.float32) for x in arguments)
    return tuple(rounded), flags


def run(scan, arguments, *, softplus=True, reverse=False, **options):
    """y, the last state and the gradient of each argument of one fixed weighted sum of both."""
    given = {k: jnp.asarray(x) for k, x in zip(NAMES, arguments, strict=True) if x is not None}

    def loss(given):
        arrays = [given.get(name) for name in NAMES]
        y, state = scan(*arrays, delta_softplus=softplus, reverse=reverse, **options)
        weigh = [
            jnp.sin(jnp.arange(x.size, dtype=state.dtype)).reshape(x.shape) for x in (y, state)
        ]
        return jnp.vdot(y, weigh[0]) + jnp.vdot(state, weigh[1]), (y, state)

    gradients, (y, state) = jax.jit(jax.grad(loss, has_aux=True))(given)
    return {"y": y, "state": state} | {f"gradient of {k}": v for k, v in gradients.items()}


def wide(arguments):
    return tuple(None if x is None else np.asarray(x, np.float64) for x in arguments)


def run_oracle(arguments, **options):
    with jax.enable_x64(True):
        results = run(IMPLEMENTATIONS["sequential"].scan, wide(arguments), **options)
        return {name: np.asarray(x) for name, x in results.items()}


def assert_close(results, expected, tolerance):
    assert results.keys() == expected.keys()
    for name, reference in expected.items():
        got = np.asarray(results[name], np.float64)
        assert got.shape == reference.shape, name
        assert np.isfinite(got).all(), f"{name} is not finite"
        scale = max(np.abs(reference).max(), 1e-3)
        error = np.abs(got - reference).max() / scale
        assert error <= tolerance, f"{name}: {error:.1e} of max|oracle|, allowed {tolerance:.0e}"


@pytest.fixture(scope="module")
def oracle(scans):
    """Arguments, flags and float64 results of a named case, computed once for all tests."""

    @functools.cache
    def get(name):
        arguments, flags = make_case(scans, name)
        return arguments, flags, run_oracle(arguments, **flags)

    return get


class TestImplementation:
    @pytest.fixture
    def scan(self, implementation):
        item = IMPLEMENTATIONS[implementation]
        return functools.partial(item.scan, tile=Tile(CHUNK)) if item.tiled else item.scan

    @pytest.mark.parametrize("case", [name for name in CASES if name != "half precision"])
    def test_values_and_gradients(self, scan, case, oracle):
        arguments, flags, expected = oracle(case)
        assert_close(run(scan, arguments, **flags), expected, 3e-6)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision(self, scan, dtype, oracle):
        """The arguments are exact in both dtypes, so only rounding of results is allowed for."""
        arguments, flags, expected = oracle("half precision")
        results = run(scan, [jnp.asarray(x, dtype) for x in arguments], **flags)
        assert results["state"].dtype == jnp.float32
        assert all(x.dtype == dtype for name, x in results.items() if "gradient" in name)
        assert_close({"state": results["state"]}, {"state": expected["state"]}, 3e-6)
        assert_close(results, expected, 2 * float(jnp.finfo(dtype).eps))

    def test_float64(self, implementation, scan, oracle):
        arguments, flags, expected = oracle("one more")
        if reason := IMPLEMENTATIONS[implementation].unsupported(*wide(arguments)):
            pytest.skip(f"{implementation}: {reason}")
        with jax.enable_x64(True):
            results = run(scan, wide(arguments), **flags)
            assert all(x.dtype == jnp.float64 for x in results.values())
            results = {name: np.asarray(x) for name, x in results.items()}
        assert_close(results, expected, 1e-13)

    def test_jit_vmap_checkpoint(self, implementation, scans):
        """Through the public function, with every transformation at once."""
        u, *others = scans.arguments(length=9, with_state=False)
        us = jnp.stack([u, 2 * u, -u])

        def loss(us, checkpoint):
            def one(u):
                return selective_scan(
                    *(u, *others[:5]), delta_softplus=True, implementation=implementation
                )

            one = jax.checkpoint(one) if checkpoint else one
            return jnp.sum(jnp.sin(jax.vmap(one)(us)))

        transformed = jax.jit(jax.grad(lambda us: loss(us, True)))(us)
        expected = jnp.stack([jax.grad(lambda us: loss(us, False))(x[None])[0] for x in us])
        np.testing.assert_allclose(transformed, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_oracle_is_the_recurrence(scans, reverse):
    arguments = scans.arguments(length=9, groups=4)
    expected = scans.numpy_scan(*arguments, delta_softplus=True, reverse=reverse)
    with jax.enable_x64(True):
        scan = IMPLEMENTATIONS["sequential"].scan
        y, state = scan(
            *(jnp.asarray(x) for x in wide(arguments)), delta_softplus=True, reverse=reverse
        )
        np.testing.assert_allclose(y, expected[0], rtol=1e-12)
        np.testing.assert_allclose(state, expected[1], rtol=1e-12)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_steps_make_the_scan(scans, dtype, groups):
    """Outputs are rounded once, to u's dtype; states are carried in float32 by both."""
    arguments = scans.arguments(length=5, groups=groups)
    u, delta, A, B, C, D, delta_bias = (jnp.asarray(x, dtype) for x in arguments[:7])
    options = dict(delta_bias=delta_bias, delta_softplus=True)
    state = jnp.asarray(arguments[7])
    y, last = selective_scan(
        u, delta, A, B, C, D, initial_state=state, return_final_state=True, **options
    )
    step = jax.jit(functools.partial(selective_scan_step, **options))
    rounding = float(jnp.finfo(dtype).eps)
    for t in range(5):
        state, y_t = step(state, u[:, t], delta[:, t], A, B[:, t], C[:, t], D)
        assert state.dtype == jnp.float32 and y_t.dtype == dtype
        got, expected = (np.asarray(x, np.float32) for x in (y_t, y[:, t]))
        np.testing.assert_allclose(got, expected, rtol=max(rounding, 1e-5), atol=1e-5)
    np.testing.assert_allclose(state, last, rtol=1e-5, atol=1e-6)


def test_final_state_continues_a_sequence(scans):
    """Scanning two halves, the second from the state of the first, is scanning the whole."""
    u, delta, A, B, C, D, delta_bias, state = scans.arguments(length=8)

    def scan(part, state, reverse):
        sequences = (x[:, part] for x in (u, delta, B, C))
        u_, delta_, B_, C_ = sequences
        return selective_scan(
            *(u_, delta_, A, B_, C_, D), delta_bias=delta_bias, delta_softplus=True,
            reverse=reverse, initial_state=state, return_final_state=True,
        )  # fmt: skip

    for reverse in (False, True):
        y, last = scan(slice(0, 8), state, reverse)
        parts = [slice(0, 4), slice(4, 8)][:: -1 if reverse else 1]
        middle = state
        for part in parts:
            y_part, middle = scan(part, middle, reverse)
            np.testing.assert_allclose(y_part, y[:, part], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(middle, last, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_prefix_and_loop_agree(reverse):
    """The recurrence of accelerators equals that of CPUs, gradients included."""
    draw = np.random.default_rng(1).standard_normal
    decay = jnp.asarray(np.exp(-np.abs(draw((2, 9, 3, 2, 4)))), jnp.float32)
    drive = jnp.asarray(draw((2, 9, 3, 2, 4)), jnp.float32)
    state = jnp.asarray(draw((2, 3, 2, 4)), jnp.float32)
    weights = jnp.cos(jnp.arange(decay.size, dtype=jnp.float32)).reshape(decay.shape)

    def values_and_gradients(recurrence):
        y, pull = jax.vjp(lambda *x: recurrence(*x, reverse=reverse), decay, drive, state)
        return y, *pull(weights)

    results = (
        jax.jit(values_and_gradients, static_argnums=0)(f)
        for f in (recurrence_by_step, recurrence_by_prefix)
    )
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 49, 196, 3136, 4096, 4097, 65537])
@pytest.mark.parametrize("values", [1, 768, 12288, 2**21])
def test_chunk_length(length, values):
    chunk = chunk_length(length, values)
    assert 1 <= chunk <= length
    assert chunk <= max(1, 2**19 // values, length**0.5)
    kept = -(-length // chunk)
    assert kept <= max(1, 2 * length * values / 2**19 + 1) or kept <= 2 * length**0.5 + 1


def test_compiled_once_per_shape(scans, monkeypatch):
    calls = []

    def counting(u, *others, **flags):
        calls.append(u.shape)
        return IMPLEMENTATIONS["sequential"].scan(u, *others, **flags)

    item = type(IMPLEMENTATIONS["sequential"])(counting)
    monkeypatch.setitem(IMPLEMENTATIONS, "counting", item)
    for length in (3, 3, 4, 3):
        arguments = scans.arguments(length=length)[:6]
        selective_scan(*arguments, implementation="counting")
    selective_scan(*scans.arguments(length=3)[:6], reverse=True, implementation="counting")
    assert calls == [(2, 3, 8), (2, 4, 8), (2, 3, 8)]
