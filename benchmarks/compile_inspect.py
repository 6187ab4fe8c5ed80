"""What a compiled kernel is made of, read from its PTX, its machine code and Triton's last IR; and what is not allowed.

Nothing here needs a GPU: cuobjdump and nvdisasm come with Triton.
"""

import hashlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.nvidia.compiler import get_ptxas

KIB = 1024
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CACHE = Path(__file__).parent.parent / "build" / "compile_check"
DISASSEMBLED = "sm_90"  # of the others, the PTX is enough: they are compiled only
SHARED_LIMIT = {"sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}  # bytes of a block

FLOAT_ARITHMETIC = re.compile(
    r"^\s+(?:@!?%p\d+\s+)?((?:add|sub|mul|fma|div|rcp|sqrt|rsqrt|ex2|lg2|tanh|sin|cos)\.[\w.]*b?f(?:16|32|64)\w*)", re.M
)
FLOAT_ATOMIC = re.compile(r"^\s+(?:@!?%p\d+\s+)?((?:atom|red)\.[\w.:]*f(?:16|32|64)\w*)", re.M)
PTX_MATRIX = re.compile(r"((?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)\.[\w.:]+)")
SASS_OPCODE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.x]+)", re.M)
REGISTER_OPERAND = re.compile(r"ttng\.warp_group_dot %\S+, .*: tensor<")


@dataclass(frozen=True)
class Binary:
    """What one kernel in one configuration became. Sizes in bytes."""

    registers: int  # of a thread
    stack: int
    spills: int  # instructions that move registers to and from local memory
    shared: int
    matrix: str  # kinds of matrix instructions
    register_operands: int  # wgmma that read their first operand from registers, a compiler risk (triton #11781)
    arithmetic: str  # floating-point instructions of the PTX, counted
    atomics: str = ""  # floating-point ones


def inspect(kernel: Any, target: str) -> Binary:
    """kernel: a triton CompiledKernel."""
    if "amdgcn" in kernel.asm:
        return _inspect_amd(kernel)
    ptx = kernel.asm["ptx"]
    sass: dict[str, Any] = {"registers": 0, "stack": 0, "spills": 0, "matrix": _kinds(PTX_MATRIX.findall(ptx))}
    if target == DISASSEMBLED:
        sass = _disassembled(kernel.asm["cubin"])
    return Binary(
        **sass,
        shared=kernel.metadata.shared,
        register_operands=len(REGISTER_OPERAND.findall(kernel.asm["ttgir"])),
        arithmetic=_counted(FLOAT_ARITHMETIC.findall(ptx)),
        atomics=_counted(FLOAT_ATOMIC.findall(ptx)),
    )


def violations(binary: Binary, target: str) -> list[str]:
    """What the alignment contract or the machine forbids, in words."""
    found = []
    if binary.stack or binary.spills:
        found.append(f"{binary.spills} instructions spill registers, {binary.stack} bytes of stack")
    if binary.shared > SHARED_LIMIT[target]:
        found.append(f"{binary.shared} bytes of shared memory, {target} has {SHARED_LIMIT[target]}")
    if division := re.findall(r"div\.(?:full|approx)\S*", binary.arithmetic):
        found.append(f"approximate division: {' '.join(division)}; use tl.div_rn")
    if "tf32" in binary.matrix.lower():
        found.append(f'{binary.matrix} rounds FP32 operands to 10 bits; pass input_precision="ieee"')
    if binary.atomics:
        found.append(f"floating-point atomics, whose order is by chance: {binary.atomics}")
    return found


def ptxas_version(architecture: int) -> str:
    """Of the assembler that Triton takes for it."""
    version: str = get_ptxas(architecture).version
    return version


def _disassembled(cubin: bytes) -> dict[str, Any]:
    """registers, stack, spills, matrix; kept by digest (also of this file), because nvdisasm outlasts the compiler."""
    path = CACHE / f"{hashlib.sha256(cubin + Path(__file__).read_bytes()).hexdigest()}.json"
    if not path.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_disassemble(cubin)))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _disassemble(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(TOOLS / "cuobjdump", "--dump-resource-usage", file.name)
        opcodes = SASS_OPCODE.findall(_output(TOOLS / "nvdisasm", "-c", file.name))
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "stack": _number(r"STACK:(\d+)", usage),
        "spills": sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes),
        "matrix": _kinds([opcode for opcode in opcodes if re.match(r"[HQID]G?MMA\b", opcode)]),
    }


def _inspect_amd(kernel: Any) -> Binary:
    code = kernel.asm["amdgcn"]
    return Binary(
        registers=_number(r"\.vgpr_count:\s+(\d+)", code),
        stack=_number(r"\.private_segment_fixed_size:\s+(\d+)", code),
        spills=_number(r"\.vgpr_spill_count:\s+(\d+)", code),
        shared=kernel.metadata.shared,
        matrix=_kinds(re.findall(r"^\s+(v_mfma_\w+)", code, re.M)),
        register_operands=0,
        arithmetic="",
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"{pattern} is not in:\n{text[:500]}"
    return int(found[1])


def _kinds(instructions: list[str]) -> str:
    return " ".join(sorted(set(instructions)))


def _counted(instructions: list[str]) -> str:
    return " ".join(f"{name}:{count}" for name, count in sorted(Counter(instructions).items()))


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def as_row(binary: Binary) -> dict[str, Any]:
    """Without what is empty."""
    return {name: value for name, value in asdict(binary).items() if value not in ("", 0)}
