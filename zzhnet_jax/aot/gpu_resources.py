"""What a GPU kernel takes of the GPU, found by compiling it to machine code without a GPU.

    Pallas    lowered by JAX to a custom call that carries Triton's intermediate code; that is
              compiled by Triton and ptxas. On a GPU, XLA's own copy of Triton does the same.
    Triton    compiled by Triton and ptxas, as on a GPU.

Both need the `triton` package (extra "triton"), whose wheel carries ptxas and cuobjdump. Nothing is
run. A spill is a value that did not fit the registers and goes through memory.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from zzhnet_jax.kernels.selective_scan.base import Tile

# Compute capabilities: A100, H100, B200.
CAPABILITIES = (80, 90, 100)
PALLAS_CALL = "__gpu$xla.gpu.triton"
_MODULES = {"pallas_gpu": "pallas_gpu", "triton": "triton_gpu"}
_TRITON_TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


@dataclass(frozen=True)
class GpuResources:
    """One kernel, compiled for one kind of GPU.

    Attributes:
      kernel: its name.
      capability: compute capability times ten, such as 90.
      warps: warps of a program, 32 threads each.
      registers: 32-bit registers of a thread, at most 255.
      spill_bytes: memory that a thread needs beside its registers.
      shared_bytes: shared memory of a program.
      instructions: length of the machine code, loops counted once.
    """

    kernel: str
    capability: int
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: int


def scan_resources(
    implementation: Literal["pallas_gpu", "triton"],
    operands: Sequence[Any],
    *,
    backward: bool,
    capability: int,
    delta_softplus: bool = True,
    reverse: bool = False,
    tile: Tile | None = None,
) -> tuple[GpuResources, ...]:
    """Compiles every kernel of one half of a selective scan.

    Args:
      implementation: which.
      operands: the eight operands of a scan, arrays or `jax.ShapeDtypeStruct`s or None.
      backward: the half that gives the gradients, instead of the one that gives y.
      capability: one of `CAPABILITIES`, or another that Triton knows.
      delta_softplus: as in `selective_scan`.
      reverse: as in `selective_scan`.
      tile: block sizes, or None for the implementation's own choice.

    Returns:
      One entry a kernel call, in the order in which they run.
    """
    flags = dict(delta_softplus=delta_softplus, reverse=reverse, tile=tile)
    halves = import_module(f"zzhnet_jax.kernels.selective_scan.{_MODULES[implementation]}")
    half, arguments = partial(halves.forward, **flags), tuple(operands)
    launches: list[tuple[Any, ...]] = []
    if implementation == "triton":
        half = partial(half, interpret=partial(_record, launches))
    if backward:
        y, state, kept = jax.eval_shape(half, *arguments)
        launches.clear()
        half, arguments = partial(halves.backward, **half.keywords), (*operands, kept, y, state)
    if implementation == "pallas_gpu":
        return pallas_resources(half, *arguments, capability=capability)
    jax.eval_shape(half, *arguments)
    return tuple(_compile_launch(*launch, capability=capability) for launch in launches)


def _record(launches: list[tuple[Any, ...]], launch: Any, *inputs: Any) -> tuple[Any, ...]:
    """Notes a call of a Triton kernel and makes results for it, in place of running it."""
    launches.append((launch, [x.dtype.name for x in (*inputs, *launch.outputs)]))
    return tuple(jnp.zeros(x.shape, x.dtype) for x in launch.outputs)


def _compile_launch(launch: Any, dtypes: list[str], *, capability: int) -> GpuResources:
    types = dict(zip(launch.kernel.arg_names, map(_TRITON_TYPES.__getitem__, dtypes), strict=False))
    return triton_resources(
        launch.kernel, types, launch.constants, warps=launch.warps, capability=capability
    )


def pallas_resources(
    function: Callable[..., Any], *arguments: Any, capability: int
) -> tuple[GpuResources, ...]:
    """Compiles every Pallas kernel (Triton backend) that a function calls.

    Args:
      function: anything that `jax.jit` takes.
      arguments: arrays or `jax.ShapeDtypeStruct`s.
      capability: one of `CAPABILITIES`, or another that Triton knows.

    Returns:
      One entry a call, in the order of the program.
    """
    return tuple(
        _compile_pallas(name, text, warps, stages, capability)
        for name, text, warps, stages in pallas_kernels(function, *arguments)
    )


def pallas_kernels(
    function: Callable[..., Any], *arguments: Any
) -> tuple[tuple[str, str, int, int], ...]:
    """Name, Triton code, warps and stages of every Pallas kernel that a function calls."""
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    found: list[tuple[str, str, int, int]] = []

    def visit(operation: Any) -> Any:
        from jaxlib.mlir import ir

        attributes = operation.attributes
        if "call_target_name" in attributes:
            if ir.StringAttr(attributes["call_target_name"]).value == PALLAS_CALL:
                config = ir.DictAttr(attributes["mhlo.backend_config"])
                warps, stages = (
                    ir.IntegerAttr(config[name]).value for name in ("num_warps", "num_stages")
                )
                code = _triton_text(ir.StringAttr(config["ir"]).value_bytes)
                found.append((ir.StringAttr(config["name"]).value, code, warps, stages))
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir().operation.walk(visit)
    return tuple(found)


def triton_resources(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    warps: int,
    stages: int = 1,
    capability: int,
) -> GpuResources:
    """Compiles a `triton.jit` function.

    Args:
      kernel: the function.
      signature: type of every argument that is no constant, such as "*fp32" or "i32"; pointers
        are taken to be aligned to 16 bytes, as XLA's arrays are.
      constants: value of every constant argument.
      warps: warps of a program.
      stages: depth of the software pipeline.
      capability: one of `CAPABILITIES`, or another that Triton knows.
    """
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = {k: "constexpr" if k in constants else signature[k] for k in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, k in enumerate(names) if types[k][0] == "*"}
    source = ASTSource(kernel, types, {k: constants[k] for k in names if k in constants}, aligned)
    return _resources(kernel.__name__, source, warps, stages, capability)


@lru_cache(maxsize=256)
def _compile_pallas(name: str, text: str, warps: int, stages: int, capability: int) -> GpuResources:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{name}.ttir")
        path.write_text(text)
        return _resources(name, str(path), warps, stages, capability)


def _triton_text(bytecode: bytes) -> str:
    """Triton's intermediate code as text, from the bytes in which JAX ships it."""
    from jaxlib.mlir import ir
    from jaxlib.triton import dialect

    context = ir.Context()
    dialect.register_dialect(context)
    context.load_all_available_dialects()
    with context:
        return str(ir.Module.parse(bytecode))


def _resources(name: str, source: Any, warps: int, stages: int, capability: int) -> GpuResources:
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled, instructions = _inspect(compiled.asm["cubin"])
    return GpuResources(
        *(name, capability, warps, registers, spilled, compiled.metadata.shared, instructions)
    )


def _inspect(cubin: bytes) -> tuple[int, int, int]:
    """Registers and spilled bytes of a thread, and the number of instructions."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)

        def run(option: str) -> str:
            command = [str(tool), option, str(path)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", run("-res-usage")))
        code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", run("-sass"), re.MULTILINE)
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"]), len(code)
