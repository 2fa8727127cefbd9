"""Write the first rows of a KV cache into memory with room to grow, so that the first append copies nothing.

    keys = clone(k);  ... attention(q, keys, ...);  return keys        # in the model: cat([empty, k], 2)
becomes
    room = graphopt.kv_allocate([B, H, S, D], 2, ...)
    keys = slice_scatter(room, k, 2, 0, S);  ... attention(q, keys, ...)
    copy_(room, keys);  return keys

A cache is told from other results by its origin: a concatenation with nothing. That is known only until
the copy is removed as doing nothing, so this pass runs first.
"""

from __future__ import annotations

import torch
from torch import fx

from graphopt import edit, ops, views
from graphopt.passes.kv_cache.lengths import length_node
from graphopt.passes.kv_cache.readers import is_attended, is_cross_attended
from graphopt.passes.kv_cache.room import move_into
from graphopt.pipeline import graph_pass

aten = torch.ops.aten


@graph_pass(exactness="rounding", stage="kv_cache", training=False, before="canonicalize")
def start_with_room(graph_module: fx.GraphModule) -> int:
    """Give caches that a graph starts, and returns, room to grow."""
    count = 0
    for node in dict.fromkeys(map(views.root, graph_module.graph.output_node().all_input_nodes)):
        if not _is_new_cache(node):
            continue
        if is_cross_attended(node):
            edit.refuse(node, "cross-attention reads it: such a cache does not grow")
            continue
        count += _rewrite(graph_module, node)
    return count


def _is_new_cache(node: fx.Node) -> bool:
    # The name is compared: AOTAutograd's graphs may hold copies of the operator objects in their meta.
    started = node.target is aten.clone.default and str(node.meta.get("original_aten")) == "aten.cat.default"
    value = node.meta["val"]
    return started and value.dim() == 4 and value.dtype.is_floating_point and is_attended(node)


def _rewrite(graph_module: fx.GraphModule, node: fx.Node) -> int:
    value, dim = node.meta["val"], 2
    with edit.rewriting(graph_module, node) as rewrite:
        size = [length_node(rewrite, length) for length in value.shape]
        if None in size:
            edit.refuse(node, "its size cannot be computed from the integer inputs of the graph")
            return 0
        room = rewrite.call(ops.kv_allocate, size, dim, dtype=value.dtype, device=value.device)
        rows = node.args[0]
        assert isinstance(rows, fx.Node)
        reason = move_into(rewrite, node, room, rows, dim, 0, size[dim])
        if reason:
            edit.refuse(node, reason)
    return rewrite.applied
