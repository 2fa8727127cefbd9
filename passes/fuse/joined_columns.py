"""Readers of a product that join its columns anew, rotary embedding above all, in the product's own kernel.

    q = view(linear(x, w), [B, S, H, D]).permute([0, 2, 1, 3])
    y = add(mul(q, cos), mul(cat([neg(q[..., D / 2 :]), q[..., : D / 2]], -1), sin))

becomes one region. An element of y needs two columns of the product; the kernel computes both in one program, each with
an accumulator of its own, and stores the elements of y for both (`columns.py`), so that nothing is computed twice.

Taken are the readers of one result, elementwise operators, joins and the views between them, of which in the end every
stored one shows all of the product; those that do not, and what is behind them, stay outside.
"""

from __future__ import annotations

from collections.abc import Collection

import sympy
import torch
from torch.fx import Node

from graphopt import edit
from graphopt.columns import columns_of, places, sizes_of
from graphopt.index_arithmetic import is_nonnegative
from graphopt.passes.fuse.groups import Group, Groups, consumers, producers
from graphopt.passes.fuse.joining import numel
from graphopt.row_ops import ELEMENTWISE, is_fusable, is_view

_JOIN = torch.ops.aten.cat.default


def absorb_joined(groups: Groups, group: Group, result: Node, longest: int) -> list[Node]:
    """Let the group of a product take the readers of one of its results, if they join columns; returns those stored.

    longest: how many nodes a group may have.
    """
    members = _readers(groups, result)
    inside, stored = _with_views(result, members), _read_outside(members)
    while loose := [node for node in stored if node not in _whole(result, inside) or _widens(node)]:
        members = _without(loose, members)
        inside, stored = _with_views(result, members), _read_outside(members)
    joins = [node for node in members if node.target is _JOIN]
    if not joins:
        return []
    found = columns_of(stored, [result], inside)
    if isinstance(found, str):
        edit.refuse(joins[-1], found)
    elif len(group.nodes) + len(members) > longest:
        edit.refuse(joins[-1], f"the product's kernel would have more than {longest} nodes")
    elif groups.may_be_one(group.nodes, members):
        groups.join(group, members)
        return stored
    return []


def _readers(groups: Groups, result: Node) -> dict[Node, None]:
    """Everything that a result is computed on to by elementwise operators, joins and views; in graph order."""
    members: dict[Node, None] = {}
    size, waiting = numel(result), set(consumers(result))
    while waiting:
        node = min(waiting, key=groups.order.__getitem__)
        waiting.remove(node)
        fits = node not in groups.of and is_fusable(node) and (node.target in ELEMENTWISE or node.target is _JOIN)
        if fits and is_nonnegative(size - numel(node)):
            members[node] = None
            waiting |= set(consumers(node))
    return members


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


def _without(loose: Collection[Node], members: Collection[Node]) -> dict[Node, None]:
    """The members that are neither loose nor computed from what is."""
    kept: dict[Node, None] = {}
    for node in members:
        needed = [producer for producer in producers(node) if producer in members]
        if node not in loose and all(producer in kept for producer in needed):
            kept[node] = None
    return kept


def _widens(node: Node) -> bool:
    """Is it a cast to more bytes, which is left to its readers?"""
    sources = producers(node)
    return len(sources) == 1 and node.meta["val"].dtype.itemsize > sources[0].meta["val"].dtype.itemsize
