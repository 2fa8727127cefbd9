"""The x86 instruction sets that the kernels are compiled for, and which of them this machine runs."""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class InstructionSet:
    """`flags` are the compiler's, `needs` what Linux lists of a processor whose registers it also saves."""

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]


def _extended(base: InstructionSet, name: str, flags: str, needs: str) -> InstructionSet:
    return InstructionSet(name, (*base.flags, *flags.split()), base.needs | set(needs.split()))


PLAIN = InstructionSet("plain", (), frozenset())
_AVX2 = _extended(PLAIN, "avx2", "-mavx2 -mfma -mf16c", "avx2 fma f16c")
_AVX512 = _extended(_AVX2, "avx512", "-mavx512f -mavx512bw -mavx512dq -mavx512vl", "avx512f avx512bw avx512dq avx512vl")
_VNNI = _extended(_AVX512, "avx512vnni", "-mavx512vnni", "avx512_vnni")
_BF16 = _extended(_VNNI, "avx512bf16", "-mavx512bf16", "avx512_bf16")
_AMX = _extended(_BF16, "amx", "-mamx-tile -mamx-bf16", "amx_tile amx_bf16")
# In the order of preference.
INSTRUCTION_SETS = (_AMX, _BF16, _VNNI, _AVX512, _AVX2, PLAIN)


@functools.cache
def runnable() -> tuple[InstructionSet, ...]:
    """Those this machine runs, the best first. The tiles of AMX may still be denied by the kernel (`may_use_tiles`)."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return (PLAIN,)
    found = _processor_flags()
    return tuple(each for each in INSTRUCTION_SETS if each.needs <= found)


def _processor_flags() -> frozenset[str]:
    """What every processor listed by Linux has; nothing if it does not say."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return frozenset()
    listed = [set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")]
    return frozenset(set.intersection(*listed)) if listed else frozenset()
