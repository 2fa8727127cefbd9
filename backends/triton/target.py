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
from graphopt.runtime import cache, prologue
from graphopt.runtime import kv as kv  # what the cache operations do at call time
from graphopt.runtime import kv_paged as kv_paged
from graphopt.runtime import kv_quantized as kv_quantized
from graphopt.runtime.artifact import Artifact
from graphopt.runtime.autotune import Tuner


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
    reason = unavailable_reason() or _why_not_on(inputs)
    notes: list[str] = []
    if reason is None:
        from graphopt.backends.triton.compile import compile_graph as generate
        from graphopt.backends.triton.region import Unsupported

        tuner = _tuner(options, inputs)
        if isinstance(tuner, str):
            notes.append(f"mode {options.mode!r}: default configurations: {tuner}")
        try:
            compiled = generate(
                graph_module, _on_cpu(inputs), options.strict, None if isinstance(tuner, str) else tuner
            )
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

    artifact = Artifact(run, graph_prologue)
    # Kernels are compiled for what they are first called with: the report hears of a failure then.
    compiled.refused = lambda what, why: artifact.record.fall_back(what, why) if artifact.record is not None else None
    choices = [Choice(name, kernel.kind, "triton") for name, kernel in compiled.kernels.items()]
    left_out = [(f"{f.name} ({f.target})", f.reason) for f in compiled.fallbacks]
    kernels = [
        KernelSource(name, "python", kernel.text(name), calls=tuple(compiled.calls[name]))
        for name, kernel in compiled.kernels.items()
    ]
    kernels.append(KernelSource("call", "python", compiled.source))
    return Lowered(artifact, choices, left_out, kernels, notes)


def _why_not_on(inputs: Sequence[Any]) -> str | None:
    """Why there are no kernels for the devices of the inputs, or None."""
    devices = {value.device.type for value in inputs if isinstance(value, torch.Tensor)}
    others = ", ".join(repr(name) for name in sorted(devices - {"cpu", "cuda"}))
    return f"tensors are on {others}, and kernels run on 'cuda' or, interpreted, on 'cpu'" if others else None


def _tuner(options: Options, inputs: Sequence[Any]) -> Tuner | str | None:
    """What times configurations in the modes that ask for it; None in the others, or the reason why nothing does."""
    if not options.mode.startswith("max-autotune"):
        return None
    device = next((v.device for v in inputs if isinstance(v, torch.Tensor) and v.device.type == "cuda"), None)
    if device is None:
        return "kernels are timed on a GPU, and these are interpreted on the CPU"
    import triton

    properties = torch.cuda.get_device_properties(device)
    architecture = f"sm_{properties.major}{properties.minor}"
    if torch.version.hip is not None:
        architecture = properties.gcnArchName.partition(":")[0]
    from graphopt.backends.triton.check import TARGETS

    known = architecture if architecture in TARGETS else None
    return Tuner(cache.cache_dir("autotune"), f"{properties.name} {architecture}", triton.__version__, known)


def _on_cpu(inputs: Sequence[Any]) -> bool:
    return all(value.device.type == "cpu" for value in inputs if isinstance(value, torch.Tensor))
