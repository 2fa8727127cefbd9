"""Merge the quantised linears that read one input and share a scheme.

    q = graphopt.quantized_linear(x, [q0, q1], bias, "int8");  k = graphopt.quantized_linear(x, [k0, k1],
    None, "int8")
becomes
    all = graphopt.parallel_quantized_linear(x, [q0, q1, k0, k1], [bias, None], "int8");  q = all[0];  k =
    all[1]

The packed weights stay separate tensors. A linear whose bias is computed in the graph, or whose packed weight
is not made from a weight of the model, stays out: it might need the result of another one.
"""

from __future__ import annotations

import operator

from torch import fx

from graphopt import edit, views
from graphopt.pipeline import graph_pass
from graphopt.quantization import operations


@graph_pass(exactness="rounding", stage="quantize", training=False)
def merge_quantized_linears(graph_module: fx.GraphModule) -> int:
    """Replace groups of two or more quantised linears of one input by one
    `graphopt.parallel_quantized_linear`."""
    groups: dict[tuple[fx.Node, str], list[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        if node.target is not operations.quantized_linear:
            continue
        if _reads_only_weights(node):
            groups.setdefault((node.args[0], node.args[3]), []).append(node)
        else:
            edit.refuse(node, "its weight or bias is computed in the graph")
    return sum(_merge(graph_module, group) for group in groups.values() if len(group) > 1)


def _reads_only_weights(node: fx.Node) -> bool:
    _, parts, bias, _ = node.args
    packed = all(
        part.target is operator.getitem
        and part.args[0].target is operations.quantize_weight
        and views.is_constant_input(part.args[0].args[0])
        for part in parts
    )
    return packed and (bias is None or bias.op == "placeholder")


def _merge(graph_module: fx.GraphModule, group: list[fx.Node]) -> int:
    first = group[0]
    x, _, _, scheme = first.args
    parts = [part for node in group for part in node.args[1]]
    for ready in (*dict.fromkeys(part.args[0] for part in parts), *dict.fromkeys(parts)):
        first.prepend(ready)
    with edit.rewriting(graph_module, first) as rewrite:
        biases = [node.args[2] for node in group]
        merged = rewrite.call(operations.parallel_quantized_linear, x, parts, biases, scheme)
        for index, node in enumerate(group):
            rewrite.replace(node, rewrite.call(operator.getitem, merged, index))
    return rewrite.applied
