"""Compute what depends on no input now instead of at every call.

    a = arange(7);  b = unsqueeze(a, 1);  mask = le(a, b)
becomes one constant, and a result of equal elements becomes `full`.

Folding runs the operations themselves. Left alone: symbolic sizes, results of more than 4096 elements (a graph
should not carry data that is cheaper to make than to read), random numbers, and results of the graph, which must be
new memory at every call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt import _compat, edit, views
from graphopt.pipeline import graph_pass

aten = torch.ops.aten

LARGEST = 4096


@graph_pass(exactness="bitwise", stage="canonicalize")
def fold_constants(graph_module: fx.GraphModule) -> int:
    """Replace pure operations on constants by their result."""
    exposure = views.Exposure(graph_module.graph)
    known: dict[fx.Node, torch.Tensor] = {}
    with _compat.without_modes(), torch.no_grad():
        for node in graph_module.graph.nodes:
            value = _value(graph_module, node, known)
            if value is not None:
                known[node] = value
        repeated = {node: _repeated_element(value) for node, value in known.items()}
    count = 0
    for node, value in list(known.items()):
        last = any(user not in known for user in node.users)
        if not last or not node.all_input_nodes or views.storage(node) in (exposure.shared | exposure.written):
            continue
        with edit.rewriting(graph_module, node) as rewrite:
            if repeated[node] is None:
                rewrite.replace(node, rewrite.constant(value))
            else:
                like = {"dtype": value.dtype, "device": value.device}
                rewrite.replace(node, rewrite.call(aten.full.default, list(value.shape), repeated[node], **like))
        count += rewrite.applied
    return count


def _value(graph_module: fx.GraphModule, node: fx.Node, known: dict[fx.Node, torch.Tensor]) -> torch.Tensor | None:
    """The node's value if it depends on no input, is small and always the same."""
    fake = node.meta.get("val")
    if not isinstance(fake, torch.Tensor) or not _is_small(fake):
        return None
    if node.op == "get_attr":
        held = getattr(graph_module, str(node.target), None)
        return held if isinstance(held, torch.Tensor) else None
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or edit.is_impure(node):
        return None
    if "empty" in node.target.name() or not all(source in known for source in node.all_input_nodes):
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
    value: Any = node.target(*args, **kwargs)
    return value if isinstance(value, torch.Tensor) else None


def _is_small(fake: torch.Tensor) -> bool:
    sizes = (*fake.shape, *fake.stride())
    return fake.device.type == "cpu" and all(isinstance(size, int) for size in sizes) and fake.numel() <= LARGEST


def _repeated_element(value: torch.Tensor) -> bool | int | float | None:
    """The element that fills the whole tensor, if `full` can make it so, bit for bit."""
    if value.numel() == 0 or value.is_complex() or not value.is_contiguous():
        return None
    value = value.clone(memory_format=torch.contiguous_format).reshape(-1)  # of one element, the stride may be 0
    element: bool | int | float = value[0].item()
    if element != element:
        return None  # printed in the graph's code, a NaN would lose its sign
    filled = torch.full_like(value, element).view(torch.uint8)
    return element if torch.equal(filled, value.view(torch.uint8)) else None
