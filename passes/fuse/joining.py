"""The rules of joining: when a node may be computed in the kernel of its producers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import sympy
import torch
from torch.fx import Node

from graphopt.index_arithmetic import product, size_expression
from graphopt.index_map import IDENTITIES, RESHAPES
from graphopt.ops import WRITES
from graphopt.passes.fuse.groups import Group, chain, consumers, producers, source_of
from graphopt.passes.fuse.writes import rows_of_write
from graphopt.row_ops import ELEMENTWISE, REDUCTIONS, SCATTERS, STRUCTURES, is_pick, reduced_dims

aten = torch.ops.aten
prims = torch.ops.prims

ROW_KEEPING = RESHAPES | IDENTITIES | {aten.expand.default, prims.broadcast_in_dim.default}
"""Views that keep the order of rows."""

FEW_ROWS = 16
"""Rows of a product at most that each of its programs may compute anew from what they are made of."""

Sizes = tuple[sympy.Expr, ...]
Rows = tuple[sympy.Expr, sympy.Expr, tuple[Sizes, Sizes]]
"""The number of rows and of columns that a group's reductions run over; and, when the columns are not the last
dimensions, the shapes (without dimensions of 1) of the operand and of the rows, which its members must have."""


def numel(node: Node) -> sympy.Expr:
    """The number of elements that a node computes, of the first of several results."""
    return sympy.expand(product([size_expression(s) for s in _computed(node).shape]))


def shape(node: Node) -> Sizes:
    """The dimensions larger than 1 of what a node computes, of the first of several results."""
    return tuple(s for s in map(size_expression, _computed(node).shape) if s != 1)


def _computed(node: Node) -> Any:
    """The fake value of what a node computes: of a write into a cache the new rows, not the cache."""
    value = (rows_of_write(node) if node.target in WRITES else node).meta["val"]
    return value[0] if isinstance(value, (tuple, list)) else value


def rows_of(node: Node) -> Rows:
    """Rows and columns of a reduction."""
    operand = node.args[0]
    assert isinstance(operand, Node)
    sizes = [size_expression(s) for s in operand.meta["val"].shape]
    dims = reduced_dims(node)
    real = [d for d in range(len(sizes)) if sizes[d] != 1]
    flags = [d in dims for d in real]
    kept = tuple(sizes[d] for d in real if d not in dims)
    shapes: tuple[Sizes, Sizes] = ((), ()) if flags == sorted(flags) else (tuple(sizes[d] for d in real), kept)
    return product(kept), product([sizes[d] for d in dims]), shapes


def group_rows(group: Group) -> Rows | None:
    """The rows of a group's reductions; None if it has none."""
    return next((rows_of(n) for n in group.nodes if n.target in REDUCTIONS), None)


def may_join(node: Node, group: Group) -> bool:
    """May a fusable node be computed in the kernel of a group that makes some of its operands?

    A value that depends on a reduction is known only for the program's own rows: its reader must keep the order of
    rows, and read whole rows. Two reductions of one kernel run over the same rows.
    """
    if is_pick(node):
        return node.args[0] in group.nodes
    own = [p for p in producers(node) if p in group.nodes]
    if node.target in SCATTERS and any(source_of(n) in own for n in node.all_input_nodes if n is not node.args[0]):
        return False  # it would be computed once for each index
    rows = group_rows(group)
    mine = rows_of(node) if node.target in REDUCTIONS else None
    if node.target in REDUCTIONS:
        assert mine is not None
        if not all(_has_shape(p, mine) for p in own):
            return False
        if rows is not None:
            return rows == mine and all(_keeps_rows(node, p) for p in own)
        return all(bool(numel(p) == mine[0] * mine[1]) and not _is_row_like(p, mine) for p in own)
    if rows is None:
        return all(numel(p) == numel(node) or _is_inlined(p, node, group) for p in own)
    if numel(node) not in (sympy.expand(rows[0] * rows[1]), sympy.expand(rows[0])) or not _has_shape(node, rows):
        return False
    reduced = [p for p in own if depends_on_reduction(p, group)]
    if not reduced:
        return True
    return (node.target in ELEMENTWISE or node.target in WRITES) and all(_keeps_rows(node, p) for p in reduced)


def _has_shape(node: Node, rows: Rows) -> bool:
    """With columns in the middle, places are only known for the operand's own shape, or the rows'."""
    return rows[2] == ((), ()) or shape(node) in rows[2]


def _is_row_like(node: Node, rows: Rows) -> bool:
    return bool(rows[1] != 1 and numel(node) == rows[0])


def _is_inlined(producer: Node, node: Node, group: Group) -> bool:
    """A piece of a join is computed where the join reads it, if nothing else needs it."""
    return node.target in STRUCTURES and all(user is node or user in group.nodes for user in consumers(producer))


def _keeps_rows(node: Node, producer: Node) -> bool:
    return all(view.target in ROW_KEEPING for view in chain(node, producer))


def depends_on_reduction(node: Node, group: Group) -> bool:
    """Does a member's value need a reduction of the same group?"""
    seen: set[Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.target in REDUCTIONS:
            return True
        stack += [p for p in producers(current) if p in group.nodes]
    return False


def itemsize(node: Node) -> int:
    """Bytes of an element that a node computes, of the first of several results."""
    return int(_computed(node).dtype.itemsize)


def widens(node: Node) -> bool:
    """Is it a cast to more bytes, which is left to its readers?"""
    sources = producers(node)
    return len(sources) == 1 and itemsize(node) > itemsize(sources[0])


def without(loose: Collection[Node], members: Collection[Node]) -> dict[Node, None]:
    """The members, in graph order, that are neither loose nor computed from what is."""
    kept: dict[Node, None] = {}
    for node in members:
        needed = [producer for producer in producers(node) if producer in members]
        if node not in loose and all(producer in kept for producer in needed):
            kept[node] = None
    return kept
