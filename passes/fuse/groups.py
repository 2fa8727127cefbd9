"""Groups of nodes that become regions, and the order between them: what region forming may join without a cycle."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from torch.fx import Graph, Node

from graphopt.ops import WRITES
from graphopt.passes.fuse.worth import Worth
from graphopt.row_ops import is_view


@dataclasses.dataclass(eq=False)
class Group:
    """Nodes that will be one kernel; in graph order. kind: "rows", "linear" or "attention"."""

    kind: str
    nodes: dict[Node, None]

    @property
    def last(self) -> Node:
        """The latest node."""
        return next(reversed(self.nodes))


class Groups:
    """Which group each node belongs to; nodes in no group stand alone. worth: a cost model that must agree to joins."""

    def __init__(self, graph: Graph, worth: Worth | None = None) -> None:
        self._worth = worth
        self.order = {node: place for place, node in enumerate(graph.nodes)}
        self.of: dict[Node, Group] = {}

    def new(self, kind: str, nodes: Iterable[Node]) -> Group:
        """A group of the given nodes."""
        group = Group(kind, dict.fromkeys(nodes))
        self.of.update(dict.fromkeys(group.nodes, group))
        return group

    def join(self, into: Group, nodes: Iterable[Node]) -> None:
        """Move nodes into a group."""
        merged = {**into.nodes, **dict.fromkeys(nodes)}
        into.nodes = {n: None for n in sorted(merged, key=self.order.__getitem__)}
        self.of.update(dict.fromkeys(into.nodes, into))

    def remove(self, node: Node) -> None:
        """Let a node stand alone again."""
        del self.of.pop(node).nodes[node]

    def all(self) -> list[Group]:
        """Every group, by its latest node."""
        return sorted(dict.fromkeys(self.of.values()), key=lambda group: self.order[group.last])

    def may_be_one(self, *parts: Iterable[Node]) -> bool:
        """May these nodes and groups be one kernel, and is it worth it?"""
        members = [list(part) for part in parts]
        if self.makes_cycle(node for part in members for node in part):
            return False
        return self._worth is None or self._worth.together(members)

    def makes_cycle(self, members: Iterable[Node]) -> bool:
        """Would these nodes, as one kernel, wait for a kernel that waits for them?"""
        inside = dict.fromkeys(members)
        if any(source in inside and source.target in WRITES for n in inside for source in producers(n)):
            return True  # what is written is read by another launch: programs do not wait for each other
        # Views are copied into regions that read them: between two members they are nobody's launch.
        own = [(n, source) for n in inside for source in producers(n) if source in inside]
        inside.update(dict.fromkeys(view for n, source in own for view in chain(n, source)))
        first = min(self.order[n] for n in inside)
        seen: set[Node] = set()
        stack = [n for m in inside for n in m.all_input_nodes if n not in inside]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            group = self.of.get(node)
            if group is not None and any(n in inside for n in group.nodes):
                if all(n in inside for n in group.nodes):
                    return True
                group = None
            if node in inside:
                return True
            around = group.nodes if group else {node: None}
            seen.update(around)
            if max(self.order[n] for n in around) > first:
                sources = [source for n in around for source in n.all_input_nodes if source not in around]
                if any(source in inside for source in sources):
                    return True
                stack += sources
        return False


def source_of(node: Node) -> Node:
    """The node behind a chain of views."""
    while node.op == "call_function" and is_view(node):
        node = node.all_input_nodes[0]
    return node


def producers(node: Node) -> list[Node]:
    """The nodes whose values a node reads, views looked through."""
    return list(dict.fromkeys(source_of(n) for n in node.all_input_nodes))


def consumers(node: Node) -> list[Node]:
    """The nodes that read a node's value, views looked through."""
    found: dict[Node, None] = {}
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if user.op == "call_function" and is_view(user):
            stack += user.users
        else:
            found[user] = None
    return list(found)


def chain(node: Node, source: Node) -> list[Node]:
    """The views between a source and the operands of `node` that come from it."""
    found: list[Node] = []
    for operand in node.all_input_nodes:
        views: list[Node] = []
        current = operand
        while current is not source and current.op == "call_function" and is_view(current):
            views.append(current)
            current = current.all_input_nodes[0]
        if current is source:
            found += views
    return found
