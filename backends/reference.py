"""Run a graph by its meaning: every node as PyTorch runs it. The oracle, and the fallback of all other targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from graphopt.capture import GraphInfo
from graphopt.lowering import Lowered, choose
from graphopt.options import Options
from graphopt.runtime import prologue
from graphopt.runtime.artifact import Artifact


def compile_graph(graph_module: fx.GraphModule, inputs: Sequence[Any], info: GraphInfo, options: Options) -> Lowered:
    """The graph as a boxed callable: it takes one list of inputs, empties it, and returns the list of outputs.

    Weights are packed as on every target, once and under a guard: of a released weight nothing but its pack is left.
    """
    choices = choose(graph_module, ())
    packing, _ = prologue.hoist(graph_module, inputs, packs_only=True)

    def run(boxed: list[Any]) -> Any:
        arguments = tuple(boxed)
        boxed.clear()
        return graph_module.forward(*arguments)

    graph_module.recompile()
    return Lowered(Artifact(run, packing), choices)
