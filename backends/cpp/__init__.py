"""Compiled C++ kernels for what decides decode on the CPU: small-batch linears, plain and quantised, and attention.

`build.py` compiles `src/` once per machine; `linear.py`, `quantized.py` and `attention.py` say what the operators take.
"""

from __future__ import annotations

from graphopt.backends.cpp import attention, build, linear, quantized
from graphopt.lowering import Lowering
from graphopt.runtime import cache


def unavailable_reason() -> str | None:
    """Why the kernels cannot run here, or None. Builds them (half a minute, once) or loads what was built."""
    return build.load(cache.cache_dir("cpp"))


def lowerings() -> tuple[Lowering, ...]:
    """The lowerings onto these kernels; none where they are unavailable."""
    return () if unavailable_reason() else (*linear.lowerings(), *quantized.lowerings(), *attention.lowerings())
