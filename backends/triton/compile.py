"""A graph becomes a callable that runs generated Triton kernels."""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from graphopt.backends.triton import interpret as interpreter
from graphopt.backends.triton.program import Fallback, Program, write
from graphopt.backends.triton.source import Kernel


class CompiledGraph:
    """A compiled graph: call it with the graph's inputs.

    source: the generated file, runnable alone. kernels: the kernels in it, by name. fallbacks: what runs as ATen calls,
    with reasons. launches: how many kernels one call launches.
    """

    def __init__(self, program: Program, interpret: bool) -> None:
        self.source: str = program.source
        self.kernels: dict[str, Kernel] = program.kernels
        self.fallbacks: list[Fallback] = program.fallbacks
        self.launches: int = program.launches
        self.namespace = load(program.source)
        self.namespace.update(program.constants)
        if interpret:
            self.namespace["launch"] = interpreter.launch

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        """Run the graph on its inputs; returns its outputs."""
        outputs: Sequence[Any] = self.namespace["call"](list(inputs))
        return outputs


def load(source: str) -> dict[str, Any]:
    """Execute a generated file and return its names. The text is kept where `inspect`, and so Triton, finds it."""
    filename = f"<graphopt kernels {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {"__name__": filename}
    exec(compile(source, filename, "exec"), namespace)
    return namespace


def compile_graph(graph_module: GraphModule, interpret: bool) -> CompiledGraph:
    """Generate, load and wrap the program of a graph whose fused regions are `call_module` nodes.

    graph_module: placeholders carry fake values in `meta["val"]`; it is not changed. interpret: run the kernels under
    Triton's interpreter on CPU tensors (slow; for checking); otherwise they need a GPU.
    Raises Unsupported when a node cannot be written at all; what merely has no kernel runs as ATen calls and is listed
    in `fallbacks`.
    """
    with torch.no_grad():
        return CompiledGraph(write(graph_module), interpret)
