"""The lowerings: one file per kernel family or target, imported as `graphopt.backends`.

`TARGETS` is the visible list of targets: from a name of `Options.target` to the function that compiles a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from graphopt.backends import inductor, reference
from graphopt.capture import GraphInfo
from graphopt.lowering import Choice
from graphopt.options import Options
from graphopt.runtime.artifact import Artifact

CompileGraph = Callable[[fx.GraphModule, Sequence[Any], GraphInfo, Options], tuple[Artifact, list[Choice]]]

TARGETS: dict[str, CompileGraph] = {
    "inductor": inductor.compile_graph,
    "reference": reference.compile_graph,
}


def resolve(target: str, inputs: Sequence[Any]) -> str:
    """The name of the target that `Options.target` means for these inputs."""
    if target != "auto":
        return target
    return "inductor"


if __name__ != "graphopt.backends":
    raise ImportError("this package is graphopt.backends: import graphopt.backends, not backends")
