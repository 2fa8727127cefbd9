"""Write casts to and from eight-bit floats as integer arithmetic on their bytes, which every GPU computes alike.

    y = to_float8_e4m3fn(x)
becomes
    bytes = ... shifts and selections of the bits of to_float(x) ...;  y = view(bytes, float8_e4m3fn)

and a cast from such numbers begins with a view of them as bytes. The arithmetic is elementwise, so that it ends the
region that makes x (the epilogue of a product, a norm) or begins the one that reads y; the view moves nothing.
Rounding, overflow and NaN are eager's (`quantization.elementwise`). Other eight-bit formats stay casts, which torch
runs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from graphopt import capture, edit
from graphopt.quantization import elementwise

_CASTS = frozenset({torch.ops.prims.convert_element_type.default, torch.ops.aten._to_copy.default})


def expand_float8(graph_module: GraphModule) -> int:
    """Expand every cast to or from an eight-bit float that has a rule; returns how many there were."""
    count = 0
    for node in list(graph_module.graph.nodes):
        if not _is_cast(node):
            continue
        with edit.rewriting(graph_module, node) as rewrite:
            target = node.meta["val"].dtype
            rewrite.replace(
                node, rewrite.inline(_cast, node.args[0], target, decompositions=capture.decompositions()))
        count += rewrite.applied
    edit.eliminate_dead_code(graph_module)
    return count


def _is_cast(node: Node) -> bool:
    if node.target not in _CASTS or not set(node.kwargs) <= {"dtype"}:
        return False
    operand = node.args[0]
    assert isinstance(operand, Node)
    dtypes = (operand.meta["val"].dtype, node.meta["val"].dtype)
    known = all(dtype.itemsize > 1 or not dtype.is_floating_point or dtype in elementwise.FLOAT8 for dtype in dtypes)
    return known and any(dtype in elementwise.FLOAT8 for dtype in dtypes) and not any(d.is_complex for d in dtypes)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dtype in elementwise.FLOAT8:
        x = elementwise.from_float8(x.view(torch.uint8), x.dtype)
    if dtype not in elementwise.FLOAT8:
        return x.to(dtype)
    return elementwise.to_float8(x.float(), dtype).view(dtype)
