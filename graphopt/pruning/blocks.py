"""The matrices of an attention block in a graph, for bounds on what its heads can add."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx

from graphopt import capture, ops, views
from graphopt.pruning import bounds, channels, evidence, lines, region

aten = torch.ops.aten


def certified_block(part: region.Region, limit: float) -> tuple[bounds.Block, list[fx.Node]] | str:
    """The block of a region and the placeholders of its tensors, or why no bound is known."""
    attention = part.attention
    if attention is None:
        return "its input is not the result of attention"
    if not _only_moved(cast(fx.Node, part.consumer.args[0]), attention):
        return "something is computed between attention and its output projection"
    value = cast(fx.Node, attention.args[2])
    found = _values(value)
    if found is None:
        return "its values are not made by one linear of the model (cross-attention from a cache, or computed)"
    linear, first_row = found
    norm = _norm(cast(fx.Node, linear.args[0]))
    if norm is None:
        return "no norm comes before the value projection, so that its input is not bounded"
    gain, shift, offset = norm
    o, v = (evidence.stored(cast(fx.Node, made.args[1])) for made in (part.consumer, linear))
    bias = linear.args[2] if len(linear.args) > 2 else None
    others = [gain, shift, bias]
    if o is None or v is None or any(other is not None and evidence.stored(other) is None for other in others):
        return "one of its weights is computed in the graph"
    block = bounds.Block(
        heads=(),
        size=int(value.meta["val"].shape[-1]),
        group=channels.heads_per_group(attention),
        first_row=first_row,
        o_transposed=o[1],
        v_transposed=v[1],
        has=(gain is not None, shift is not None, bias is not None),
        gain_offset=offset,
        limit=limit,
    )
    return block, [o[0], v[0], *(other for other in others if other is not None)]


def tensors(placeholders: list[fx.Node]) -> list[torch.Tensor] | None:
    """The weights as they are now, if all are at hand."""
    found = [capture.weight_tensor(placeholder) for placeholder in placeholders]
    return [tensor for tensor in found if tensor is not None] if all(map(lines.can_be_read, found)) else None


def _only_moved(node: fx.Node, attention: fx.Node) -> bool:
    while node is not attention:
        if not views.is_view(node) and node.target is not aten.clone.default:
            return False
        node = views.source(node)
    return True


def _values(node: fx.Node) -> tuple[fx.Node, int] | None:
    """The linear that makes the values, and its first row for them; a cache counts as made by this model."""
    first = 0
    while node.target is not ops.linear:
        part = channels.piece(node)
        if part is not None:
            node, first = part[0], first + part[1]
        elif views.is_view(node) or node.target is aten.clone.default:
            node = views.source(node)
        elif node.target is aten.slice_scatter.default:
            node = cast(fx.Node, node.args[1])
        else:
            return None
    return node, first


def _norm(x: fx.Node) -> tuple[Any, Any, float] | None:
    """Weight, bias and what is added to the weight, if x is the result of a norm over its last dimension."""
    while views.is_view(x) and x.target in views.RESHAPES:
        x = views.source(x)
    if x.target is ops.rms_norm:
        _, weight, _, *rest = cast(tuple[Any, ...], x.args)
        return weight, None, float((*rest, x.kwargs.get("weight_offset", 0.0))[0])
    if x.target is operator.getitem and x.args[1] == 0:
        made = cast(Any, x.args[0])
        weight, bias = (*made.args[2:4], None, None)[:2]
        if made.target is aten.native_layer_norm.default and len(made.args[1]) == 1:
            return weight, bias, 0.0
        if made.target is aten._fused_rms_norm.default and len(made.args[1]) == 1:
            return weight, None, 0.0
    return None
