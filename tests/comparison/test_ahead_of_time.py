"""Kernels compiled for accelerators that are not here, where their compilers are installed."""

import json
import subprocess
import sys

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


# The compiler asks once, when it is loaded, where it is to write its schedules: in a process of its
# own no other test has loaded it. Bundles are counted by turns of the grid: there must be several.
_COMPILE = """
import json
from zzhnet_jax.comparison.ahead_of_time import compile_ahead
from zzhnet_jax.comparison.cases import make_case
from zzhnet_jax.kernels.selective_scan.shapes import ScanShape
case = make_case(ScanShape("wide", 2, 1024, 1024, 1, 1))
print(json.dumps(compile_ahead(case, ["pallas_tpu"], gradients=True, tpus=("v5e:2x2",))))
"""


@pytest.mark.aot
def test_tpu_kernels():
    """A scan of one state is bound by memory, 2.8 bundles' time a step, and not by arithmetic."""
    needs("libtpu")
    run = subprocess.run([sys.executable, "-c", _COMPILE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    forward, backward = json.loads(run.stdout.splitlines()[-1])
    assert (forward["target"], forward["kernel"]) == ("v5e", "selective_scan_forward")
    assert backward["kernel"] == "selective_scan_backward"
    assert forward["spills"] == backward["spills"] == 0
    assert 0 < forward["bundles a step"] <= 2
    assert backward["bundles a step"] <= 2.5 * forward["bundles a step"]
    assert 0 < forward["VMEM kB"] < 16e3


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
