"""The fused two-dimensional scan through the real compilers of TPUs and GPUs, and its traffic."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from zzhnet_jax.aot.compile import compile_for
from zzhnet_jax.aot.gpu_resources import CAPABILITIES, pallas_resources
from zzhnet_jax.aot.targets import parse_target
from zzhnet_jax.kernels.cross_scan import selective_scan_2d
from zzhnet_jax.kernels.cross_scan.fused import fused_scan

pytestmark = pytest.mark.aot
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: make test-aot installs it"
)

KERNEL_CALL = 'custom_call_target="tpu_custom_call"'


def shapes(b, h, w, d, n):
    f32 = jnp.float32
    of = {
        **{"u": (b, h, w, d), "delta": (b, h, w, 4, d), "A": (4, d, n)},
        **{"B": (b, h, w, 4, n), "C": (b, h, w, 4, n), "D": (4, d), "delta_bias": (4, d)},
    }
    return {name: jax.ShapeDtypeStruct(shape, f32) for name, shape in of.items()}


def scan(given, **options):
    return selective_scan_2d(**given, delta_softplus=True, **options)


@needs_libtpu
@pytest.mark.parametrize("text", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_compiles_to_one_kernel_each_way(text):
    """An image with ragged sides, and channels that are no whole number of tiles."""

    def loss(given):
        return jnp.sum(scan(given) ** 2)

    compiled = compile_for(parse_target(text), jax.grad(loss), shapes(2, 9, 13, 192, 1))
    assert compiled.as_text().count(KERNEL_CALL) == 2


@needs_libtpu
def test_halves_the_traffic_of_four_scans():
    """The first stage of VMamba-T; blocks counted as they lie in memory, in whole tiles."""
    b, h, w, d = 8, 56, 56, 192
    target, given = parse_target("v5e:2x2"), shapes(b, h, w, d, 1)
    fused = compile_for(target, scan, given)
    composed = compile_for(target, lambda x: scan(x, implementation="chunked"), given)
    assert fused.as_text().count(KERNEL_CALL) == 1
    image = b * h * w * 256 * 4  # 192 channels take two tiles of 128
    kernel = image * (1 + 4 + 1) + image // 2  # u, four step sizes, y; B and C: a tile a pixel
    moved = fused.cost_analysis()["bytes accessed"] + kernel
    assert moved <= 0.5 * composed.cost_analysis()["bytes accessed"]


@pytest.mark.parametrize("n", [1, 16])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_machine_code_without_spills(capability, n):
    """The Pallas kernels of GPUs, rows and columns, forward and backward."""
    pytest.importorskip("triton", reason="needs triton: make test-aot has it")
    pytest.importorskip("jax_cuda12_plugin", reason="needs XLA's CUDA plugin: make test-aot has it")
    given = shapes(2, 14, 10, 96, n)

    def gradients(given, y_gradient):
        options = dict(name="pallas_gpu", delta_softplus=True, pattern="cross")
        return jax.vjp(lambda x: fused_scan(**x, **options), given)[1](y_gradient)

    kernels = pallas_resources(gradients, given, given["u"], capability=capability)
    assert sum(x.kernel.endswith("gradients") for x in kernels) == 4
    assert {x.kernel: x.spill_bytes for x in kernels if x.spill_bytes} == {}
