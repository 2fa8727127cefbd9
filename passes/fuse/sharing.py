"""Regions that share a launch although none reads what another makes.

Elementwise regions that wait for the same region or node, or are read by the same one, save a launch; reductions over
the same rows of one tensor read it once instead of once each.
"""

from __future__ import annotations

import itertools

import torch
from torch.fx import Node

from graphopt.passes.fuse.groups import Group, Groups, consumers, producers
from graphopt.passes.fuse.joining import group_rows, shape
from graphopt.row_ops import REDUCTIONS


def share_launches(groups: Groups, largest: int) -> None:
    """Merge independent regions as long as they have no more than `largest` nodes."""
    waiting: dict[object, list[Group]] = {}
    for group in groups.all():
        rows = group_rows(group)
        if group.kind == "rows" and rows is None:
            for neighbour in _neighbours(groups, group):
                waiting.setdefault(neighbour, []).append(group)
        elif group.kind == "rows":
            for source in _whole_rows(group):
                waiting.setdefault((source, rows), []).append(group)
    for candidates in waiting.values():
        for first, second in itertools.combinations(candidates, 2):
            apart = first is not second and bool(first.nodes) and bool(second.nodes)
            if apart and len(first.nodes) + len(second.nodes) <= largest:
                if groups.may_be_one(first.nodes, second.nodes):
                    moved = list(second.nodes)
                    second.nodes = {}
                    groups.join(first, moved)


def _neighbours(groups: Groups, group: Group) -> set[tuple[str, Group | Node]]:
    """The latest region or node that a region waits for, and those that read it."""
    sources = [p for n in group.nodes for p in producers(n) if p not in group.nodes and p.op != "placeholder"]
    readers = {r for n in group.nodes for r in consumers(n) if r not in group.nodes}
    found: set[tuple[str, Group | Node]] = {("reads", groups.of.get(r, r)) for r in readers if r.op != "output"}
    if sources:
        latest = max(sources, key=groups.order.__getitem__)
        found.add(("waits", groups.of.get(latest, latest)))
    return found


def _whole_rows(group: Group) -> list[Node]:
    """What a group reads, element by element, of tensors as large as what its reductions run over."""
    reduced = next(n.args[0] for n in group.nodes if n.target in REDUCTIONS)
    assert isinstance(reduced, Node)
    read = dict.fromkeys(n for member in group.nodes for n in member.all_input_nodes if n not in group.nodes)
    return [n for n in read if isinstance(n.meta.get("val"), torch.Tensor) and shape(n) == shape(reduced)]
