"""Keep the KV caches that a graph returns quantised, and let attention read the codes.

    room = graphopt.kv_reserve(k_past, n, 2)
    k = slice_scatter(room, new, 2, S, S + n);  copy_(room, k)          # and v likewise
    out = graphopt.attention(q, k, v, mask);  return k, v
becomes
    k_codes, k_params, k_room = graphopt.kv_quantized_reserve(k_past, n, "int8", True)
    k_tail = slice_scatter(k_room, new, 2, TAIL, TAIL + n);  copy_(k_room, k_tail)
    out = graphopt.attention_quantized(q, k_codes, k_params, k_tail, v_codes, v_params, v_tail, mask, S + n, "int8")
    return graphopt.kv_quantized_cache(k_codes, k_params, k_tail, S + n, "int8", True), ...

A graph that starts caches attends in full precision and returns `kv_quantize(k)`. Runs where the options say
`kv_dtype`; the layout and its source are those of `quantization.cache_operations`. Keys and values of one attention are
rewritten together or not at all.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from graphopt import edit, ops, views
from graphopt.lowering import arguments
from graphopt.pipeline import graph_pass
from graphopt.quantization import cache_operations as layout

aten = torch.ops.aten


@graph_pass(exactness="lossy", stage="kv_cache", training=False, after="append_in_place")
def quantize_cache(graph_module: fx.GraphModule, *, kind: str = "int8") -> int:
    """Rewrite each attention over caches that live in reserved room, and what the graph returns of them."""
    count = 0
    for node in list(graph_module.graph.nodes):
        if node.target in (ops.kv_reserve, ops.kv_allocate) and not _is_attended(node):
            edit.refuse(node, "no attention that graphopt recognises reads it: it stays in full precision")
        if node.target is not ops.attention:
            continue
        if not all(map(_is_cache, node.args[1:3])):
            if any(map(_is_fixed_cache, node.args[1:3])):
                edit.refuse(node, "its cache has a fixed size: kv_dtype is for growing caches, such as DynamicCache")
            continue
        k, v = node.args[1:3]
        reason = _why_not(node, k, v, kind)
        if reason:
            edit.refuse(node, reason)
            continue
        started = _room(k).target is ops.kv_allocate
        replaced = (node, *(part for cache in (k, v) for part in (_writer(cache), cache, _room(cache))))
        with edit.rewriting(graph_module, node) as rewrite:
            read = _start(rewrite, node, k, v, kind) if started else _continue(rewrite, node, k, v, kind)
            rewrite.replace(node, read)
        if rewrite.applied:
            # Not left to be found dead: nodes that take memory or write count as impure.
            for dead in replaced:
                graph_module.graph.erase_node(dead)
        count += rewrite.applied
    return count


def _is_cache(node: Any) -> bool:
    """Whether the node is reserved room with new rows written behind the old ones, as `append_in_place` leaves it."""
    if not isinstance(node, fx.Node) or node.target is not aten.slice_scatter.default:
        return False
    return _room(node).target in (ops.kv_reserve, ops.kv_allocate)


def _is_attended(room: fx.Node) -> bool:
    caches = [user for user in room.users if _is_cache(user)]
    return any(user.target is ops.attention for cache in caches for user in cache.users)


def _is_fixed_cache(node: Any) -> bool:
    """Whether the node is an input with rows written into it, as transformers' StaticCache makes it."""
    written = views.root(node)
    if written.target not in (aten.index_copy.default, aten.index_put.default):
        return False
    past = written.args[0]
    return isinstance(past, fx.Node) and past.meta.get("role") == "input"


def _room(cache: fx.Node) -> fx.Node:
    room = cache.args[0]
    assert isinstance(room, fx.Node)
    return room


def _why_not(attention: fx.Node, k: fx.Node, v: fx.Node, kind: str) -> str:
    if k is v or _room(k).target is not _room(v).target:
        return "its keys and values are not caches of their own"
    for cache in (k, v):
        room = _room(cache)
        if cache.args[2] != 2:
            return "the cache grows along another dimension than the length of [batch, heads, length, size]"
        reason = layout.unsupported_reason(cache.meta["val"], kind)
        if reason:
            return reason
        if set(room.users) != {cache, _writer(cache)}:
            return "a window of the cache is returned: a sliding-window cache is short already"
        others = [user for user in cache.users if user not in (attention, _writer(cache)) and user.op != "output"]
        if others:
            return f"the cache is also read by {others[0].target}"
    return ""


def _writer(cache: fx.Node) -> fx.Node:
    """The node that copies the cache into its room."""
    return next(user for user in cache.users if user.target is aten.copy_.default and user.args[0] is cache.args[0])


def _start(rewrite: edit.Rewrite, attention: fx.Node, k: fx.Node, v: fx.Node, kind: str) -> fx.Node:
    """The attention of a graph that starts the caches; what it returns of them is quantised behind all else."""
    for cache, keys in ((k, True), (v, False)):
        made = rewrite.call_last(layout.kv_quantize, cache.args[1], kind, keys)
        rewrite.replace(cache, made, same_layout=False)
    q, _, _, *rest = attention.args
    return rewrite.call(ops.attention, q, k.args[1], v.args[1], *rest, **attention.kwargs)


def _continue(rewrite: edit.Rewrite, attention: fx.Node, k: fx.Node, v: fx.Node, kind: str) -> fx.Node:
    """The attention of a graph that was given the caches."""
    parts: list[fx.Node] = []
    for cache, keys in ((k, True), (v, False)):
        past, count, *_ = _room(cache).args
        made = rewrite.call(layout.kv_quantized_reserve, past, count, kind, keys)
        codes, params, tail = (rewrite.call(operator.getitem, made, index) for index in range(3))
        end = rewrite.call(operator.add, count, layout.TAIL) if isinstance(count, fx.Node) else count + layout.TAIL  # type: ignore[operator]
        moved = rewrite.call(aten.slice_scatter.default, tail, cache.args[1], 2, layout.TAIL, end)
        rewrite.call_last(aten.copy_.default, tail, moved)
        returned = rewrite.call_last(layout.kv_quantized_cache, codes, params, moved, cache.args[4], kind, keys)
        rewrite.replace(cache, returned, same_layout=False)
        parts += [codes, params, moved]
    given = arguments(attention)
    how = {name: given[name] for name in ("is_causal", "scale", "softcap", "window", "nan_rows")}
    return rewrite.call(layout.attention_quantized, given["q"], *parts, given["mask"], k.args[4], kind, **how)
