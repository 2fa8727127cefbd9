"""Write constants that count as counting, where masks are made of them.

    le(constant_1, constant_2)                      # [1, 1, 1, 70] and [1, 1, 70, 1], folded from arange
becomes
    le(expand(view(iota(70), [1, 1, 1, -1]), ...), expand(view(iota(70), [1, 1, -1, 1]), ...))

Sizes that are known let `arange` and all that is computed from it be folded into tensors. A kernel computes a position
for nothing, and sees from it which keys a mask can let a query see (`backends/triton/mask_bounds.py`); what is loaded
tells it nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch.fx import GraphModule, Node

from graphopt import _compat, edit
from graphopt.passes.fuse.mask_places import places
from graphopt.row_ops import is_fusable

aten = torch.ops.aten
prims = torch.ops.prims


def write_positions(graph_module: GraphModule, masks: Iterable[Node]) -> int:
    """Replace constants in the making of masks that count along one dimension and are repeated along the others."""
    constants = dict.fromkeys(n for mask in masks for n in places(mask) if n.op == "get_attr")
    return sum(_written(graph_module, node) for node in constants)


def _written(graph_module: GraphModule, node: Node) -> int:
    value = operator.attrgetter(str(node.target))(graph_module)
    counting = _progression(value) if isinstance(value, torch.Tensor) else None
    if counting is None or not all(map(is_fusable, node.users)):
        return 0
    dim, start, step = counting
    settings = {"start": start, "step": step, "dtype": value.dtype, "device": value.device, "requires_grad": False}
    with edit.rewriting(graph_module, min(node.users)) as rewrite:
        counted = rewrite.call(prims.iota.default, value.shape[dim], **settings)
        alone = rewrite.call(aten.view.default, counted, [-1 if d == dim else 1 for d in range(value.dim())])
        # Its readers become kernels, which read it wherever it lies.
        rewrite.replace(node, rewrite.call(aten.expand.default, alone, list(value.shape)), same_layout=False)
    return rewrite.applied


def _progression(value: torch.Tensor) -> tuple[int, int, int] | None:
    """The dimension along which a tensor of integers counts, its start and its step; None for another tensor."""
    if value.dtype not in (torch.int64, torch.int32) or value.numel() < 2:
        return None
    with _compat.without_modes():
        varying = [d for d in range(value.dim()) if not torch.equal(value, value.narrow(d, 0, 1).expand_as(value))]
        if len(varying) != 1:
            return None
        listed = value[tuple(slice(None) if d == varying[0] else 0 for d in range(value.dim()))].tolist()
    start, step = listed[0], listed[1] - listed[0]
    counts = listed == [start + step * place for place in range(len(listed))]
    return (varying[0], start, step) if counts else None
