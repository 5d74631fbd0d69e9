"""The Pallas scan for GPUs: values, and machine code for three kinds of GPU.

On a GPU the kernels run as they are, elsewhere in interpret mode.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from zzhnet_jax.aot.gpu_resources import CAPABILITIES, scan_resources
from zzhnet_jax.kernels.selective_scan import pallas_gpu_plan
from zzhnet_jax.kernels.selective_scan.pallas_gpu import pallas_gpu_scan, unsupported
from zzhnet_jax.kernels.selective_scan.pallas_gpu_forward import kept_states, prepare
from zzhnet_jax.kernels.selective_scan.pallas_gpu_plan import make_plan

sys.path.insert(0, str(Path(__file__).parent))

import gpu_cases
import gpu_goldens

pytestmark = pytest.mark.accelerator


def scan(*operands, **options):
    return pallas_gpu_scan(*operands, interpret=not gpu_cases.on_gpu(), **options)


@pytest.mark.parametrize("case", gpu_cases.CASES)
def test_values_and_gradients(case):
    case = gpu_cases.CASES[case]
    gpu_cases.assert_small(gpu_cases.errors(scan, case, tile=gpu_cases.TILE), case)


@pytest.mark.parametrize("name", gpu_goldens.GOLDENS)
def test_goldens(name):
    if gpu_goldens.GOLDENS[name] is None:
        pytest.skip(f"{name}.npz: set ZZHNET_GOLDENS to the folder with the reference arrays")
    excess = gpu_goldens.excess(scan, name)
    assert {k: x for k, x in excess.items() if not x <= 1} == {}


@pytest.mark.parametrize("enough", [1, 12])
def test_segments_of_several_chunks(enough, monkeypatch):
    """With one segment, and with segments of two chunks whose last reaches past the end."""
    monkeypatch.setattr(pallas_gpu_plan, "ENOUGH_WARPS", enough)
    case = dict(length=17, n=5, groups=2, d=8, reverse=True)
    tile = gpu_cases.TILE._replace(steps=4)
    gpu_cases.assert_small(gpu_cases.errors(scan, case, tile=tile), case)


@pytest.mark.parametrize("b, segments", [(1, 79), (8, 10), (18, 4), (19, 1), (64, 1)])
def test_enough_programs(b, segments):
    """VMamba's first stage, all four routes as groups: about 2048 warps, or more for free."""
    operands = jax.eval_shape(lambda *x: prepare(*x)[0], *gpu_cases.vmamba_types(b))
    plan = make_plan(operands, None, delta_softplus=True, reverse=False)
    assert plan.segments == segments
    assert plan.segments * plan.chunks * plan.steps >= 3136
    assert kept_states(3136, 1, None) == plan.total_chunks


@pytest.mark.aot
@pytest.mark.parametrize("d_state", [1, 16, 64])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_machine_code_without_spills(capability, d_state):
    pytest.importorskip("triton", reason="needs triton: make test-aot has it")
    pytest.importorskip("jax_cuda12_plugin", reason="needs XLA's CUDA plugin: make test-aot has it")
    operands = gpu_cases.operand_types(length=1000, d=768, groups=4, n=d_state)
    for backward in (False, True):
        kernels = scan_resources("pallas_gpu", operands, backward=backward, capability=capability)
        assert {x.kernel: x.spill_bytes for x in kernels if x.spill_bytes} == {}


def test_what_it_cannot_take():
    operands = gpu_cases.operand_types(n=3)
    assert unsupported(*operands) is None
    assert "65" in unsupported(*gpu_cases.operand_types(n=65))
    wide = (jax.ShapeDtypeStruct((2, 100, 96), jnp.float64), *operands[1:])
    assert "float64" in unsupported(*wide)
