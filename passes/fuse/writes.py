"""Writes of new rows into caches, as the end of the region that makes the rows: no launch of their own is left.

    k = rope(k);  keys = kv_write(room, k, 2, S, S + n);  y = attention(q, keys, ...)

becomes a region that computes k and stores it within `room`, and one of attention that reads the room. The store is
an index map: where memory would be allocated for k, element (b, h, s, d) goes to place (b, h, S + s, d) of the room,
or, of a cache of fixed size, to (b, h, places[s], d), where `places` is read on the device (`kv_write_at`). What reads
the room as it is then waits for another launch: programs of one launch do not wait for each other's stores.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from graphopt import edit, ops, shapes
from graphopt.passes.kv_cache.write_in_place import is_room
from graphopt.row_ops import DTYPES


def is_write(node: Node) -> bool:
    """May the node be the end of a region?"""
    return node.target in ops.WRITES and not _why_alone(node)


def refuse_others(graph: Graph) -> None:
    """Say of each write that stays a call of its own why it does."""
    for node in graph.nodes:
        if node.target in ops.WRITES and (reason := _why_alone(node)):
            edit.refuse(node, reason)


def rows_of_write(node: Node) -> Node:
    """The rows that a write stores."""
    rows = node.args[1]
    assert isinstance(rows, Node)
    return rows


def _why_alone(node: Node) -> str:
    room, rows, dim, *_ = node.args
    fixed = node.target is ops.kv_write_at
    assert isinstance(room, Node) and isinstance(rows, Node) and isinstance(dim, int)
    place, stored = room.meta["val"], rows.meta["val"]
    if not fixed and not is_room(room):
        return "its memory is not room that was handed out for new rows: others may show it"
    others = [user for user in room.users if user is not node and user.target is not ops.kv_window]
    if others:
        return f"{others[0].target} reads or writes the room as well"
    if stored.dtype != place.dtype or stored.dtype not in DTYPES or stored.device != place.device:
        return "its rows are of another dtype than the room, or lie on another device"
    sizes = [(a, b) for d, (a, b) in enumerate(zip(stored.shape, place.shape, strict=True)) if d != dim % place.dim()]
    if not all(shapes.same(a, b) for a, b in sizes):
        return "its rows are broadcast to their place"
    return ""
