"""Grow a KV cache by writing the new rows behind the old ones instead of copying both.

    grown = cat([past, new], 2);  ... attention(q, grown, ...);  return grown
becomes
    room = graphopt.kv_reserve(past, n, 2)
    grown = slice_scatter(room, new, 2, S, S + n);  ... attention(q, grown, ...)
    copy_(room, grown);  return grown

`kv_reserve` runs before the compiled graph (`runtime/kv.py`): it gives a longer view of the memory of
`past`, so that what is left of the concatenation is one write of the new rows, and the graph returns the
view itself. Rows of `past` are never written, so `past` may be read anywhere in the graph. The result has
other strides than the concatenation: those of a cache kept as [S, B, H, D], which do not change as it grows.
Strides are the caller's, so only what attention (or a product) reads in this graph is taken for a cache.

Idea: append on slices as in Go; others copy the whole cache for each token (huggingface/transformers#37908).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt import edit, ops, views
from graphopt.passes.kv_cache.lengths import length_node
from graphopt.passes.kv_cache.readers import is_attended
from graphopt.passes.kv_cache.room import move_into
from graphopt.pipeline import graph_pass

aten = torch.ops.aten


@graph_pass(exactness="rounding", stage="kv_cache", training=False)
def append_in_place(graph_module: fx.GraphModule) -> int:
    """Replace `cat([past, new])` of returned caches by a write into reserved room."""
    count = 0
    grown: set[fx.Node] = set()
    for node in list(graph_module.graph.nodes):
        if not _is_growing_cache(graph_module, node):
            continue
        past, new = node.args[0][0], node.args[0][1:]
        reason = _why_not(node, past, new)
        if not reason and past in grown:
            reason = "the cache grows twice in one graph"
        if reason:
            edit.refuse(node, reason)
            continue
        applied = _rewrite(graph_module, node, past, new)
        if applied:
            grown.add(past)
        count += applied
    return count


def _is_growing_cache(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node joins an input with something else and is returned, whole or in part."""
    if node.target is not aten.cat.default or len(node.args[0]) < 2:  # type: ignore[arg-type]
        return False
    value = node.meta["val"]
    if value.dim() < 3 or not value.dtype.is_floating_point:
        return False
    parts: Any = node.args[0]
    returned = graph_module.graph.output_node().all_input_nodes
    return any(part.meta.get("role") == "input" for part in parts) and any(
        views.root(output) is node for output in returned
    )


def _why_not(node: fx.Node, past: fx.Node, new: list[fx.Node]) -> str:
    value = past.meta["val"]
    if past.meta.get("role") != "input":
        return "the first part of the concatenation is not the cache that was passed in"
    if any(part.meta["val"].dtype != value.dtype for part in new):
        return "the cache and the new rows have different types"
    if any(user.target in _MUTATIONS and user.args[0] is past for user in past.users):
        return "the graph writes into the cache that was passed in"
    if value.dim() != node.meta["val"].dim():
        return "the cache that was passed in is empty"
    if not is_attended(node):
        return "no attention and no product reads it here: it may be no cache, and its strides are the caller's"
    return ""


_MUTATIONS = (aten.copy_.default, aten.set_.source_Tensor, aten.resize_.default)


def _rewrite(graph_module: fx.GraphModule, node: fx.Node, past: fx.Node, new: list[fx.Node]) -> int:
    rank = node.meta["val"].dim()
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    assert isinstance(given, int)
    dim = given % rank
    with edit.rewriting(graph_module, node) as rewrite:
        rows = new[0] if len(new) == 1 else rewrite.call(aten.cat.default, new, dim)
        start = length_node(rewrite, past.meta["val"].shape[dim])
        count = length_node(rewrite, rows.meta["val"].shape[dim])
        end = length_node(rewrite, node.meta["val"].shape[dim])
        if start is None or count is None or end is None:
            edit.refuse(node, "its length cannot be computed from the integer inputs of the graph")
            return 0
        room = rewrite.call(ops.kv_reserve, past, count, dim)
        reason = move_into(rewrite, node, room, rows, dim, start, end)
        if reason:
            edit.refuse(node, reason)
    return rewrite.applied
