"""The lowerings: one file per kernel family or target, imported as `graphopt.backends`.

`TARGETS` is the visible list of targets: from a name of `Options.target` to the function that compiles a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from graphopt.backends import cpu, inductor, reference
from graphopt.backends.triton import target as triton_target
from graphopt.capture import GraphInfo
from graphopt.lowering import Lowered
from graphopt.options import Options

CompileGraph = Callable[[fx.GraphModule, Sequence[Any], GraphInfo, Options], Lowered]

TARGETS: dict[str, CompileGraph] = {
    "cpu": cpu.compile_graph,
    "inductor": inductor.compile_graph,
    "triton": triton_target.compile_graph,
    "reference": reference.compile_graph,
}


def resolve(target: str, inputs: Sequence[Any]) -> str:
    """The name of the target that `Options.target` means for these inputs (real or fake)."""
    if target != "auto":
        return target
    on_device = any(isinstance(value, torch.Tensor) and value.device.type not in ("cpu", "meta") for value in inputs)
    return "inductor" if on_device else "cpu"


def prepare(target: str) -> str:
    """Load what graphs of this target call at run time, also those that come out of a cache.

    Returns what is there ("" for nothing special): part of the key under which graphs are stored.
    """
    return cpu.prepare() if target == "cpu" else ""


if __name__ != "graphopt.backends":
    raise ImportError("this package is graphopt.backends: import graphopt.backends, not backends")
