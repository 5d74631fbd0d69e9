"""What the kernels for accelerators take of them, by compiling for accelerators that are not here.

Each row is one kernel on one target. Nothing is run: registers, spills, shared memory and the
schedule say what a kernel costs, interpret modes and real devices say that it is right.
"""

import functools
import importlib.util
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from zzhnet_jax.aot.compile import compile_for
from zzhnet_jax.aot.gpu_resources import (
    CAPABILITIES,
    GpuResources,
    pallas_resources,
    triton_resources,
)
from zzhnet_jax.aot.targets import parse_target
from zzhnet_jax.aot.tpu_schedule import bundles_per_step, dump_flags, read_schedule
from zzhnet_jax.errors import UserError
from zzhnet_jax.kernels.selective_scan.api import IMPLEMENTATIONS

from .cases import ARGUMENTS, Case
from .compare import gradient_of

TPU_TARGETS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
_TRITON_TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int32": "*i32"}
_NEEDS = {
    "pallas_tpu": ("libtpu", "pip install libtpu==0.0.42.1, or `make aot`, which has it"),
    "pallas_gpu": ("triton", "pip install triton==3.7.0, or `make aot`, which has it"),
    "triton": ("triton", "pip install triton==3.7.0, or `make aot`, which has it"),
}

AotRow = dict[str, Any]


def compile_ahead(
    case: Case,
    names: Sequence[str],
    *,
    gradients: bool,
    tpus: Sequence[str] = TPU_TARGETS,
    capabilities: Sequence[int] = CAPABILITIES,
) -> list[AotRow]:
    """Compiles the kernels for accelerators of some implementations at one case.

    Args:
      case: the arguments' shapes and dtypes.
      names: implementations; those that are no kernels of an accelerator are left out.
      gradients: also their backward kernels.
      tpus: slices to compile TPU kernels for.
      capabilities: compute capabilities to compile GPU kernels for.

    Returns:
      One row a kernel and target: "scan", "implementation", "target", "kernel" and what was found;
      or "reason" in place of that, with what to install.
    """
    rows: list[AotRow] = []
    for name in names:
        if name not in _NEEDS:
            continue
        module, remedy = _NEEDS[name]
        common = {"scan": case.shape.name, "implementation": name}
        if importlib.util.find_spec(module) is None:
            rows.append(common | {"reason": f"{module} is not installed: {remedy}"})
            continue
        try:
            targets = tpus if name == "pallas_tpu" else capabilities
            rows += [common | row for row in _COMPILERS[name](case, gradients, targets)]
        except (UserError, NotImplementedError, ValueError) as error:
            rows.append(common | {"reason": str(error).splitlines()[0]})
    return rows


def _scan(name: str, case: Case, **options: Any) -> Callable[[Any], tuple[jax.Array, jax.Array]]:
    """The implementation itself; `selective_scan` refuses what cannot run here."""
    scan: Callable[..., tuple[jax.Array, jax.Array]] = IMPLEMENTATIONS[name].scan

    def call(arguments: Any) -> tuple[jax.Array, jax.Array]:
        operands = [arguments.get(argument) for argument in ARGUMENTS]
        flags = {"delta_softplus": case.delta_softplus, "reverse": False}
        y, state = scan(*operands, None, **flags, **options)
        return y.astype(arguments["u"].dtype), state

    return call


def _abstract(case: Case) -> tuple[Any, Any]:
    given = (case.arguments, case.cotangent)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.dtype)), given)


def _program(name: str, case: Case, gradients: bool, **options: Any) -> tuple[Any, tuple[Any, ...]]:
    """What is compiled, and its abstract arguments: the scan, or its gradient."""
    scan = _scan(name, case, **options)
    arguments, cotangent = _abstract(case)
    return (gradient_of(scan), (arguments, cotangent)) if gradients else (scan, (arguments,))


def _pallas_gpu(case: Case, gradients: bool, capabilities: Sequence[int]) -> Iterator[AotRow]:
    program, arguments = _program("pallas_gpu", case, gradients)
    for capability in capabilities:
        for found in pallas_resources(program, *arguments, capability=capability):
            yield _gpu_row(found)


def _triton(case: Case, gradients: bool, capabilities: Sequence[int]) -> Iterator[AotRow]:
    launches: list[tuple[Any, tuple[str, ...]]] = []

    def record(launch: Any, *inputs: Any) -> tuple[jax.Array, ...]:
        types = tuple(_TRITON_TYPES[x.dtype.name] for x in (*inputs, *launch.outputs))
        launches.append((launch, types))
        return tuple(jnp.zeros(x.shape, x.dtype) for x in launch.outputs)

    program, arguments = _program("triton", case, gradients, interpret=record)
    jax.jit(program).lower(*arguments)  # where kernels are traced
    for capability in capabilities:
        for launch, types in launches:
            signature = dict(zip(launch.kernel.arg_names, types, strict=False))
            options = {"warps": launch.warps, "capability": capability}
            yield _gpu_row(triton_resources(launch.kernel, signature, launch.constants, **options))


def _gpu_row(found: GpuResources) -> AotRow:
    return {
        "target": f"sm_{found.capability}",
        "kernel": found.kernel,
        "registers": found.registers,
        "spilled bytes": found.spill_bytes,
        "shared bytes": found.shared_bytes,
        "warps": found.warps,
    }


def _pallas_tpu(case: Case, gradients: bool, tpus: Sequence[str]) -> Iterator[AotRow]:
    from zzhnet_jax.kernels.selective_scan.pallas_tpu_plan import Plan

    folder = _dump_folder()
    _, b, length, d, g, n = case.shape
    plan = Plan(b, length, d, g, n, case.delta_softplus, False)
    program, arguments = _program("pallas_tpu", case, gradients)
    kernels = ("selective_scan_forward", "selective_scan_backward")[: 1 + gradients]
    for text in tpus:
        for path in folder.iterdir():
            path.unlink()
        compiled = compile_for(parse_target(text), program, *arguments)
        temporaries = compiled.memory_analysis().temp_size_in_bytes
        text_of_program = compiled.as_text()
        for kernel, steps in zip(kernels, (plan.steps, plan.chunk), strict=False):
            schedule = read_schedule(folder, kernel)
            yield {
                "target": text.partition(":")[0],
                "kernel": kernel,
                "bundles a step": round(
                    bundles_per_step(schedule, steps=steps, tiles=plan.slots), 2
                ),
                "VMEM kB": round(_vmem_bytes(text_of_program, kernel) / 1e3),
                "spills": sum(loop.spills for loop in schedule.loops),
                "temp MB": round(temporaries / 1e6, 1),
            }


def _vmem_bytes(program: str, kernel: str) -> int:
    """VMEM that a kernel's blocks and scratch take, from the text of the compiled program."""
    calls = (line for line in program.splitlines() if "custom-call(" in line)
    own = next(line for line in calls if re.match(rf"\s*(ROOT )?%{kernel}(\.\d+)? =", line))
    used = re.search(r'"used_scoped_memory_configs":\[([^\]]*)\]', own)
    return sum(int(size) for size in re.findall(r'"size":"(\d+)"', used[1])) if used else 0


@functools.cache
def _dump_folder() -> Path:
    """Where libtpu writes its schedules; it reads so once, when it is loaded."""
    folder = Path(tempfile.mkdtemp(prefix="zzhnet-schedules-"))
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    os.environ["LIBTPU_INIT_ARGS"] = f"{given} {dump_flags(folder)}".strip()
    return folder


_COMPILERS: dict[str, Callable[[Case, bool, Sequence[Any]], Iterator[AotRow]]] = {
    "pallas_tpu": _pallas_tpu,
    "pallas_gpu": _pallas_gpu,
    "triton": _triton,
}
