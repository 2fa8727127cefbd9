"""Write what a decode step does with heads as steps on rows, which chains take in: a whole step is one call then.

    q = rope(permute(view(rows)), cos, sin)
    keys = slice_scatter(room, rope(permute(view(new)), cos, sin), 2, past, past + 1)
    permute(attention(q, keys, values)).view(...)

becomes, with rows as linears give and take them ([B, S, heads * D]),

    turned = chain([rows], [cos, sin], [], "rope v0 w0 w1 64 0; out v1")[0];  ...
    chain([turned, turned_keys, new_values], [], [room, other_room], "attend v0 v1 v2 r0 r1 - 0.125 0 0 0; out v3")[0]

Only where all of it is read by nothing else: a cache that has other readers in the graph is left as it is.
"""

from __future__ import annotations

import dataclasses
import operator

import torch
from torch import Tensor, fx

from graphopt import edit, ops, shapes, views
from graphopt.backends.cpp.chain_steps import Operand, Step, Word, is_rows, maker, rows, step_of, weight, write
from graphopt.lowering import arguments

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class _Heads:
    """Rows [B, S, H * size] of a linear whose heads a node shows as [B, H, S, size], and what is done on them."""

    rows: fx.Node
    size: int
    steps: tuple[tuple[str, tuple[Word, ...]], ...] = ()


@dataclasses.dataclass(frozen=True)
class _Cache:
    """New rows at the end of a room: the room, the node that shows both, and the rows' heads."""

    room: fx.Node
    written: fx.Node
    heads: _Heads


def write_as_rows(graph_module: fx.GraphModule) -> None:
    """Rewrite each attention over caches that the graph itself has appended to, between linears. In place."""
    for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.graphopt_cpp.attention.default):
        given = arguments(node)
        query, keys, values = _heads_of(given["q"], node), _appended(given["k"], node), _appended(given["v"], node)
        if query is None or keys is None or values is None or given["is_causal"] or given["k"] is given["v"]:
            continue
        readers = _readers_as_rows(node)
        if not readers or not _fit(query, keys, values):
            continue
        with edit.rewriting(graph_module, node) as rewrite:
            q, k, v = (_stepped(rewrite, heads) for heads in (query, keys.heads, values.heads))
            mask = None if given["mask"] is None else weight(given["mask"])
            numbers = (given["scale"], given["softcap"], given["window"], given["nan_rows"])
            rooms = Operand("r", (keys.room,)), Operand("r", (values.room,))
            made = _call(rewrite, Step("attend", (rows(q), rows(k), rows(v), *rooms, mask, *numbers)))
            for reader in readers:
                rewrite.replace(reader, made)
            for cache in (keys, values):
                rewrite.replace(cache.written, cache.room)
        if rewrite.applied:
            for cache in (keys, values):
                for user in [user for user in cache.room.users if user.target is aten.copy_.default]:
                    graph_module.graph.erase_node(user)
    edit.eliminate_dead_code(graph_module)


def _fit(query: _Heads, *caches: _Cache) -> bool:
    """Whether all rows are of one leading shape, and rows and rooms of one dtype."""
    all_rows = [query.rows, *(cache.heads.rows for cache in caches)]
    first = query.rows.meta["val"]
    alike = all(r.meta["val"].shape[:-1] == first.shape[:-1] and r.meta["val"].dtype == first.dtype for r in all_rows)
    return alike and all(cache.room.meta["val"].dtype == first.dtype for cache in caches)


def _call(rewrite: edit.Rewrite, step: Step) -> fx.Node:
    return rewrite.call(operator.getitem, rewrite.call(torch.ops.graphopt_cpp.chain.default, *write(step)), 0)


def _stepped(rewrite: edit.Rewrite, heads: _Heads) -> fx.Node:
    made = heads.rows
    for name, words in heads.steps:
        made = _call(rewrite, Step(name, (rows(made), *words)))
    return made


def _appended(node: fx.Node, reader: fx.Node) -> _Cache | None:
    """The cache that `reader` sees, if it is a room whose last rows the graph makes, for it and its output alone."""
    if node.target is not aten.slice_scatter.default or node.args[0].target is not ops.kv_reserve:  # type: ignore[union-attr]
        return None
    given = arguments(node)
    room, new = given["self"], given["src"]
    copies = [user for user in room.users if user is not node]
    if any(user.target is not aten.copy_.default or user.args[:2] != (room, node) for user in copies):
        return None
    if any(user not in (reader, *copies) and user.op != "output" for user in node.users):
        return None
    start, end = (
        value.meta["val"] if isinstance(value, fx.Node) else value for value in (given["start"], given["end"])
    )
    count, length = new.meta["val"].shape[2], room.meta["val"].shape[2]
    if given["dim"] != 2 or given["step"] != 1 or start is None or end is None:
        return None
    if not shapes.same(end, length) or not shapes.same(start + count, length):
        return None
    heads = _heads_of(new, node)
    return None if heads is None else _Cache(room, node, heads)


def _heads_of(node: fx.Node, reader: fx.Node) -> _Heads | None:
    """The heads that `reader`, and nothing else, reads from a linear's rows; perhaps normalised and turned before."""
    turn: tuple[tuple[str, tuple[Word, ...]], ...] = ()
    size = node.meta["val"].shape[-1]
    if node.target is ops.rope:
        given = arguments(node)
        if set(node.users) != {reader} or not all(_turns(given[name], node) for name in ("cos", "sin")):
            return None
        turn = (("rope", (weight(given["cos"]), weight(given["sin"]), size, given["interleaved"])),)
        node = given["x"]
    shown = _shown_rows(node)
    if shown is not None and _comes_from_a_linear(shown):
        return _Heads(shown, size, turn)
    normed = views.root(node)
    if normed.target is not ops.rms_norm or not _shows(node, normed):
        return None
    given = arguments(normed)
    scale, x = given["weight"], views.root(given["x"])
    if not is_rows(x) or not _comes_from_a_linear(x) or not _dense(given["x"], x) or not _dense(normed, x):
        return None
    if scale is not None and (scale.meta["val"].dtype != x.meta["val"].dtype or not scale.meta["val"].is_contiguous()):
        return None
    # Of each head, or, where it stands before the rows are seen as heads, of all of a row (OLMo2).
    numbers = given["eps"], given["weight_offset"], given["cast_first"], normed.meta["val"].shape[-1]
    norm = ("rms_norm", (None if scale is None else weight(scale), *numbers))
    return _Heads(x, size, (norm, *turn))


def _turns(node: fx.Node, turned: fx.Node) -> bool:
    """Whether cos or sin is one row for each position, perhaps of each sequence, and the same for all heads."""
    value, x = node.meta["val"], turned.meta["val"]
    if value.dim() != 4 or value.dtype != x.dtype or value.device.type != "cpu" or not value.is_contiguous():
        return False
    batch, heads, positions, size = value.shape
    return bool(heads == 1 and size == x.shape[3] and positions == x.shape[2] and batch in (1, x.shape[0]))


def _shown_rows(node: fx.Node) -> fx.Node | None:
    """The rows [B, S, H * D] that a node shows as heads [B, H, S, D] in their very places."""
    root = views.root(node)
    return root if is_rows(root) and _shows(node, root) else None


def _shows(node: fx.Node, root: fx.Node) -> bool:
    """Whether a view [B, H, S, D] has the elements of dense rows in the order [B, S, H, D]."""
    value, whole = node.meta["val"], root.meta["val"]
    if value.dim() != 4 or not all(isinstance(size, int) for size in value.shape) or not _dense(root, root):
        return False
    b, h, s, d = value.shape
    wanted = s * h * d, d, h * d, 1
    strides = (
        stride == want or size == 1 for size, stride, want in zip(value.shape, value.stride(), wanted, strict=True)
    )
    in_rows = whole.dim() in (3, 4) and whole.shape[:2] == (b, s)
    return (
        in_rows and value.numel() == whole.numel() and value.storage_offset() == whole.storage_offset() and all(strides)
    )


def _dense(node: fx.Node, rows_of: fx.Node) -> bool:
    """Whether a node's elements are as many as those of rows, and dense."""
    value = node.meta["val"]
    return isinstance(value, Tensor) and value.is_contiguous() and value.numel() == rows_of.meta["val"].numel()


def _comes_from_a_linear(node: fx.Node) -> bool:
    step = step_of(maker(node))
    return step is not None and step.is_linear


def _readers_as_rows(attention: fx.Node) -> list[fx.Node]:
    """The views [B, S, H * D] of an attention's result, if it has no other readers and a linear reads one of them."""
    b, h, s, d = attention.meta["val"].shape
    found: list[fx.Node] = []
    seen = [attention]
    while seen:
        for user in seen.pop().users:
            if not views.is_view(user):
                return []
            in_rows = user.meta["val"].shape == (b, s, h * d) and user.meta["val"].is_contiguous()
            (found if in_rows and is_rows(user) else seen).append(user)
    steps = [step_of(reader) for view in found for reader in view.users]
    return found if any(step is not None and step.is_linear for step in steps) else []
