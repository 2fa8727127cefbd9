"""Compute a linear only for the rows that are used, as for the last token's logits.

    y = graphopt.linear(x, w);  z = y[:, -1, :]
becomes
    z = graphopt.linear(x[:, -1, :], w)

Nothing is done when other rows are used too, when the output features are sliced, when as many rows remain, or when
the caller gets `z` as a view into the larger result, whose strides it can see.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import fx
from torch._ops import OpOverload

from graphopt import edit, ops, shapes, views
from graphopt.match import paths
from graphopt.pipeline import graph_pass

aten = torch.ops.aten

_FEWER_ROWS = (aten.slice.Tensor, aten.select.int)


@graph_pass(exactness="rounding", stage="recognize", training=False)
def slice_before_linear(graph_module: fx.GraphModule) -> int:
    """Move slice and select from the result of a linear to its input."""
    exposure = views.Exposure(graph_module.graph)
    count = 0
    for node in list(graph_module.graph.nodes):
        if node.target is not ops.linear or len(node.users) != 1:
            continue
        (piece,) = node.users
        if piece.target not in _FEWER_ROWS:
            continue
        reason = _why_not(node, piece, exposure)
        if reason:
            edit.refuse(piece, reason)
        else:
            count += _move(graph_module, node, piece)
    return count


def _why_not(node: fx.Node, piece: fx.Node, exposure: views.Exposure) -> str:
    dim = int(piece.args[1]) if len(piece.args) > 1 else 0  # type: ignore[arg-type]
    if dim in (-1, node.meta["val"].dim() - 1):
        return "it picks features, not rows"
    if shapes.same(shapes.numel(piece.meta["val"]), shapes.numel(node.meta["val"])):
        return "it keeps all rows"
    if not _lies_dense(piece) and (node in exposure.shared or any(map(_sees_strides, piece.users))):
        return "the strides of the larger result are seen by the caller or by a view"
    return ""


def _lies_dense(piece: fx.Node) -> bool:
    value = piece.meta["val"]
    dense = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if not shapes.same(size, 1) and not shapes.same(stride, dense):
            return False
        dense = dense * size
    return True


def _sees_strides(user: fx.Node) -> bool:
    return paths.kind(user) is not None or user.target in (aten.as_strided.default, aten.unfold.default)


def _move(graph_module: fx.GraphModule, node: fx.Node, piece: fx.Node) -> int:
    x, *rest = node.args
    with edit.rewriting(graph_module, piece) as rewrite:
        rows = rewrite.call(cast(OpOverload, piece.target), x, *piece.args[1:], **piece.kwargs)
        rewrite.replace(piece, rewrite.call(ops.linear, rows, *rest), same_layout=_lies_dense(piece))
    return rewrite.applied
