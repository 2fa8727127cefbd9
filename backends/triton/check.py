"""Compile generated kernels for GPUs that are not there, and read what they cost: registers, spills, shared memory.

    resources(kernel, "sm_90")  ->  Resources(registers=40, spilled_bytes=0, shared_bytes=1024)

NVIDIA: Triton's own ptxas makes a cubin and `cuobjdump -res-usage` of the same wheel reads it; a thread's stack is what
spills. AMD: the assembly's metadata lists registers and a thread's scratch memory. (Scalar registers that are kept in
lanes of a vector register count as spilled there, but no memory is touched, and the vector register is counted.) Equal
kernels are compiled once per target in a process.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
import subprocess
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from graphopt.backends.triton import helpers
from graphopt.backends.triton.source import Kernel
from graphopt.runtime.launch import all_registers

TARGETS: dict[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""The architectures that kernels are checked for: A100, H100 and H200, B200, MI300."""

_THREADS = {"sm_80": 2048, "sm_90": 2048, "sm_100": 2048, "gfx942": 2048}
_REGISTERS = {"sm_80": 65536, "sm_90": 65536, "sm_100": 65536, "gfx942": 131072}
_SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes on one target; registers are per thread, shared memory per program."""

    target: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    threads: int

    @property
    def fits(self) -> bool:
        """No spills, and no more shared memory than the target has."""
        return self.spilled_bytes == 0 and self.shared_bytes <= _SHARED[self.target]

    @property
    def occupancy(self) -> float:
        """Estimated share of a multiprocessor's threads that can be resident."""
        granted = -(-self.registers // 8) * 8
        by_registers = _REGISTERS[self.target] // max(1, granted * self.threads)
        by_shared = _SHARED[self.target] // self.shared_bytes if self.shared_bytes else by_registers
        return min(1.0, min(by_registers, by_shared, 32) * self.threads / _THREADS[self.target])


def resources(kernel: Kernel, target: str) -> Resources:
    """Compile a kernel for a target of `TARGETS` and read its resources.

    Raises ValueError for an unknown target, and Triton's own error when the kernel does not compile.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}: it must be one of {', '.join(TARGETS)}")
    return _resources(_Compilation(kernel, target))


@dataclasses.dataclass(frozen=True)
class _Compilation:
    """A kernel for a target; equal when the kernels' digests are."""

    kernel: Kernel = dataclasses.field(compare=False)
    target: str
    digest: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", self.kernel.digest)


@functools.lru_cache(maxsize=4096)
def _resources(compilation: _Compilation) -> Resources:
    found = _read(compilation)
    if not found.spilled_bytes or not (more := all_registers(compilation.kernel.num_warps)):
        return found
    again = _read(compilation, **more)
    return again if TARGETS[compilation.target].backend == "cuda" else found


def _read(compilation: _Compilation, **options: int) -> Resources:
    kernel, target = compilation.kernel, compilation.target
    compiled = compile_for(kernel, target, **options)
    threads = kernel.num_warps * TARGETS[target].warp_size
    shared = int(compiled.metadata.shared)
    if "cubin" in compiled.asm:
        registers, stack = _read_cubin(compiled.asm["cubin"])
        return Resources(target, registers, stack, shared, threads)
    assembly = compiled.asm["amdgcn"]
    registers = _field(assembly, r"\.vgpr_count:\s+(\d+)")
    scratch = _field(assembly, r"\.private_segment_fixed_size:\s+(\d+)")
    return Resources(target, registers, scratch, shared, threads)


def compile_for(kernel: Kernel, target: str, **more: int) -> Any:
    """Triton's compiled kernel for a target, with no device needed. more: options besides the kernel's own."""
    from graphopt.backends.triton.compile import load
    from graphopt.backends.triton.program import PRELUDE

    parts = [PRELUDE, *helpers.in_order(set(kernel.helpers)), kernel.text("kernel")]
    function = load("\n\n".join(p.strip("\n") + "\n" for p in parts))["kernel"]
    constants: dict[str, Any] = {**kernel.constants, "INDEX": triton.language.int32}
    kinds = dict(zip(kernel.parameters, kernel.types, strict=True))
    kinds |= {symbol.name: "i32" for symbol, _ in kernel.sizes} | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(kernel.parameters))}
    source = ASTSource(
        fn=function, signature={n: kinds[n] for n in function.arg_names},
        constexprs={(function.arg_names.index(n),): v for n, v in constants.items()}, attrs=aligned,
    )
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, "enable_fp_fusion": False, **more}
    return triton.compile(source, target=TARGETS[target], options=options)


def _field(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def _read_cubin(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a cubin."""
    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return _field(usage, r"REG:(\d+)"), _field(usage, r"STACK:(\d+)")
