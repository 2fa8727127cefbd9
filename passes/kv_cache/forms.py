"""Rewrite growing caches, as `append_in_place` leaves them, to a form of their own that attention reads.

    room = graphopt.kv_reserve(k_past, n, 2)
    k = slice_scatter(room, new, 2, S, S + n);  copy_(room, k)          # and v likewise
    out = graphopt.attention(q, k, v, mask);  return k, v
becomes, where `form` names the operations of the form,
    k_a, k_b, k_room = form.reserve(k_past, n)
    k_tail = slice_scatter(k_room, new, 2, TAIL, TAIL + n);  copy_(k_room, k_tail)
    out = form.attention(q, k_a, k_b, k_tail, v_a, v_b, v_tail, mask, S + n)
    return form.cache(k_a, k_b, k_tail, S + n), ...

A graph that starts caches attends to the rows as they are and returns `form.start(k)`. Keys and values of one attention
are rewritten together or not at all.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from graphopt import edit, ops, views
from graphopt.lowering import arguments
from graphopt.passes.kv_cache.room import is_in_room, room_of, writer_of

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Form:
    """One form of caches. option: the option that asks for it. unsupported_reason: why a cache cannot have it, or "".

    how: what its attention is told besides; how_part: what the other operations are told, of keys (True) and of values.
    """

    option: str
    operations: ops.CacheOperations
    unsupported_reason: Callable[[Tensor], str]
    how: tuple[Any, ...] = ()
    how_part: Callable[[bool], tuple[Any, ...]] = lambda keys: ()


def rewrite_caches(graph_module: fx.GraphModule, form: Form) -> int:
    """Rewrite each attention over caches that live in reserved room, and what the graph returns of them."""
    count = 0
    for node in list(graph_module.graph.nodes):
        if node.target in (ops.kv_reserve, ops.kv_allocate) and not _is_attended(node):
            edit.refuse(node, "no attention that graphopt recognises reads it: it stays a plain tensor")
        if node.target is not ops.attention:
            continue
        if not all(map(is_in_room, node.args[1:3])):
            if any(map(_is_fixed_cache, node.args[1:3])):
                edit.refuse(
                    node, f"its cache has a fixed size: {form.option} is for growing caches, such as DynamicCache"
                )
            continue
        k, v = node.args[1:3]
        reason = _why_not(node, k, v, form)
        if reason:
            edit.refuse(node, reason)
            continue
        started = room_of(k).target is ops.kv_allocate
        replaced = (node, *(part for cache in (k, v) for part in (writer_of(cache), cache, room_of(cache))))
        with edit.rewriting(graph_module, node) as rewrite:
            read = (_start if started else _continue)(rewrite, node, k, v, form)
            rewrite.replace(node, read)
        if rewrite.applied:
            # Not left to be found dead: nodes that take memory or write count as impure.
            for dead in replaced:
                graph_module.graph.erase_node(dead)
        count += rewrite.applied
    return count


def _is_attended(room: fx.Node) -> bool:
    caches = [user for user in room.users if is_in_room(user)]
    return any(user.target is ops.attention for cache in caches for user in cache.users)


def _is_fixed_cache(node: Any) -> bool:
    """Whether the node is an input with rows written into it, as transformers' StaticCache makes it."""
    written = views.root(node)
    if written.target not in (aten.index_copy.default, aten.index_put.default):
        return False
    past = written.args[0]
    return isinstance(past, fx.Node) and past.meta.get("role") == "input"


def _why_not(attention: fx.Node, k: fx.Node, v: fx.Node, form: Form) -> str:
    if k is v or room_of(k).target is not room_of(v).target:
        return "its keys and values are not caches of their own"
    for cache in (k, v):
        room = room_of(cache)
        if cache.args[2] != 2:
            return "the cache grows along another dimension than the length of [batch, heads, length, size]"
        reason = form.unsupported_reason(cache.meta["val"])
        if reason:
            return reason
        if set(room.users) != {cache, writer_of(cache)}:
            return "a window of the cache is returned: a sliding-window cache is short already"
        others = [user for user in cache.users if user not in (attention, writer_of(cache)) and user.op != "output"]
        if others:
            return f"the cache is also read by {others[0].target}"
    return ""


def _start(rewrite: edit.Rewrite, attention: fx.Node, k: fx.Node, v: fx.Node, form: Form) -> fx.Node:
    """The attention of a graph that starts the caches; what it returns of them gets its form behind all else."""
    for cache, keys in ((k, True), (v, False)):
        made = rewrite.call_last(form.operations.start, cache.args[1], *form.how_part(keys))
        rewrite.replace(cache, made, same_layout=False)
    q, _, _, *rest = attention.args
    return rewrite.call(ops.attention, q, k.args[1], v.args[1], *rest, **attention.kwargs)


def _continue(rewrite: edit.Rewrite, attention: fx.Node, k: fx.Node, v: fx.Node, form: Form) -> fx.Node:
    """The attention of a graph that was given the caches."""
    reserve, cached, _, attend, shown = form.operations
    parts: list[fx.Node] = []
    for cache, keys in ((k, True), (v, False)):
        past, count, *_ = room_of(cache).args
        made = rewrite.call(reserve, past, count, *form.how_part(keys))
        stored, numbers, tail = (rewrite.call(operator.getitem, made, index) for index in range(3))
        end = rewrite.call(operator.add, count, shown) if isinstance(count, fx.Node) else count + shown  # type: ignore[operator]
        moved = rewrite.call(aten.slice_scatter.default, tail, cache.args[1], 2, shown, end)
        rewrite.call_last(aten.copy_.default, tail, moved)
        returned = rewrite.call_last(cached, stored, numbers, moved, cache.args[4], *form.how_part(keys))
        rewrite.replace(cache, returned, same_layout=False)
        parts += [stored, numbers, moved]
    given = arguments(attention)
    flags = {name: given[name] for name in ("is_causal", "scale", "softcap", "window", "nan_rows")}
    return rewrite.call(attend, given["q"], *parts, given["mask"], k.args[4], *form.how, **flags)
