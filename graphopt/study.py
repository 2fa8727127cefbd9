"""What `explain` finds out about a graph besides compiling it: the graph after each step, what it takes on a device.

A step is "capture" or a pass that changed the graph; of each node one line of text is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import fx

from graphopt import edit, estimate, text
from graphopt.cost import CostModel
from graphopt.estimate import Estimate


@dataclasses.dataclass(frozen=True)
class Line:
    """One node as text. made_by: the pass and number of the rewrite that made it; where: the model's source line."""

    node: str
    text: str
    made_by: str = ""
    where: str = ""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The graph after a step."""

    step: str
    lines: tuple[Line, ...]


@dataclasses.dataclass(frozen=True)
class Study:
    """captured, optimised: what the graph takes before and after the passes on the device of the roofline."""

    captured: Estimate
    optimised: Estimate
    snapshots: tuple[Snapshot, ...]


class Studying:
    """A study while the passes run. device: its name, or "auto"; model: a cost model of the user's."""

    def __init__(self, graph_module: fx.GraphModule, device: str, model: CostModel | None = None) -> None:
        self._device, self._model = estimate.device_of(graph_module, device), model
        self._captured = estimate.estimate(graph_module, self._device, model)
        self._snapshots: list[Snapshot] = []

    def record(self, step: str, graph_module: fx.GraphModule) -> None:
        """Keep the graph as it is after a step."""
        self._snapshots.append(Snapshot(step, tuple(_lines(graph_module, ""))))

    def finish(self, graph_module: fx.GraphModule) -> Study:
        """The study, after the last pass."""
        return Study(self._captured, estimate.estimate(graph_module, self._device, self._model), tuple(self._snapshots))


def _lines(graph_module: fx.GraphModule, indent: str) -> Iterator[Line]:
    for node in graph_module.graph.nodes:
        made = node.meta.get("graphopt")
        made_by = f"{made.pass_name} #{made.number}" if isinstance(made, edit.Provenance) else ""
        where = str(node.meta.get("source") or "") if node.op == "placeholder" else edit.source_line(node)
        yield Line(node.name, indent + text.line(node), made_by, where)
        if node.op == "call_module":
            region = graph_module.get_submodule(str(node.target))
            if isinstance(region, fx.GraphModule):
                yield from _lines(region, indent + "    ")
