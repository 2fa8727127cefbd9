"""The sources of the compiled kernels that a graph calls, for the report."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import torch

from graphopt.backends.cpp.build import SOURCES
from graphopt.lowering import Choice, KernelSource

PREFIX = "cpp."


def used(choices: Sequence[Choice]) -> list[KernelSource]:
    """One entry for each kernel among the choices; the library must be loaded if there is any."""
    calls: dict[str, list[str]] = {}
    for choice in choices:
        if choice.lowering.startswith(PREFIX):
            calls.setdefault(choice.lowering, []).append(choice.node)
    return [
        KernelSource(name, "cpp", source(name), calls=tuple(nodes), built_for=torch.ops.graphopt_cpp.isa())
        for name, nodes in calls.items()
    ]


@functools.cache
def source(lowering: str) -> str:
    """The file `NAME_op.h` that defines the operator of a lowering, and `NAME.h`, its inner loops, if there are any."""
    defined = re.compile(rf'm\.def\(\s*"{lowering.removeprefix(PREFIX)}\(')
    for path in sorted(SOURCES.glob("*_op.h")):
        if defined.search(path.read_text()):
            inner = path.with_name(path.name.replace("_op.h", ".h"))
            files = [path, *([inner] if inner.exists() else [])]
            return "\n".join(f"// ---- {file.name}\n\n{file.read_text()}" for file in files)
    return ""
