"""Give growing KV caches a fixed capacity: memory for all their rows at once, and an error for one row more.

    room = graphopt.kv_reserve(past, n, 2)
becomes
    room = graphopt.kv_reserve(past, n, 2, capacity)

Runs where the options say `kv_capacity`: a service that must not run out of memory in the middle of an answer takes
what the longest one needs at the start.
"""

from __future__ import annotations

from torch import fx

from graphopt import edit, ops
from graphopt.pipeline import graph_pass


@graph_pass(exactness="bitwise", stage="kv_cache", training=False, after="append_in_place")
def fix_capacity(graph_module: fx.GraphModule, *, capacity: int | None = None) -> int:
    """Write the capacity that the options give into every operation that takes memory for a cache."""
    count = 0
    for node in list(graph_module.graph.nodes):
        if node.target not in (ops.kv_reserve, ops.kv_allocate) or capacity is None:
            continue
        if "capacity" in node.kwargs:
            continue
        with edit.rewriting(graph_module, node) as rewrite:
            rewrite.replace(node, rewrite.call(node.target, *node.args, **node.kwargs, capacity=capacity))
        if rewrite.applied:
            # Not left to be found dead: taking memory twice is not the same as once, so such nodes count as impure.
            graph_module.graph.erase_node(node)
        count += rewrite.applied
    return count
