"""What matrix products take into their kernel behind them.

The epilogue is elementwise over the product (bias, activation, gate, residual, cast, codes), or joins its columns anew
or reduces groups of them (`joined_columns.py`: rotary embedding, norms of heads), and may end with a write into a
cache. What is wider than the product because it was cast so is not stored: its readers cast.
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from graphopt.index_inverse import ONE_TO_ONE
from graphopt.index_map import IDENTITIES, RESHAPES
from graphopt.passes.fuse.contractions import has_kernel
from graphopt.passes.fuse.groups import Group, Groups, chain, consumers, producers, source_of
from graphopt.passes.fuse.joined_columns import absorb_joined
from graphopt.passes.fuse.joining import itemsize, numel, widens, without
from graphopt.passes.fuse.writes import is_write, rows_of_write
from graphopt.row_ops import ELEMENTWISE, is_fusable

LONGEST_EPILOGUE = 48
"""Nodes behind a result at most; a cast to eight-bit floats takes 21."""


def absorb_readers(groups: Groups, contraction: Node) -> None:
    """Make a region of a contraction and the elementwise nodes behind it."""
    if not has_kernel(contraction):
        return
    results = _results(contraction)
    group = groups.new("linear", [contraction, *(r for r in results if r is not contraction)])
    for result in results:
        for node in absorb_joined(groups, group, result, LONGEST_EPILOGUE * len(results)):
            for reader in filter(is_write, consumers(node)):
                _extend_by_write(groups, group, reader)
    readers = {reader: numel(result) for result in reversed(results) for reader in consumers(result)}
    before = list(group.nodes)
    for node in sorted(readers, key=groups.order.__getitem__):
        _extend(groups, group, node, readers[node], contraction)
    _leave_wide_to_readers(groups, group, [n for n in group.nodes if n not in before], itemsize(contraction))


def _results(contraction: Node) -> list[Node]:
    if isinstance(contraction.meta["val"], (tuple, list)):
        return [user for user in contraction.users if user.target is operator.getitem]
    return [contraction]


def _extend(groups: Groups, group: Group, node: Node, size: Any, contraction: Node) -> None:
    """Take a reader in, and then its readers."""
    if is_write(node):
        _extend_by_write(groups, group, node)
        return
    if node in groups.of or not is_fusable(node) or node.target not in ELEMENTWISE or numel(node) != size:
        return
    if len(group.nodes) >= LONGEST_EPILOGUE * len(_results(contraction)):
        return
    inner = [p for p in producers(node) if p in group.nodes]
    if not all(v.target in RESHAPES | IDENTITIES for p in inner for v in chain(node, p)):
        return
    if any(numel(p) != size for p in inner) or not groups.may_be_one(group.nodes, [node]):
        return
    groups.join(group, [node])
    for reader in sorted(consumers(node), key=groups.order.__getitem__):
        _extend(groups, group, reader, size, contraction)


def _leave_wide_to_readers(groups: Groups, group: Group, taken: list[Node], width: int) -> None:
    """Take out again what would be stored wider than the product for having been widened: its readers can do that."""
    while stored := [
        node for node in _widened(group, taken)
        if itemsize(node) > width and any(reader not in group.nodes for reader in consumers(node))
    ]:
        kept = without(stored, group.nodes)
        for node in [node for node in group.nodes if node not in kept]:
            groups.remove(node)


def _widened(group: Group, taken: list[Node]) -> list[Node]:
    """The casts to more bytes among what was taken, and what is computed from them."""
    found: dict[Node, None] = {}
    for node in group.nodes:
        own = [producer for producer in producers(node) if producer in group.nodes]
        if node in taken and (widens(node) or any(producer in found for producer in own)):
            found[node] = None
    return list(found)


def _extend_by_write(groups: Groups, group: Group, node: Node) -> None:
    """Take in a write of what the product makes, however the rows show it, as long as they show all of it."""
    made = source_of(rows_of_write(node))
    shown = chain(node, made)
    if node not in groups.of and made in group.nodes and all(view.target in ONE_TO_ONE for view in shown):
        if groups.may_be_one(group.nodes, [node]):
            groups.join(group, [node])
