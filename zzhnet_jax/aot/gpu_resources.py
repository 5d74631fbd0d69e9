"""What a GPU kernel takes of the GPU, found by compiling it to machine code without a GPU.

    Pallas    compiled by XLA's CUDA plugin, as on a GPU; its assembly is assembled by ptxas
    Triton    compiled by Triton and ptxas, as on a GPU

Both need the `triton` package (extra "triton"), whose wheel carries ptxas and cuobjdump. Nothing is
run. A spill is a value that did not fit the registers and goes through memory.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from zzhnet_jax.kernels.selective_scan.base import Tile

from .compile import compile_for
from .targets import parse_target

# Compute capabilities, and a chip that has each.
_CHIPS = {80: "a100", 90: "h100", 100: "b200"}
CAPABILITIES = tuple(_CHIPS)
_PALLAS = ".entry selective_scan"  # how the names of this package's kernels begin
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
      shared_bytes: shared memory of a program; of Pallas kernels, the part whose size is part of
        the code.
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
    """Compiles a function, and says what every Pallas kernel (Triton backend) in it takes.

    Args:
      function: anything that `jax.jit` takes.
      arguments: arrays or `jax.ShapeDtypeStruct`s.
      capability: one of `CAPABILITIES`.

    Returns:
      One entry a kernel.

    Raises:
      TargetError: XLA's CUDA plugin is not installed.
      NotImplementedError: this version of JAX does not show what it assembles.
    """
    target = parse_target(f"cuda:{_CHIPS[capability]}:1")

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    with tempfile.TemporaryDirectory() as folder:
        shapes = jax.tree.map(shape, arguments)
        compile_for(target, function, *shapes, compiler_options={"xla_dump_to": folder})
        texts = [path.read_text() for path in sorted(Path(folder).glob("*.ptx"))]
        found = [_assemble(text, capability, Path(folder)) for text in texts if _PALLAS in text]
    if not found:
        raise NotImplementedError(f"jax {jax.__version__} shows no assembly of kernels; 0.10 does")
    return tuple(found)


def _assemble(text: str, capability: int, folder: Path) -> GpuResources:
    """Machine code of one kernel, from its assembly."""
    import triton

    source, cubin = folder / "kernel.ptx", folder / "kernel.cubin"
    source.write_text(text)
    # Triton carries two; this one is as new as the assembly.
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas-blackwell"
    architecture = re.search(r"^\.target (\w+)", text, re.MULTILINE)
    entry = re.search(r"\.entry (\w+?)(__\d+)?\(", text)
    threads = re.search(r"\.(?:req|max)ntid (\d+)", text)
    assert architecture and entry and threads
    command = [str(tool), f"-arch={architecture[1]}", str(source), "-o", str(cubin)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    usage = _inspect(cubin.read_bytes())
    return GpuResources(entry[1], capability, int(threads[1]) // 32, *usage)


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


def _resources(name: str, source: Any, warps: int, stages: int, capability: int) -> GpuResources:
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled, _, instructions = _inspect(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    return GpuResources(name, capability, warps, registers, spilled, shared, instructions)


def _inspect(cubin: bytes) -> tuple[int, int, int, int]:
    """Registers and spilled bytes of a thread, shared bytes, and the number of instructions."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)

        def run(option: str) -> str:
            command = [str(tool), option, str(path)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", run("-res-usage")))
        code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", run("-sass"), re.MULTILINE)
    spilled = int(usage["STACK"]) + int(usage["LOCAL"])
    return int(usage["REG"]), spilled, int(usage["SHARED"]), len(code)
