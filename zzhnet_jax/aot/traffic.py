"""How many bytes each instruction of a compiled program moves between a chip and its memory."""

import re

from .hlo_text import Computation, Instruction, Program

# These move nothing, or what they move is counted where it is made or used.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all iota"
    " partition-id replica-id opt-barrier add-dependency".split()
)
_INTEGER = re.compile(r"^(\d+)")


def memory_traffic(program: Program, computation: Computation, instruction: Instruction) -> float:
    """Bytes that one instruction reads from and writes to main memory."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0.0
    operands = computation.operands(instruction)
    if opcode == "fusion":
        return _fusion_traffic(program, instruction, operands)
    if opcode in ("dynamic-slice", "slice", "gather"):
        return 2.0 * instruction.memory_bytes
    if opcode == "dynamic-update-slice":
        return 2.0 * operands[1].memory_bytes if instruction.memory_bytes else 0.0
    read = sum(operand.memory_bytes for operand in operands)
    if opcode == "copy-start":  # its result holds the operand as well
        return float(max(instruction.memory_bytes, read))
    if opcode.endswith("-start"):
        return float(read)
    if "__cublas$" in instruction.attributes or "__cudnn$" in instruction.attributes:
        return float(read + instruction.arrays[0].bytes)  # the rest of its result is scratch
    return float(read + instruction.memory_bytes)


def _fusion_traffic(
    program: Program, instruction: Instruction, operands: list[Instruction]
) -> float:
    """As `memory_traffic`; of arrays that are sliced or updated in place, only that part counts."""
    inner = program.computations.get(instruction.attribute("calls") or "")
    if inner is None:
        return float(sum(o.memory_bytes for o in operands) + instruction.memory_bytes)
    parameters = {
        int(number[0]): part
        for part in inner
        if part.opcode == "parameter" and (number := _INTEGER.match(part.attributes))
    }
    total = 0.0
    for place, operand in enumerate(operands):
        if operand.memory_bytes and place in parameters:
            total += min(_part_read(inner, parameters[place]), operand.memory_bytes)
    root = inner.root
    results = inner.operands(root) if root.opcode == "tuple" else [root]
    for result in results:
        while result.opcode in ("bitcast", "convert", "copy") and inner.operands(result):
            result = inner.operands(result)[0]
        if result.opcode == "dynamic-update-slice":
            written = inner.operands(result)[1].bytes if result.memory_bytes else 0
        else:
            written = result.memory_bytes
        total += written
    return total


def _part_read(computation: Computation, value: Instruction) -> float:
    """How much of an array a fused computation reads."""
    total = 0.0
    for user in computation.users[value.name]:
        if user.opcode == "dynamic-slice" and user.operands[0] == value.name:
            total += user.bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            continue
        elif user.opcode == "bitcast":
            total += _part_read(computation, user)
        else:
            return float(value.bytes)
    return total
