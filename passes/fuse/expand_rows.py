"""Write composite operators as the row operators that they mean, so that fusion sees inside of them.

    native_layer_norm(x, [H], w, b, eps)  ->  var_mean, sub, add, rsqrt, mul, mul, add
    graphopt.rms_norm(x, w, eps)          ->  to_float, pow, mean, add, rsqrt, mul, to_bf16, mul

Linears and attention stay whole: they have kernels of their own. So do cache operations: they hand out memory, and
their meaning writes into it.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from graphopt import capture, edit, ops

aten = torch.ops.aten

_ROWS = (ops.rms_norm, ops.rope)
_COMPOSITES = (aten.native_layer_norm.default, aten._fused_rms_norm.default, aten._softmax.default)


def expand_rows(graph_module: GraphModule) -> int:
    """Expand every composite of rows; returns how many there were."""
    table = {op: f for op, f in capture.undecomposed().items() if op in _COMPOSITES}
    steps = {**capture.decompositions(), **table}
    count = 0
    for node in list(graph_module.graph.nodes):
        meaning = ops.meaning(node.target)
        function = meaning if node.target in _ROWS else (node.target if node.target in table else None)
        if function is None:
            continue
        with edit.rewriting(graph_module, node) as rewrite:
            rewrite.replace(node, rewrite.inline(function, *node.args, decompositions=steps, **node.kwargs))
        count += rewrite.applied
    edit.eliminate_dead_code(graph_module)
    return count
