"""Merge the linears that read one input, whatever their number, widths and biases.

    q = graphopt.linear(x, wq, bq);  k = graphopt.linear(x, wk);  v = graphopt.linear(x, wv)
becomes
    all = graphopt.parallel_linear(x, [wq, wk, wv], [bq, None, None]);  q = all[0];  k = all[1];  v = all[2]

The weights stay separate tensors, so that no second copy of them lasts; a lowering may read them in one sweep.
A linear whose weight or bias depends on the result of another one of the group stays out of it.
"""

from __future__ import annotations

import operator

from torch import fx

from graphopt import edit, ops
from graphopt.pipeline import graph_pass


@graph_pass(exactness="rounding", stage="fuse", training=False)
def merge_parallel_linears(graph_module: fx.GraphModule) -> int:
    """Replace groups of two or more linears of one input by one `graphopt.parallel_linear`."""
    position = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    by_input: dict[fx.Node, list[fx.Node]] = {}
    for node in position:
        if node.target is ops.linear:
            by_input.setdefault(node.args[0], []).append(node)
    return sum(_merge(graph_module, group, position) for group in by_input.values() if len(group) > 1)


def _merge(graph_module: fx.GraphModule, linears: list[fx.Node], position: dict[fx.Node, int]) -> int:
    """Merge those of the linears, given in graph order, whose weights can be ready before the first one."""
    first, group = linears[0], []
    needed_before: set[fx.Node] = set()
    for node in linears:
        needed = _later_ancestors(node, first, position)
        if any(ancestor in linears or edit.is_impure(ancestor) for ancestor in needed):
            edit.refuse(node, f"its weight or bias can be ready only after {first.name}")
            continue
        needed_before.update(needed)
        group.append(node)
    if len(group) < 2:
        return 0
    for ancestor in sorted(needed_before, key=position.__getitem__):
        first.prepend(ancestor)
    with edit.rewriting(graph_module, first) as rewrite:
        weights = [node.args[1] for node in group]
        biases = [node.args[2] if len(node.args) > 2 else None for node in group]
        merged = rewrite.call(ops.parallel_linear, first.args[0], weights, biases)
        for index, node in enumerate(group):
            rewrite.replace(node, rewrite.call(operator.getitem, merged, index))
    return rewrite.applied


def _later_ancestors(node: fx.Node, first: fx.Node, position: dict[fx.Node, int]) -> set[fx.Node]:
    """What must be computed for `node` and stands behind `first`."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if position[source] >= position[first] and source not in found:
                found.add(source)
                waiting.append(source)
    return found
