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
from graphopt.passes.quantize import planned
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
        x, parts, bias, scheme = planned.arguments(node)
        if (bias is None or bias.op == "placeholder") and all(map(_is_made_from_a_weight, parts)):
            groups.setdefault((x, scheme), []).append(node)
        else:
            edit.refuse(node, "its weight or bias is computed in the graph")
    return sum(_merge(graph_module, group) for group in groups.values() if len(group) > 1)


def _is_made_from_a_weight(part: fx.Node) -> bool:
    """Whether a packed tensor depends on nothing but weights of the model."""
    if part.target is operator.getitem or part.target in (operations.quantize_weight, operations.input_scales):
        return all(map(_is_made_from_a_weight, part.all_input_nodes))
    return views.is_constant_input(part)


def _merge(graph_module: fx.GraphModule, group: list[fx.Node]) -> int:
    first = group[0]
    x, _, _, scheme = planned.arguments(first)
    parts = [part for node in group for part in planned.arguments(node)[1]]
    for ready in _in_order(graph_module, parts):
        first.prepend(ready)
    with edit.rewriting(graph_module, first) as rewrite:
        biases = [planned.arguments(node)[2] for node in group]
        merged = rewrite.call(operations.parallel_quantized_linear, x, parts, biases, scheme)
        for index, node in enumerate(group):
            rewrite.replace(node, rewrite.call(operator.getitem, merged, index))
    return rewrite.applied


def _in_order(graph_module: fx.GraphModule, parts: list[fx.Node]) -> list[fx.Node]:
    """The nodes that pack the given parts, in graph order."""
    needed, waiting = set(parts), list(parts)
    while waiting:
        sources = [node for node in waiting.pop().all_input_nodes if node.op == "call_function"]
        waiting.extend(node for node in sources if node not in needed)
        needed.update(sources)
    return [node for node in graph_module.graph.nodes if node in needed]
