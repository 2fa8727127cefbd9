"""Is a larger region worth it by a cost model of the user's? Without one, the rules of joining alone decide."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from graphopt import estimate
from graphopt.cost import CostModel
from graphopt.row_ops import CONSTANTS, is_view


@dataclasses.dataclass
class Worth:
    """Asks the model for the seconds, on the device of the graph, that regions take together and apart."""

    graph_module: GraphModule
    model: CostModel

    def __post_init__(self) -> None:
        self._device = estimate.device_of(self.graph_module, "auto")
        self._sizes = estimate.example_sizes(self.graph_module)
        self._known: dict[frozenset[Node], float] = {}

    def together(self, parts: Iterable[Iterable[Node]]) -> bool:
        """Would one region of all parts take no longer than a region of each?"""
        apart = [list(part) for part in parts]
        whole = [node for part in apart for node in part]
        return self._seconds(whole) <= sum(self._seconds(part) for part in apart)

    def _seconds(self, members: list[Node]) -> float:
        key = frozenset(members)
        if key not in self._known:
            cost = self.model(_region(members)).at(self._sizes)
            self._known[key] = self._device.seconds(cost, _dtype(members))
        return self._known[key]


def _region(members: list[Node]) -> GraphModule:
    """The nodes as a graph: what they read from outside are its inputs, what is read outside its outputs.

    Views and constants that they read are inside, as in the region that would be made of them.
    """
    region, inner = Graph(), {}
    inside = dict.fromkeys(sorted(members))

    def value_of(node: Node) -> Node:
        if node not in inner:
            free = node.op == "call_function" and (is_view(node) or node.target in CONSTANTS)
            if node in inside or free:
                sources = {source: value_of(source) for source in node.all_input_nodes}
                inner[node] = region.node_copy(node, sources.__getitem__)
            else:
                inner[node] = Graph.placeholder(region, f"in_{len(inner)}")
                inner[node].meta.update(val=node.meta.get("val"))
        return inner[node]

    for node in inside:
        value_of(node)
    shown = [node for node in inside if any(user not in inside for user in node.users)]
    region.output(tuple(inner[node] for node in shown))
    return GraphModule(torch.nn.Module(), region)


def _dtype(members: list[Node]) -> torch.dtype:
    values: list[Any] = [node.meta.get("val") for node in members]
    dtypes = (value.dtype for value in values if isinstance(value, torch.Tensor))
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)
