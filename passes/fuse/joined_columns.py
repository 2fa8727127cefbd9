"""Readers of a product that need several of its columns at a time, in the product's own kernel.

    q = view(linear(x, w), [B, S, H, D]).permute([0, 2, 1, 3])
    y = add(mul(q, cos), mul(cat([neg(q[..., D / 2 :]), q[..., : D / 2]], -1), sin))

becomes one region: rotary embedding, or another join of columns. An element of y needs two columns of the product; the
kernel computes both in one program, each with an accumulator of its own, and stores the elements of y for both
(`columns.py`), so that nothing is computed twice. So do reductions over groups of columns, the norm of a head, or

    s = div(amax(abs(q), -1, True), 127);  codes = to_int8(round(div(q, s)))

One program then computes all columns of a group. With few rows it does not: the few programs that there would be draw
too little bandwidth, and a kernel of its own for the reduction may be the prologue of the product that reads it.

Taken are the readers of one result, elementwise operators, joins, reductions and the views between them, of which in
the end every stored one shows all of the product, or all groups; those that do not, and what is behind them, stay
outside.
"""

from __future__ import annotations

from collections.abc import Collection

import sympy
import torch
from torch.fx import Node

from graphopt import edit
from graphopt.columns import MOST_TOGETHER, columns_of, places, reduced_size, sizes_of
from graphopt.index_arithmetic import is_nonnegative
from graphopt.passes.fuse.groups import Group, Groups, consumers
from graphopt.passes.fuse.joining import FEW_ROWS, numel, widens, without
from graphopt.passes.fuse.worth import draws_too_little
from graphopt.row_ops import ELEMENTWISE, TOTALS, is_fusable, is_pick, is_view, reduced_dims

_JOIN = torch.ops.aten.cat.default


def absorb_joined(groups: Groups, group: Group, result: Node, longest: int) -> list[Node]:
    """Let the group of a product take the readers of one of its results, if they need several of its columns; returns
    those stored.

    longest: how many nodes a group may have.
    """
    readers = _readers(groups, result)
    reductions = [node for node in readers if node.target in TOTALS]
    for outside in ([], reductions) if reductions else ([],):
        members = without(outside, readers)
        if not _several(members):
            continue
        members = _showing_all(result, members)
        several = _several(members)
        if not several:
            continue
        stored, room = _read_outside(members), longest - len(group.nodes)
        reason = _why_not(result, members, stored)
        if not reason and len(members) > room:
            reason = f"the product's kernel would have more than {longest} nodes"
        if reason:
            edit.refuse(several[-1], reason)
        elif groups.may_be_one(group.nodes, members):
            groups.join(group, members)
            return stored
    return []


def _several(members: Collection[Node]) -> list[Node]:
    """What needs several columns at a time."""
    return [node for node in members if node.target is _JOIN or node.target in TOTALS]


def _why_not(result: Node, members: Collection[Node], stored: list[Node]) -> str:
    found = columns_of(stored, [result], _with_views(result, members))
    if isinstance(found, str):
        return found
    return draws_too_little(result, found.head) if found.together else ""


def _readers(groups: Groups, result: Node) -> dict[Node, None]:
    """Everything that a result is computed on to by elementwise operators, joins, reductions and views; in order."""
    members: dict[Node, None] = {}
    size, waiting = numel(result), set(consumers(result))
    while waiting:
        node = min(waiting, key=groups.order.__getitem__)
        waiting.remove(node)
        fits = node.target in ELEMENTWISE or node.target is _JOIN or is_pick(node) or _reduces_columns(node, result)
        if fits and node not in groups.of and is_fusable(node) and is_nonnegative(size - numel(node)):
            members[node] = None
            waiting |= set(consumers(node))
    return members


def _reduces_columns(node: Node, result: Node) -> bool:
    """Is it a reduction over part of the columns, or a few columns, of many rows of a product?"""
    if node.target not in TOTALS or numel(node.all_input_nodes[0]) != numel(result):
        return False
    columns, rank = sizes_of(result)[-1], node.all_input_nodes[0].meta["val"].dim()
    rows, count, dims = numel(result) / columns, reduced_size(node), reduced_dims(node)
    few = bool(rows.is_Integer and rows <= FEW_ROWS)
    part = bool(count.is_Integer and (count <= MOST_TOGETHER or count < columns))
    return part and not few and dims == tuple(range(rank - len(dims), rank))


def _showing_all(result: Node, members: dict[Node, None]) -> dict[Node, None]:
    """The members without those that are stored and do not show all of the product, and what is behind them."""
    while True:
        whole = _whole(result, _with_views(result, members))
        loose = [node for node in _read_outside(members) if node not in whole or widens(node)]
        if not loose:
            return members
        members = without(loose, members)


def _with_views(result: Node, members: Collection[Node]) -> dict[Node, None]:
    """The members, and the views between them and behind them."""
    inside: dict[Node, None] = {}
    waiting = [result]
    while waiting:
        for user in waiting.pop().users:
            if user not in inside and (user in members or (user.op == "call_function" and is_view(user))):
                inside[user] = None
                waiting.append(user)
    return inside


def _read_outside(members: Collection[Node]) -> list[Node]:
    return [node for node in members if any(reader not in members for reader in consumers(node))]


def _whole(result: Node, inside: Collection[Node]) -> Collection[Node]:
    """The nodes that show every element of the product."""
    first = (sympy.Integer(0),) * len(sizes_of(result))
    return places([result], first, inside, sizes_of, {})
