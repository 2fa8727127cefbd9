"""Let a cache live in reserved memory: new rows are written there, and later nodes learn of its strides."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt import edit, ops, views

aten = torch.ops.aten


def move_into(
    rewrite: edit.Rewrite, node: fx.Node, room: fx.Node, rows: fx.Node, dim: int, start: Any, end: Any
) -> str:
    """Replace `node` by `room` with `rows` written to [start, end) of `dim`; "", or the reason why not.

    Values of later nodes that depend on the strides of `node` are brought up to date.
    """
    graph_module = rewrite.graph_module
    moved = rewrite.call(aten.slice_scatter.default, room, rows, dim, start, end)
    changed = views.consequences(graph_module, node, moved.meta["val"])
    if isinstance(changed, str):
        return changed
    for window in _returned_windows(graph_module, node, dim):
        bounds = (*window.args[2:], None, None)[:2]
        rewrite.replace(window, rewrite.call(ops.kv_window, room, dim, *bounds), same_layout=False)
    rewrite.call_last(aten.copy_.default, room, moved)
    rewrite.replace(node, moved, same_layout=False)
    if rewrite.permitted:
        for later, value in changed.items():
            later.meta["val"] = value
    return ""


def _returned_windows(graph_module: fx.GraphModule, node: fx.Node, dim: int) -> list[fx.Node]:
    """Slices of `node` along `dim` that nothing reads in the graph: what a sliding-window layer keeps."""
    output = graph_module.graph.output_node()
    return [
        user
        for user in node.users
        if user.target is aten.slice.Tensor
        and user.args[1:2] == (dim,)
        and len(user.args) < 5
        and list(user.users) == [output]
    ]


def is_in_room(node: Any) -> bool:
    """Whether the node is reserved room with new rows written behind the old ones, as `move_into` leaves it."""
    if not isinstance(node, fx.Node) or node.target is not aten.slice_scatter.default:
        return False
    return room_of(node).target in (ops.kv_reserve, ops.kv_allocate)


def room_of(cache: fx.Node) -> fx.Node:
    """The reserved room that the cache lies in."""
    room = cache.args[0]
    assert isinstance(room, fx.Node)
    return room


def writer_of(cache: fx.Node) -> fx.Node:
    """The node that copies the cache into its room."""
    return next(user for user in cache.users if user.target is aten.copy_.default and user.args[0] is cache.args[0])
