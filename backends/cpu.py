"""The CPU target: graphopt's compiled C++ kernels where they decide the speed, Inductor's C++ for all the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from graphopt.backends import cpp, inductor
from graphopt.backends.cpp import chain, experts, heads, sources
from graphopt.capture import GraphInfo
from graphopt.lowering import Lowered, choose
from graphopt.options import Options


def prepare() -> str:
    """Build or load the kernels: a graph that comes out of a cache calls them without passing through here again."""
    return "without kernels" if cpp.unavailable_reason() else "with kernels"


def compile_graph(graph_module: fx.GraphModule, inputs: Sequence[Any], info: GraphInfo, options: Options) -> Lowered:
    """The graph as an Inductor artifact that calls the kernels; without a compiler, Inductor alone (reported)."""
    choices = choose(graph_module, cpp.lowerings())
    if info.kind == "inference" and not cpp.unavailable_reason():
        heads.write_as_rows(graph_module)
        choices += [*experts.choose(graph_module), *chain.form(graph_module)]
    lowered = inductor.compile_graph(graph_module, inputs, info, options, choices)
    lowered.kernels = sources.used(lowered.choices)
    if reason := cpp.unavailable_reason():
        lowered.left_out.append(("the C++ kernels", reason))
    return lowered
