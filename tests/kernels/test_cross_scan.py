"""Routes through an image and the scan over them, against loops over pixels and recorded arrays."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zzhnet_jax.kernels.cross_scan import (
    cross_merge,
    cross_scan,
    normalize_channels,
    scan_lines,
    selective_scan_2d,
)
from zzhnet_jax.kernels.selective_scan import ShapeError, UnavailableError, selective_scan

HEIGHT, WIDTH = 3, 4
PIXELS = [(i, j) for i in range(HEIGHT) for j in range(WIDTH)]
BY_COLUMN = [(i, j) for j in range(WIDTH) for i in range(HEIGHT)]
ORDERS = {
    "cross": [PIXELS, BY_COLUMN, PIXELS[::-1], BY_COLUMN[::-1]],
    "unidirectional": [PIXELS] * 4,
    "bidirectional": [PIXELS, PIXELS, PIXELS[::-1], PIXELS[::-1]],
    "cascade": [
        PIXELS,
        [(i, WIDTH - 1 - j) for i, j in PIXELS],
        BY_COLUMN,
        [(HEIGHT - 1 - i, j) for i, j in BY_COLUMN],
    ],
}
FLAT_PATTERNS = ("cross", "unidirectional", "bidirectional")


@pytest.mark.parametrize("pattern", ORDERS)
def test_scan_follows_the_routes(pattern):
    x = np.arange(2 * HEIGHT * WIDTH * 3).reshape(2, HEIGHT, WIDTH, 3)
    expected = [[x[:, i, j] for i, j in order] for order in ORDERS[pattern]]
    np.testing.assert_array_equal(cross_scan(x, pattern), np.transpose(expected, (2, 0, 1, 3)))


@pytest.mark.parametrize("pattern", ORDERS)
def test_merge_sums_the_images(pattern):
    y = np.random.default_rng(0).standard_normal((2, 4, HEIGHT * WIDTH, 3)).astype(np.float32)
    orders = ORDERS[pattern]
    if pattern == "cascade":  # whose backward lines are not turned round again
        orders = [PIXELS, PIXELS, BY_COLUMN, BY_COLUMN]
    expected = np.zeros((2, HEIGHT, WIDTH, 3), np.float32)
    for k, order in enumerate(orders):
        for t, (i, j) in enumerate(order):
            expected[:, i, j] += y[:, k, t]
    merged = cross_merge(y, height=HEIGHT, width=WIDTH, pattern=pattern)
    np.testing.assert_allclose(merged, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("pattern", "name"), list(zip(FLAT_PATTERNS, ("cross2d", "unidi", "bidi"), strict=True))
)
def test_goldens(pattern, name):
    root = os.environ.get("ZZHNET_GOLDENS")
    if not root:
        pytest.skip("cross_scan_5x7.npz: set ZZHNET_GOLDENS to the folder with the arrays")
    with np.load(Path(root, "change_detection", "cross_scan_5x7.npz")) as file:
        a = dict(file)
    x = jnp.moveaxis(a["in/x_bchw"], 1, -1)
    y, pull = jax.vjp(lambda x: jnp.swapaxes(cross_scan(x, pattern), 1, 2), x)
    np.testing.assert_array_equal(y, a[f"out/scan_{name}_cl_cl"])
    (gradient,) = pull(a[f"cot/scan_{name}_cl_cl"])
    np.testing.assert_allclose(gradient, a[f"grad/in/scan_{name}_cl_cl"], rtol=1e-6, atol=1e-6)

    ys = jnp.moveaxis(a["in/ys_bkchw"].reshape(2, 4, 3, 35), 2, 3)
    y, pull = jax.vjp(lambda y: cross_merge(y, height=5, width=7, pattern=pattern), ys)
    np.testing.assert_allclose(y.reshape(2, 35, 3), a[f"out/merge_{name}_cl_cl"], atol=2e-6)
    (gradient,) = pull(a[f"cot/merge_{name}_cl_cl"].reshape(y.shape))
    gradient = jnp.swapaxes(gradient, 1, 2).reshape(2, 5, 7, 4, 3)
    np.testing.assert_array_equal(gradient, a[f"grad/in/merge_{name}_cl_cl"])


def image_arguments(routes, *, b=2, h=HEIGHT, w=WIDTH, d=4, n=2):
    draw = np.random.default_rng(3).standard_normal
    arrays = dict(
        u=draw((b, h, w, d)),
        delta=draw((b, h, w, routes, d)) * 0.5 - 1,
        A=-np.exp(draw((routes, d, n)) * 0.5),
        B=draw((b, h, w, routes, n)),
        C=draw((b, h, w, routes, n)),
        D=draw((routes, d)),
        delta_bias=draw((routes, d)) * 0.5,
    )
    return {name: x.astype(np.float32) for name, x in arrays.items()}


def scan_route(scans, given, k, order):
    """Output of route k in image layout, by the numpy scan over pixels in the given order."""
    rows, columns = np.transpose(order)
    u, delta, B, C = (
        given["u"][:, rows, columns],
        given["delta"][:, rows, columns, k],
        given["B"][:, rows, columns, k : k + 1],
        given["C"][:, rows, columns, k : k + 1],
    )
    rest = (given["D"][k], given["delta_bias"][k], None)
    y, _ = scans.numpy_scan(
        u, delta, given["A"][k], B, C, *rest, delta_softplus=True, reverse=False
    )
    image = np.empty(given["u"].shape)
    image[:, rows, columns] = y
    return image


def scan_lines_in_numpy(scans, given, columns):
    """The cascade's pass, line by line; the backward result is added as it comes."""
    total = np.zeros(given["u"].shape)
    for line in range(WIDTH if columns else HEIGHT):
        order = [p for p in PIXELS if p[1 if columns else 0] == line]
        rows, cols = np.transpose(order)
        total[:, rows, cols] += scan_route(scans, given, 0, order)[:, rows, cols]
        backward = scan_route(scans, given, 1, order[::-1])[:, rows, cols]
        total[:, rows, cols] += backward[:, ::-1]
    return total


@pytest.mark.parametrize("pattern", FLAT_PATTERNS)
def test_scan_2d(pattern, scans):
    given = image_arguments(4)
    expected = sum(scan_route(scans, given, k, order) for k, order in enumerate(ORDERS[pattern]))
    y = selective_scan_2d(**given, delta_softplus=True, pattern=pattern)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("columns", [False, True])
def test_scan_lines(columns, scans):
    given = image_arguments(2)
    y = scan_lines(**given, delta_softplus=True, columns=columns)
    np.testing.assert_allclose(y, scan_lines_in_numpy(scans, given, columns), rtol=1e-4, atol=1e-5)


def test_cascade(scans):
    """Rows, then columns, of the normalised image each time."""
    given = image_arguments(4)
    y = np.asarray(given["u"], np.float64)
    for routes, columns in ((slice(0, 2), False), (slice(2, 4), True)):
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
        first = {k: given[k][routes] for k in ("A", "D", "delta_bias")}
        images = {k: given[k][..., routes, :] for k in ("delta", "B", "C")}
        y = scan_lines_in_numpy(scans, dict(u=y, **first, **images), columns)
    got = selective_scan_2d(**given, delta_softplus=True, pattern="cascade")
    np.testing.assert_allclose(got, y, rtol=1e-3, atol=1e-4)


def test_scan_2d_gradients():
    """Gradients equal those of cross_scan, a scan of each sequence and cross_merge."""
    given = image_arguments(4)
    weights = np.random.default_rng(4).standard_normal(given["u"].shape).astype(np.float32)

    def composed(x):
        pick = lambda v: [cross_scan(v[..., k, :], "cross")[:, k] for k in range(4)]  # noqa: E731
        us, deltas = cross_scan(x["u"], "cross"), pick(x["delta"])
        Bs, Cs = pick(x["B"]), pick(x["C"])
        ys = [
            _sequential(us[:, k], deltas[k], x["A"][k], Bs[k], Cs[k], x["D"][k], x["delta_bias"][k])
            for k in range(4)
        ]
        return cross_merge(jnp.stack(ys, 1), height=HEIGHT, width=WIDTH, pattern="cross")

    def gradients(f):
        return jax.jit(jax.grad(lambda x: jnp.vdot(f(x), weights)))(given)

    expected = gradients(composed)
    got = gradients(lambda x: selective_scan_2d(**x, delta_softplus=True))
    for name, reference in expected.items():
        scale = np.abs(reference).max()
        np.testing.assert_allclose(got[name], reference, atol=2e-6 * scale, err_msg=name)


@pytest.mark.parametrize("pattern", ["cross", "bidirectional", "cascade"])
def test_scan_2d_raises_step_sizes_of_low_rank(pattern):
    """As with the product made before, in values and in the gradients of both factors."""
    given = image_arguments(4)
    draw = np.random.default_rng(5).standard_normal
    weights = draw(given["u"].shape).astype(np.float32)
    del given["delta"]
    low = draw((2, HEIGHT, WIDTH, 4, 3)).astype(np.float32)
    dt_proj = draw((4, 3, 4)).astype(np.float32) * 0.3

    def inside(low, dt_proj):
        return selective_scan_2d(
            delta=low, dt_proj=dt_proj, **given, delta_softplus=True, pattern=pattern
        )

    def before(low, dt_proj):
        delta = jnp.einsum("bhwkr,krd->bhwkd", low, dt_proj, precision="highest")
        return selective_scan_2d(delta=delta, **given, delta_softplus=True, pattern=pattern)

    results = []
    for scan in (inside, before):
        y, pull = jax.vjp(jax.jit(scan), low, dt_proj)
        results.append((y, *pull(weights)))
    for got, expected in zip(*results, strict=True):
        np.testing.assert_allclose(got, expected, atol=3e-6 * np.abs(expected).max())


def _sequential(u, delta, A, B, C, D, delta_bias):
    return selective_scan(
        *(u, delta, A, B[:, :, None], C[:, :, None], D),
        delta_bias=delta_bias, delta_softplus=True, implementation="sequential",
    )  # fmt: skip


def test_scan_2d_in_bfloat16():
    """Only u and y are narrow; routes are summed in float32."""
    given = image_arguments(4)
    narrow = given | {"u": jnp.asarray(given["u"], jnp.bfloat16)}
    y = selective_scan_2d(**narrow, delta_softplus=True)
    assert y.dtype == jnp.bfloat16
    rounded = given | {"u": np.asarray(narrow["u"], np.float32)}
    whole = selective_scan_2d(**rounded, delta_softplus=True)
    np.testing.assert_allclose(np.asarray(y, np.float32), whole, rtol=2**-8)


def test_normalize_channels():
    x = np.random.default_rng(0).standard_normal((2, 3, 5)).astype(np.float32) * 3 + 7
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(normalize_channels(x), expected, rtol=1e-4, atol=1e-5)


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "shape", "expected"),
        [
            ("u", (2, 12, 4), r"u has shape \(2, 12, 4\): expected \(b, h, w, d\), all >= 1"),
            ("delta", (2, 3, 4, 4), r"delta has shape .*: expected \(2, 3, 4, 4, 4\)"),
            ("A", (2, 4, 2), r"A has shape \(2, 4, 2\): expected \(4, 4, d_state >= 1\)"),
            ("B", (2, 3, 4, 4, 3), r"B has shape .*: expected \(2, 3, 4, 4, 2\)"),
            ("C", (2, 3, 4, 2), r"C has shape .*: expected \(2, 3, 4, 4, 2\)"),
            ("D", (4,), r"D has shape \(4,\): expected \(4, 4\)"),
            ("delta_bias", (16,), r"delta_bias has shape \(16,\): expected \(4, 4\)"),
            ("dt_proj", (3, 4), r"dt_proj has shape \(3, 4\): expected \(4, 1, 4\)"),
            ("dt_proj", (4, 3, 4), r"delta has shape .*: expected \(2, 3, 4, 4, 3\)"),
        ],
    )
    def test_scan_2d(self, name, shape, expected):
        given = image_arguments(4) | {name: np.ones(shape, np.float32)}
        with pytest.raises(ShapeError, match=expected):
            selective_scan_2d(**given)

    def test_routes_of_scan_lines(self):
        with pytest.raises(ShapeError, match=r"A has shape \(4, 4, 2\): expected \(2, 4, d_state"):
            scan_lines(**image_arguments(4), columns=False)

    def test_scan_and_merge(self):
        with pytest.raises(ShapeError, match=r"x has shape \(3, 4\): expected \(b, h, w, c\)"):
            cross_scan(np.ones((3, 4)))
        with pytest.raises(ShapeError, match=r"y has shape .*: expected \(b, 4, 20, c\)"):
            cross_merge(np.ones((2, 4, 12, 3)), height=4, width=5)

    def test_names(self):
        expected = (
            "pattern = 'zigzag': it must be one of cross, unidirectional, bidirectional, casc"
        )
        with pytest.raises(ValueError, match=expected):
            cross_scan(np.ones((1, 2, 2, 1)), "zigzag")
        with pytest.raises(ValueError, match=expected):
            cross_merge(np.ones((1, 4, 4, 1)), height=2, width=2, pattern="zigzag")
        with pytest.raises(ValueError, match=expected):
            selective_scan_2d(**image_arguments(4), pattern="zigzag")
        with pytest.raises(UnavailableError, match="'cuda' cannot run here"):
            selective_scan_2d(**image_arguments(4), implementation="cuda")
