"""Who reads a concatenation: only what attention reads is a cache, and may get the strides of one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from graphopt import ops, shapes, views
from graphopt.passes.recognize.recognize_attention import FUSED

aten = torch.ops.aten

# Between a cache and the product that reads it: repeated heads, another layout or type, a scale.
_ON_THE_WAY = (
    *views.VIEWS,
    aten.clone.default,
    aten._to_copy.default,
    torch.ops.prims.convert_element_type.default,
    aten.mul.Tensor,
    aten.index.Tensor,
)
_READERS = (
    ops.attention,
    *FUSED,
    aten.scaled_dot_product_attention.default,
    ops.linear,
    ops.parallel_linear,
    aten.linear.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.matmul.default,
)


def is_attended(node: fx.Node) -> bool:
    """Whether attention, or a matrix product as attention is written with, reads the node's elements."""
    return next(_readers(node), None) is not None


def is_cross_attended(new: fx.Node) -> bool:
    """Whether the rows [B, H, S, D] that a graph starts a cache with are attended to by other rows than their own.

    In self-attention each row that is new to the cache brings a query (or several, with heads folded into the rows).
    """
    length = shapes.expression(new.meta["val"].shape[2])
    for reader, operand in _readers(new):
        first = reader.args[0]
        if isinstance(first, fx.Node) and first is not operand:
            ratio = shapes.expression(first.meta["val"].shape[-2]) / length
            if not ratio.is_Integer:
                return True
    return False


def _readers(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Each attention or product that reads the node's elements, and the argument that brings them there."""
    seen, waiting = {node}, [node]
    while waiting:
        carrier = waiting.pop()
        for user in carrier.users:
            if user.target in _READERS:
                yield user, carrier
            if user.target in _ON_THE_WAY and user not in seen:
                seen.add(user)
                waiting.append(user)
