"""The Triton target: a graph in fused regions becomes generated kernels, interpreted for tensors on the CPU.

Regions are formed by the pass `form_regions`; a graph without regions still runs, as ATen calls, and the report says
so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphopt.capture import GraphInfo
from graphopt.lowering import Choice, KernelSource, Lowered
from graphopt.options import Options
from graphopt.runtime import kv as kv  # what the cache operations do at call time
from graphopt.runtime import kv_paged as kv_paged
from graphopt.runtime import kv_quantized as kv_quantized
from graphopt.runtime import prologue
from graphopt.runtime.artifact import Artifact


def unavailable_reason() -> str | None:
    """Why no Triton kernel can be made here, or None."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton is not installed ({error})"
    return None


def compile_graph(graph_module: fx.GraphModule, inputs: Sequence[Any], info: GraphInfo, options: Options) -> Lowered:
    """The graph as a boxed callable; what has no kernel is named in `left_out`. Without triton, all of it."""
    from graphopt.backends import reference

    graph_prologue, inputs = prologue.hoist(graph_module, inputs)
    reason = unavailable_reason()
    if reason is None:
        from graphopt.backends.triton.compile import compile_graph as generate
        from graphopt.backends.triton.region import Unsupported

        try:
            compiled = generate(graph_module, _on_cpu(inputs), options.strict)
        except Unsupported as error:
            reason = str(error)
    if reason is not None:
        lowered = reference.compile_graph(graph_module, inputs, info, options)
        lowered.artifact = Artifact(lowered.artifact.compiled, graph_prologue)
        lowered.left_out.append(("the Triton kernels", reason))
        return lowered

    def run(boxed: list[Any]) -> Any:
        arguments = tuple(boxed)
        boxed.clear()
        return compiled(*arguments)

    choices = [Choice(name, kernel.kind, "triton") for name, kernel in compiled.kernels.items()]
    left_out = [(f"{f.name} ({f.target})", f.reason) for f in compiled.fallbacks]
    kernels = [
        KernelSource(name, "python", kernel.text(name), calls=tuple(compiled.calls[name]))
        for name, kernel in compiled.kernels.items()
    ]
    kernels.append(KernelSource("call", "python", compiled.source))
    return Lowered(Artifact(run, graph_prologue), choices, left_out, kernels)


def _on_cpu(inputs: Sequence[Any]) -> bool:
    return all(value.device.type == "cpu" for value in inputs if isinstance(value, torch.Tensor))
