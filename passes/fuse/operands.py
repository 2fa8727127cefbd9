"""Operands that a contraction computes for itself, always: those that take more bytes than what they are made of.

A dequantised weight, a weight that is cast to a wider type, rows that are widened: to store them would cost more than
to read what they are made of, and they are made anew for each tile from the cache. The nodes must be readable at any
place (elementwise, views, pieces of a join, rows that are picked), and nothing but the product may need them.
"""

from __future__ import annotations

import sympy
import torch
from torch.fx import Node

from graphopt.cost import value_bytes
from graphopt.index_arithmetic import is_nonnegative
from graphopt.passes.fuse.groups import Groups
from graphopt.row_ops import CONSTANTS, ELEMENTWISE, is_fusable, is_view

aten = torch.ops.aten
_CASTS = frozenset({torch.ops.prims.convert_element_type.default, aten._to_copy.default})
_JOINS = frozenset({aten.cat.default})
_PICKS = frozenset({aten.index_select.default, aten.index.Tensor})


def absorb_operands(groups: Groups, contraction: Node) -> None:
    """Let a contraction that has a region compute its operands where that reads fewer bytes."""
    group = groups.of.get(contraction)
    if group is None:
        return
    left = contraction.args[1] if contraction.target is aten.addmm.default else contraction.args[0]
    for operand in contraction.all_input_nodes:
        nodes = _made_for(groups, contraction, operand, operand is left)
        if nodes and not groups.makes_cycle([*group.nodes, *nodes]):
            groups.join(group, nodes)


def _made_for(groups: Groups, contraction: Node, operand: Node, left: bool) -> list[Node]:
    """The nodes that compute an operand from less and for it alone; of the left one, only widening casts."""
    inside: dict[Node, None] = {}
    read: dict[Node, None] = {}
    waiting = {operand}
    while waiting:
        node = max(waiting, key=groups.order.__getitem__)
        waiting.remove(node)
        fits = is_view(node) or (_widens(node) if left else node.target in ELEMENTWISE | _JOINS | _PICKS)
        private = all(user is contraction or user in inside for user in node.users)
        if is_fusable(node) and fits and private and node not in groups.of:
            inside[node] = None
            if node.target in _PICKS:
                read[node] = None  # of what it picks from, so much is read
                continue
            waiting |= {source for source in node.all_input_nodes if source.target not in CONSTANTS}
        else:
            read[node] = None
    less = sum((value_bytes(node.meta["val"]) for node in read), sympy.Integer(0))
    computes = any(not is_view(node) for node in inside)
    return list(inside) if computes and is_nonnegative(value_bytes(operand.meta["val"]) - less - 1) else []


def _widens(node: Node) -> bool:
    """Is it a cast to a type of more bytes?"""
    if node.target not in _CASTS:
        return False
    return _itemsize(node.all_input_nodes[0]) < _itemsize(node)


def _itemsize(node: Node) -> int:
    return int(node.meta["val"].dtype.itemsize)
