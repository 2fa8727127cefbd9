"""What follows in a graph when one value lies differently in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt import _compat, shapes


def consequences(graph_module: fx.GraphModule, node: fx.Node, value: torch.Tensor) -> dict[fx.Node, Any] | str:
    """The new fake values of all nodes that change if `node` had the strides of `value`, or why that cannot be.

    A view that needs the old strides, or an operation whose result would have another shape, is a reason.
    """
    changed: dict[fx.Node, Any] = {node: value}

    def seen(argument: fx.Node) -> Any:
        return changed.get(argument, argument.meta.get("val"))

    with _compat.fake_execution(graph_module):
        for user in _later(graph_module, node):
            if user.op != "call_function" or not any(source in changed for source in user.all_input_nodes):
                continue
            args, kwargs = fx.map_arg((user.args, user.kwargs), seen)
            assert callable(user.target)
            try:
                result = user.target(*args, **kwargs)
            except RuntimeError as error:
                return f"{user.name} needs the memory layout of the concatenation: {str(error).splitlines()[0]}"
            difference = shapes.difference(user.meta.get("val"), result)
            if difference and not difference.startswith("stride"):
                return f"{user.name} would have another {difference}"
            if difference:
                changed[user] = result
    return changed


def _later(graph_module: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    nodes = list(graph_module.graph.nodes)
    return nodes[nodes.index(node) + 1 :]
