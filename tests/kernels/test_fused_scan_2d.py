"""The fused two-dimensional scan against each route as a float64 scan of its own."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zzhnet_jax.kernels.cross_scan import fused, fused_kernels, selective_scan_2d
from zzhnet_jax.kernels.selective_scan import UnavailableError

# pattern, (b, h, w, d, n): both sizes ragged, or one, or none; lines of one pixel; channels of a
# part of a tile, of a tile and a part, and of whole tiles, where the routes lie on the lanes.
CASES = {
    "ragged": ("cross", (2, 7, 5, 4, 2)),
    "several groups": ("cross", (1, 9, 17, 4, 1)),
    "one row": ("bidirectional", (1, 1, 11, 130, 1)),
    "one column": ("unidirectional", (2, 11, 1, 128, 1)),
    "sixteen states": ("cross", (1, 3, 4, 3, 16)),
    "whole groups": ("cross", (1, 8, 8, 3, 1)),
}
NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")


@cache
def arguments(sizes, seed=0):
    """Arguments by name, float32 numpy."""
    b, h, w, d, n = sizes
    draw = np.random.default_rng(seed).standard_normal
    arrays = (
        draw((b, h, w, d)),
        draw((b, h, w, 4, d)) * 0.5 - 1,
        -np.exp(draw((4, d, n)) * 0.5),
        draw((b, h, w, 4, n)),
        draw((b, h, w, 4, n)),
        draw((4, d)),
        draw((4, d)) * 0.5,
    )
    return {name: x.astype(np.float32) for name, x in zip(NAMES, arrays, strict=True)}


def weights(sizes):
    return np.random.default_rng(1).standard_normal(sizes[:4]).astype(np.float32)


# Interpreting eight unrolled steps of a GPU's kernel takes long to compile.
PLATFORMS = [
    "pallas_tpu",
    pytest.param("pallas_gpu", marks=pytest.mark.accelerator),
]


@pytest.fixture(params=PLATFORMS)
def scan(request):
    """The fused scan of a platform, in Pallas' interpreter unless this is the platform."""
    interpret = fused_kernels.KERNELS[request.param].unavailable() is not None

    def fused_scan(given, pattern, **options):
        options = dict(delta_softplus=True, interpret=interpret) | options
        return fused.fused_scan(**given, name=request.param, pattern=pattern, **options)

    return fused_scan


def value_and_gradients(scan, given, weight):
    def loss(given):
        y = scan(given)
        return jnp.vdot(y.astype(weight.dtype), weight), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(given)
    return {"y": y} | gradients


def oracle(given, pattern, weight, *, delta_softplus=True):
    """Values and gradients in float64, route by route, step by step."""
    with jax.enable_x64(True):
        wide = {name: np.asarray(x, np.float64) for name, x in given.items() if x is not None}

        def scan(given):
            return selective_scan_2d(
                **given, delta_softplus=delta_softplus, pattern=pattern, implementation="sequential"
            )

        return value_and_gradients(scan, wide, np.asarray(weight, np.float64))


def assert_equal(got, expected, tolerance):
    assert got.keys() == expected.keys()
    for name, reference in expected.items():
        value, scale = np.asarray(got[name], np.float64), np.abs(reference).max()
        np.testing.assert_allclose(value, reference, rtol=0, atol=tolerance * scale, err_msg=name)


@pytest.mark.parametrize(
    "case",
    [pytest.param(x, marks=pytest.mark.accelerator) if x == "sixteen states" else x for x in CASES],
)
def test_values_and_gradients(case, scan):
    pattern, sizes = CASES[case]
    given = arguments(sizes)
    got = value_and_gradients(lambda x: scan(x, pattern), given, weights(sizes))
    assert_equal(got, oracle(given, pattern, weights(sizes)), 3e-6)


@pytest.mark.accelerator
def test_stage_of_vmamba(scan):
    """The first stage's image; seven groups of lines are walked over at once."""
    sizes = (1, 56, 56, 4, 1)
    given = arguments(sizes)
    got = value_and_gradients(lambda x: scan(x, "cross"), given, weights(sizes))
    assert_equal(got, oracle(given, "cross", weights(sizes)), 3e-6)


def test_without_softplus_or_weights(scan):
    sizes = (1, 3, 9, 4, 1)
    given = arguments(sizes)
    given = given | {"delta": np.abs(given["delta"]), "D": None, "delta_bias": None}
    plain = dict(delta_softplus=False)
    got = value_and_gradients(lambda x: scan(x, "cross", **plain), given, weights(sizes))
    got = {name: x for name, x in got.items() if x is not None}
    assert_equal(got, oracle(given, "cross", weights(sizes), **plain), 3e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_inputs(dtype, scan):
    """Narrow u and delta are widened exactly; only results are rounded."""
    sizes = (2, 5, 9, 4, 1)
    given = arguments(sizes)
    narrow = given | {name: jnp.asarray(given[name], dtype) for name in ("u", "delta")}
    got = value_and_gradients(lambda x: scan(x, "cross"), narrow, weights(sizes))
    if dtype == "bfloat16":
        assert got["y"].dtype == got["u"].dtype == got["delta"].dtype == jnp.bfloat16
    wide = {name: np.asarray(x, np.float32) for name, x in narrow.items()}
    expected = oracle(wide, "cross", weights(sizes))
    # The gradient of y is rounded as y is; those of the small operands are sums of such values.
    assert_equal(got, expected, 2.0**-8)


def test_huge_steps(scan):
    """Steps after which nothing of the state is left, and none at all, in neighbouring pixels."""
    sizes = (1, 4, 9, 4, 1)
    given = dict(arguments(sizes))
    given["delta"] = np.where(np.arange(9)[:, None, None] % 2, 1e4, -1e4) * np.ones_like(
        given["delta"]
    )
    got = value_and_gradients(lambda x: scan(x, "cross"), given, weights(sizes))
    assert_equal(got, oracle(given, "cross", weights(sizes)), 3e-6)


@pytest.mark.parametrize("mapped", [("u", "delta", "B", "C"), NAMES])
def test_vmap(mapped, scan):
    """Images are folded into the batch, unless they have weights of their own."""
    sizes, pattern = (1, 3, 4, 2, 1), "bidirectional"
    parts = [arguments(sizes, seed) for seed in range(2)]
    given = parts[0] | {k: np.stack([part[k] for part in parts]) for k in mapped}
    axes = ({name: 0 if name in mapped else None for name in NAMES},)
    weight = weights(sizes)

    def gradients(x):
        return jax.grad(lambda x: jnp.vdot(scan(x, pattern), weight))(x)

    got = jax.jit(jax.vmap(gradients, axes))(given)
    for i, part in enumerate(parts):
        single = part if mapped == NAMES else parts[0] | {k: part[k] for k in mapped}
        expected = oracle(single, pattern, weight)
        expected.pop("y")
        assert_equal({name: x[i] for name, x in got.items()}, expected, 3e-6)


class TestChoice:
    def test_unsupported(self):
        given = arguments((1, 3, 4, 2, 1))

        def why(name, **arrays):
            return fused_kernels.unsupported(name, *(given | arrays).values(), pattern="cross")

        for name, most in (("pallas_tpu", 16), ("pallas_gpu", 64)):
            assert why(name) is None
            assert why(name, D=np.zeros((4, 2), np.float64)) == "it has no float64"
            reason = why(name, A=np.zeros((4, 2, most + 1), np.float32))
            assert reason == f"d_state is {most + 1}: it takes at most {most}"
        large = {"u": jax.ShapeDtypeStruct((1, 512, 512, 2), jnp.float32)}
        assert why("pallas_gpu", **large) is None
        reason = why("pallas_tpu", **large)
        assert reason.startswith("a 512 x 512 image takes") and reason.endswith("there are 16")

    def test_cpu_runs_route_by_route(self):
        given = arguments((1, 3, 4, 2, 1))
        scan = jax.jit(lambda x: selective_scan_2d(**x, delta_softplus=True))
        program = scan.lower(given).as_text()
        assert "tpu_custom_call" not in program

    @pytest.mark.parametrize("low_rank", [False, True])
    def test_tpu_runs_one_kernel(self, low_rank):
        given = arguments((1, 3, 4, 2, 1))
        if low_rank:
            ones = np.ones((4, 3, 2), np.float32)
            given = given | {"delta": np.ones((1, 3, 4, 4, 3), np.float32), "dt_proj": ones}

        def loss(x):
            return jnp.sum(selective_scan_2d(**x, delta_softplus=True))

        traced = jax.jit(jax.grad(loss)).trace(given)
        program = traced.lower(lowering_platforms=("tpu",)).as_text()
        assert program.count("tpu_custom_call") == 2

    def test_gpu_turns_no_image(self):
        """Four kernels, the last three of which write over what they are given."""
        sizes = (1, 3, 4, 2, 1)
        given = arguments(sizes)
        traced = jax.jit(lambda x: selective_scan_2d(**x, delta_softplus=True)).trace(given)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
        kernels = [line for line in program.splitlines() if "__gpu$xla.gpu.triton" in line]
        assert len([line for line in kernels if "selective_scan_apply" in line]) == 4
        assert len([line for line in kernels if "output_operand_alias" in line]) == 3
        image = jnp.zeros(sizes[:4]).swapaxes(1, 2).shape
        turned = "x".join(map(str, image)) + "xf32"
        assert turned not in program

    @pytest.mark.parametrize("name", fused_kernels.KERNELS)
    def test_named_needs_its_platform(self, name):
        with pytest.raises(UnavailableError, match=f"'{name}' cannot run here"):
            selective_scan_2d(**arguments((1, 3, 4, 2, 1)), implementation=name)
