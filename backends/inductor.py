"""Compile a graph with Inductor: C++ on the CPU, and an alternative to graphopt's own kernels on the GPU.

Dialect operations that a kernel of graphopt supports become calls of its operator inside the Inductor graph; all
others are expanded to ATen by their meaning and fused by Inductor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from graphopt import _compat
from graphopt.capture import NEVER_DECOMPOSED, GraphInfo, undecomposed
from graphopt.lowering import Lowered, Lowering, choose, expand
from graphopt.options import Options
from graphopt.runtime import kv as kv  # what the cache operations do at call time
from graphopt.runtime import prologue
from graphopt.runtime.artifact import Artifact


def compile_graph(
    graph_module: fx.GraphModule,
    inputs: Sequence[Any],
    info: GraphInfo,
    options: Options,
    lowerings: Sequence[Lowering] = (),
) -> Lowered:
    """The graph as a boxed Inductor artifact, and how each dialect operation was lowered."""
    choices = choose(graph_module, lowerings)
    graph_prologue, inputs = prologue.hoist(graph_module, inputs)
    expand(graph_module, undecomposed())
    graph_module.recompile()
    _compat.inductor_calls(*NEVER_DECOMPOSED)
    compiled = _compat.inductor_compile(
        graph_module,
        inputs,
        is_inference=info.kind == "inference",
        is_backward=info.kind == "backward",
        config=_config(options),
    )
    return Lowered(Artifact(compiled, graph_prologue), choices)


def _config(options: Options) -> dict[str, Any]:
    tuned = options.mode.startswith("max-autotune")
    # Random numbers are eager's own: the same seed gives the same dropout mask with and without compiling.
    return {"fallback_random": True} | ({"max_autotune": True} if tuned else {})
