"""Who reads a concatenation: only what attention reads is a cache, and may get the strides of one."""

from __future__ import annotations

import torch
from torch import fx

from graphopt import ops, views
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
    seen, waiting = {node}, [node]
    while waiting:
        for user in waiting.pop().users:
            if user.target in _READERS:
                return True
            if user.target in _ON_THE_WAY and user not in seen:
                seen.add(user)
                waiting.append(user)
    return False
