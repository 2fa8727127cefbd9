"""Compute each symbolic size once, from where it is known first.

    a = sym_size(x, 0);  b = a * 8;  c = 8 * s0;  view(y, [b]);  view(z, [c])
becomes, when the placeholder s0 is the size of x
    b = s0 * 8;  view(y, [b]);  view(z, [b])

Sizes are compared as sympy expressions in the graph's symbols, so spelling and order of the arithmetic do not matter.
Nothing is specialised: an expression that has no earlier node stays as it is.
"""

from __future__ import annotations

import sympy
import torch
from torch import fx

from graphopt import edit, shapes
from graphopt.pipeline import graph_pass


@graph_pass(exactness="bitwise", stage="canonicalize")
def simplify_shapes(graph_module: fx.GraphModule) -> int:
    """Let every symbolic size use the first node that has its value."""
    known: dict[sympy.Expr, fx.Node] = {}
    count = 0
    for node in list(graph_module.graph.nodes):
        value = node.meta.get("val")
        if not isinstance(value, torch.SymInt):
            continue
        first = known.setdefault(sympy.expand(shapes.expression(value)), node)
        if first is node or node.op == "placeholder" or not node.users:
            continue
        with edit.rewriting(graph_module, node) as rewrite:
            rewrite.replace(node, first)
        count += rewrite.applied
    return count
