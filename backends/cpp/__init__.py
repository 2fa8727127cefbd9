"""Compiled C++ kernels for what decides decode on the CPU: small-batch linears, plain and quantised, and attention.

`build.py` compiles `src/` once per machine; `linear.py`, `quantized.py` and `attention.py` say what the operators take.
"""

from __future__ import annotations

from graphopt.backends.cpp import attention, build, isa, linear, quantized
from graphopt.lowering import Lowering
from graphopt.runtime import cache


def unavailable_reason() -> str | None:
    """Why the kernels cannot run here, or None. Builds them (half a minute, once) or loads what was built."""
    return build.load(cache.cache_dir("cpp"))


def load_instruction_set(name: str) -> bool:
    """Have the kernels for this instruction set at hand (`torch.ops.graphopt_cpp.set_isa` then takes it).

    For tests and measurements, where `unavailable_reason()` is None. False if this machine does not run it.
    """
    for each in isa.runnable():
        if each.name == name:
            build.load_table(cache.cache_dir("cpp"), each)
            return True
    return False


def lowerings() -> tuple[Lowering, ...]:
    """The lowerings onto these kernels; none where they are unavailable."""
    return () if unavailable_reason() else (*linear.lowerings(), *quantized.lowerings(), *attention.lowerings())
