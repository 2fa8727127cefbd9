"""Remove operations that return what they are given.

    y = view(permute(permute(x, [0, 2, 1]), [0, 2, 1]), x.shape);  z = clone(y);  w = mul(z, 1.0)
becomes x everywhere.

Views are compared by the addresses they show, so any chain that comes back to where it began counts. Copies (clone,
cast to the same dtype, x * 1, x / 1, x - 0, cat of one tensor) go if their strides are those of the input, unless
the copy keeps a result apart from an input, from another result, or from memory that is written. `x + 0.0` stays: it
turns -0.0 into 0.0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt import edit, shapes, views
from graphopt.pipeline import graph_pass

aten, prims = torch.ops.aten, torch.ops.prims

# From which dtypes to which others every value survives.
_WIDER = {
    torch.float16: (torch.float32, torch.float64),
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
    torch.int32: (torch.int64, torch.float64),
}


@graph_pass(exactness="bitwise", stage="canonicalize")
def remove_noops(graph_module: fx.GraphModule) -> int:
    """Let users of an operation that changes nothing use its input."""
    exposure = views.Exposure(graph_module.graph)
    count = 0
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or not node.users:
            continue
        same = _same(node)
        if same is None or shapes.difference(node.meta["val"], same.meta["val"]):
            continue
        if not exposure.may_become(node, same):
            edit.refuse(node, f"it keeps apart {same.name} and a result of the graph or memory that is written")
            continue
        with edit.rewriting(graph_module, node) as rewrite:
            rewrite.replace(node, same)
        if rewrite.applied:
            exposure.became(node, same)
        count += rewrite.applied
    return count


def _same(node: fx.Node) -> fx.Node | None:
    """The node that has the values of this one, if it is known."""
    if views.is_view(node):
        original = views.original(node)
        return original if original is not node else None
    if _is_copy(node):
        return views.source(node)
    if node.target is prims.convert_element_type.default:
        return _before_round_trip(node)
    if node.target is aten.cat.default:
        return _only_part(node)
    return None


def _is_copy(node: fx.Node) -> bool:
    target, rest = node.target, node.args[1:]
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if target in (aten.clone.default, aten.repeat.default):
        return True  # the caller compares shapes
    if target in (aten.mul.Tensor, aten.div.Tensor):
        return _is_number(rest[0], 1)
    if target is aten.sub.Tensor:
        return not node.kwargs and _is_number(rest[0], 0)
    if target is aten.add.Tensor:
        return not node.kwargs and _is_number(rest[0], 0) and _is_integral(node)
    return target is prims.convert_element_type.default and _dtype(node) == _dtype(node.args[0])


def _is_number(argument: Any, value: int) -> bool:
    return isinstance(argument, (int, float)) and argument == value and str(argument)[0] != "-"


def _is_integral(node: fx.Node) -> bool:
    return not _dtype(node).is_floating_point and not _dtype(node).is_complex


def _dtype(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def _before_round_trip(node: fx.Node) -> fx.Node | None:
    """x of cast(cast(x, wider), dtype of x)."""
    cast = views.source(node)
    if cast.target is not prims.convert_element_type.default:
        return None
    x = views.source(cast)
    return x if _dtype(cast) in _WIDER.get(_dtype(x), ()) else None


def _only_part(node: fx.Node) -> fx.Node | None:
    """The only tensor of a cat that is not empty."""
    tensors: Any = node.args[0]
    parts = [part for part in tensors if not shapes.same(part.meta["val"].numel(), 0)]
    return parts[0] if len(parts) == 1 else None
