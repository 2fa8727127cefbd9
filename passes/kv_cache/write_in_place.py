"""Write new rows into the room of a cache, for targets that make no write of `slice_scatter` and `copy_` themselves.

    moved = slice_scatter(room, rows, 2, S, S + n);  ... attention(q, moved, ...)
    copy_(room, moved);  return moved
becomes
    moved = graphopt.kv_write(room, rows, 2, S, S + n);  ... attention(q, moved, ...)
    return moved

So it is with the cache of fixed size that a caller passes in (transformers' StaticCache), and places on its device:

    moved = index_copy(past, 2, places, rows);  ... copy_(past, moved)
becomes
    moved = graphopt.kv_write_at(past, rows, 2, places)

Inductor finds such pairs by itself. Elsewhere the scatter would copy the whole cache, and the copy would do so again.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from graphopt import edit, ops, views
from graphopt.pipeline import graph_pass
from graphopt.quantization.cache_operations import kv_quantized_reserve
from graphopt.runtime.kv_paged import kv_paged_reserve

aten = torch.ops.aten
_ROOM = (ops.kv_reserve, ops.kv_allocate, kv_paged_reserve, kv_quantized_reserve)


@graph_pass(exactness="bitwise", stage="fuse", training=False)
def write_in_place(graph_module: fx.GraphModule) -> int:
    """Make one write of the new rows out of each scatter into a cache that is copied back."""
    count = 0
    for copy in list(graph_module.graph.nodes):
        if copy.target is not aten.copy_.default or copy.users:
            continue
        room, moved = copy.args[:2]
        write = _write_for(room, moved)
        if write is None:
            continue
        others = [user for user in room.users if user not in (moved, copy) and user.target is not ops.kv_window]
        if others:
            edit.refuse(copy, f"{others[0].target} reads the room before the rows are written")
            continue
        if write[0] is ops.kv_write_at and moved in map(views.root, graph_module.graph.output_node().all_input_nodes):
            edit.refuse(copy, "the graph returns the cache as well: its caller would be given its own memory")
            continue
        with edit.rewriting(graph_module, moved) as rewrite:
            rewrite.replace(moved, rewrite.call(*write))
        if rewrite.applied:
            graph_module.graph.erase_node(copy)
            graph_module.graph.erase_node(moved)
        count += rewrite.applied
    return count


def _write_for(room: fx.Node, moved: fx.Node) -> tuple[Any, ...] | None:
    """The operation that writes into `room` what makes `moved` of it, and its arguments."""
    if moved.args[:1] != (room,):
        return None
    if moved.target is aten.slice_scatter.default and is_room(room):
        return (ops.kv_write, *moved.args)
    if moved.target is aten.index_copy.default and room.meta.get("role") in ("input", "buffer"):
        _, dim, places, rows = moved.args
        assert isinstance(places, fx.Node)
        if places.meta["val"].dim() == 1 and room.meta["val"].dim() != 0:
            return (ops.kv_write_at, room, rows, dim, places)
    return None


def is_room(node: fx.Node) -> bool:
    """Whether the node is memory that was handed out for new rows."""
    if node.target is operator.getitem:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node.target in _ROOM
