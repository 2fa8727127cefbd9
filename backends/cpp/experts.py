"""Products of a mixture of experts on the compiled kernels: `torch.ops.graphopt_cpp.grouped_linear`.

Each expert that has rows is a linear of them (`linear.py`): few rows read its weight at memory speed.
"""

from __future__ import annotations

import torch
from torch import fx

from graphopt import edit, grouped, shapes
from graphopt.backends.cpp import operands
from graphopt.lowering import Choice

NAME = "cpp.grouped_linear"


def choose(graph_module: fx.GraphModule) -> list[Choice]:
    """Let the kernel compute the grouped products that it takes; the others stay as they are. In place."""
    return [_choice(graph_module, product) for product in grouped.products(graph_module)]


def unsupported_reason(product: fx.Node) -> str | None:
    """Why the kernel cannot compute a grouped product; None if it can."""
    other = grouped.why_other(product)
    if other:
        return other
    x, experts, _ = grouped.operands(product)
    reason = operands.declined([x.meta["val"], experts.meta["val"], product.meta["val"]])
    if reason is None and not shapes.same(experts.meta["val"].stride(1), 1):
        return "the experts are kept as [E, K, N]"
    return reason


def _choice(graph_module: fx.GraphModule, product: fx.Node) -> Choice:
    reason = unsupported_reason(product)
    op = str(product.target)
    if reason is not None:
        return Choice(product.name, op, "torch", ((NAME, reason),))
    x, experts, ends = grouped.operands(product)
    with edit.rewriting(graph_module, product) as rewrite:
        turned = rewrite.call(torch.ops.aten.permute.default, experts, [0, 2, 1])
        rewrite.replace(product, rewrite.call(torch.ops.graphopt_cpp.grouped_linear.default, x, turned, ends))
    return Choice(product.name, op, NAME)
