"""The Triton scan: values, and machine code for three kinds of GPU.

On a GPU the kernels run as they are, elsewhere under Triton's interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from zzhnet_jax.aot.gpu_resources import CAPABILITIES, scan_resources
from zzhnet_jax.kernels.selective_scan.triton_gpu import triton_scan, unavailable, unsupported

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import gpu_cases  # noqa: E402
import gpu_goldens  # noqa: E402


def needs_triton():
    pytest.importorskip("triton", reason="needs triton: make test-aot has it")


@pytest.fixture(scope="module")
def interpreted():
    """Errors of every case, from one process: the interpreter is chosen before Triton's import."""
    needs_triton()
    if gpu_cases.on_gpu():
        return {}
    pytest.importorskip("torch", reason="Triton's interpreter needs torch")
    environment = os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    names = [*gpu_cases.CASES, *(k for k, v in gpu_goldens.GOLDENS.items() if v)]
    command = [sys.executable, str(HERE / "triton_on_cpu.py"), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return {item["case"]: item["errors"] for item in found}


@pytest.mark.accelerator
@pytest.mark.aot
@pytest.mark.parametrize("case", gpu_cases.CASES)
def test_values_and_gradients(case, interpreted):
    arguments = gpu_cases.CASES[case]
    found = interpreted.get(case) or gpu_cases.errors(triton_scan, arguments, tile=gpu_cases.TILE)
    gpu_cases.assert_small(found, arguments)


@pytest.mark.accelerator
@pytest.mark.aot
@pytest.mark.parametrize("name", gpu_goldens.GOLDENS)
def test_goldens(name, interpreted):
    if gpu_goldens.GOLDENS[name] is None:
        pytest.skip(f"{name}.npz: set ZZHNET_GOLDENS to the folder with the reference arrays")
    found = interpreted.get(name) or gpu_goldens.excess(triton_scan, name)
    assert {k: x for k, x in found.items() if not x <= 1} == {}


@pytest.mark.aot
@pytest.mark.parametrize("d_state", [1, 16, 64])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_machine_code_without_spills(capability, d_state):
    needs_triton()
    operands = gpu_cases.operand_types(n=d_state)
    for backward in (False, True):
        kernels = scan_resources("triton", operands, backward=backward, capability=capability)
        assert len(kernels) == 3
        assert {x.kernel: x.spill_bytes for x in kernels if x.spill_bytes} == {}
        assert max(x.shared_bytes for x in kernels) <= 48 * 1024


def test_what_it_cannot_take():
    operands = gpu_cases.operand_types(n=3)
    assert unsupported(*operands) is None
    assert "65" in unsupported(*gpu_cases.operand_types(n=65))
    wide = (*operands[:5], jax.ShapeDtypeStruct((96,), jnp.float64), None, None)
    assert "float64" in unsupported(*wide)


def test_says_what_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "zzhnet-jax[triton]" in unavailable()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("jax.default_backend", lambda: "cpu")
    assert "CUDA" in unavailable()
