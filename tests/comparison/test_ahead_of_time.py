"""Kernels compiled for accelerators that are not here, where their compilers are installed."""

import pytest

from zzhnet_jax.comparison.ahead_of_time import _vmem_bytes, compile_ahead
from zzhnet_jax.comparison.cases import make_case
from zzhnet_jax.kernels.selective_scan.shapes import ScanShape

CASE = make_case(ScanShape("small", 1, 128, 32, 1, 1))


def needs(module):
    pytest.importorskip(module, reason=f"{module} is not installed: make test-aot has it")


@pytest.mark.aot
def test_triton_kernels():
    needs("triton")
    rows = compile_ahead(CASE, ["sequential", "triton"], gradients=True, capabilities=(90,))
    assert {row["kernel"] for row in rows} >= {"ends", "combine", "outputs", "gradients"}
    for row in rows:
        assert (row["implementation"], row["target"], row["scan"]) == ("triton", "sm_90", "small")
        assert 16 <= row["registers"] <= 255 and row["spilled bytes"] == 0


@pytest.mark.aot
def test_tpu_kernels():
    needs("libtpu")
    # Bundles are counted by turns of the grid: there must be several.
    case = make_case(ScanShape("long", 2, 1024, 128, 1, 1))
    (row,) = compile_ahead(case, ["pallas_tpu"], gradients=False, tpus=("v5e:2x2",))
    assert (row["target"], row["kernel"]) == ("v5e", "selective_scan_forward")
    assert row["bundles a step"] > 0 and row["VMEM kB"] > 0


def test_what_is_not_installed_is_told(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    rows = compile_ahead(CASE, ["chunked", "pallas_gpu", "pallas_tpu"], gradients=False)
    assert [row["implementation"] for row in rows] == ["pallas_gpu", "pallas_tpu"]
    assert "triton is not installed: pip install" in rows[0]["reason"]
    assert "libtpu is not installed: pip install" in rows[1]["reason"]


def test_vmem_is_read_from_the_program():
    program = """
  %other.1 = f32[8] custom-call(%a), "used_scoped_memory_configs":[{"size":"7"}]
  %scan.2 = f32[8] custom-call(%a), "used_scoped_memory_configs":[{"memory_space":"1","size":"40"}]
  ROOT %scan_back.1 = f32[8] custom-call(%a), backend_config={}
"""
    assert _vmem_bytes(program, "scan") == 40
    assert _vmem_bytes(program, "scan_back") == 0
