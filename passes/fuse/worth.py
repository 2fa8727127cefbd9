"""Is a larger region worth it? By a cost model of the user's, if there is one; else the rules of joining decide alone,
but where a larger region leaves too few programs."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node

from graphopt import estimate
from graphopt.columns import sizes_of
from graphopt.cost import Cost, CostModel, value_bytes
from graphopt.index_arithmetic import product
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


_ROWS = 64
"""Rows that one program of a product takes, by and large."""


def draws_too_little(result: Node, columns: int) -> str:
    """Why a product whose programs compute so many columns each would take longer, for all that its readers save."""
    graph_module = result.graph.owning_module
    assert graph_module is not None
    device, sizes = estimate.gpu_of(graph_module), estimate.example_sizes(graph_module)
    contraction = result.all_input_nodes[0] if result.target is operator.getitem else result
    read = sum((value_bytes(node.meta["val"]) for node in contraction.all_input_nodes), sympy.Integer(0))
    written = value_bytes(result.meta["val"])
    elements = Cost(product(sizes_of(result))).at(sizes).bytes
    programs = max(1, math.ceil(elements / (_ROWS * columns)))
    moving = device.seconds(Cost(read + written).at(sizes))
    apart = moving + device.seconds(Cost(2 * written, launches=1).at(sizes))
    if moving / device.drawn(programs) <= apart:
        return ""
    return f"programs that compute {columns} columns each would be too few, {programs}, to draw the bandwidth"


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
