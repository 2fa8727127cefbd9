"""Move groups of nodes into submodules: the last step of region forming."""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, GraphModule, Node

from graphopt import edit
from graphopt.ops import WRITES
from graphopt.passes.fuse.groups import Group, Groups
from graphopt.row_ops import CONSTANTS, is_view


def extract(graph_module: GraphModule, groups: Groups) -> int:
    """Rebuild the graph with a `call_module` for each group; returns how many there are.

    Views and constants that a group reads are copied into it; outside they stay for their other readers. Nodes that
    update memory keep their place relative to every node that reads that memory.
    """
    order = _order(graph_module.graph, groups)
    new = Graph()
    environment: dict[Node, Node] = {}
    made = 0
    for unit in order:
        if isinstance(unit, Group):
            _call(graph_module, new, environment, unit, f"region_{made}")
            made += 1
        elif not is_view(unit) or all(source in environment for source in unit.all_input_nodes):
            # What a region shows to nobody is seen through views by that region alone.
            copy = new.node_copy(unit, lambda n: environment[n])
            environment[unit] = copy
    graph_module.graph = new
    edit.eliminate_dead_code(graph_module)
    new.lint()
    graph_module.recompile()
    return made


def _inside(group: Group) -> tuple[list[Node], list[Node]]:
    """All nodes of a region, free ones included, and the nodes it reads from outside."""
    whole: dict[Node, None] = {}
    inputs: dict[Node, None] = {}

    def visit(node: Node) -> None:
        if node in whole or node in inputs:
            return
        free = node.op == "call_function" and (is_view(node) or node.target in CONSTANTS) and not _keeps_memory(node)
        if node not in group.nodes and not free:
            inputs[node] = None
            return
        for source in node.all_input_nodes:
            visit(source)
        whole[node] = None

    for member in group.nodes:
        visit(member)
    return list(whole), list(inputs)


def _keeps_memory(node: Node) -> bool:
    """A view of another dtype, or of undefined memory, is no renaming of places."""
    value = node.meta.get("val")
    return node.target is torch.ops.aten.empty.memory_format or not isinstance(value, (torch.Tensor, tuple, list))


def _call(graph_module: GraphModule, new: Graph, environment: dict[Node, Node], group: Group, name: str) -> None:
    whole, inputs = _inside(group)
    region = Graph()
    inner: dict[Node, Node] = {}
    for node in inputs:
        inner[node] = region.placeholder(f"in_{len(inner)}")
        inner[node].meta.update(val=node.meta["val"])
    for node in whole:
        inner[node] = region.node_copy(node, lambda n: inner[n])
    members = [n for n in group.nodes if isinstance(n.meta["val"], torch.Tensor)]
    outputs = [n for n in members if any(user not in group.nodes and not _copied(user, group) for user in n.users)
               or _read_through_views(n, group) or n.target in WRITES]
    region.output(tuple(inner[n] for n in outputs))
    module = GraphModule(torch.nn.Module(), region)
    module.meta["kind"] = group.kind
    graph_module.add_submodule(name, module)
    call = new.call_module(name, tuple(environment[n] for n in inputs))
    call.meta["val"] = tuple(n.meta["val"] for n in outputs)
    for place, node in enumerate(outputs):
        environment[node] = new.call_function(operator.getitem, (call, place))
        environment[node].meta.update(node.meta)


def _copied(user: Node, group: Group) -> bool:
    """Is the reader a view, whose own readers decide?"""
    return user.op == "call_function" and is_view(user)


def _read_through_views(node: Node, group: Group) -> bool:
    stack = [u for u in node.users if _copied(u, group)]
    while stack:
        for user in stack.pop().users:
            if _copied(user, group):
                stack.append(user)
            elif user not in group.nodes:
                return True
    return False


def _order(graph: Graph, groups: Groups) -> list[Node | Group]:
    """Groups and lone nodes so that everything stands after what it reads, and updates of memory keep their place."""
    done: set[int] = set()
    order: list[Node | Group] = []
    pending: list[Node] = []
    nodes = list(graph.nodes)

    def place(node: Node) -> None:
        unit = groups.of.get(node, node)
        stack: list[tuple[Node | Group, bool]] = [(unit, False)]
        while stack:
            current, ready = stack.pop()
            if id(current) in done:
                continue
            if ready:
                done.add(id(current))
                order.append(current)
                continue
            stack.append((current, True))
            if isinstance(current, Group):
                _, sources = _inside(current)
            else:
                sources = list(current.all_input_nodes)
            stack += [(groups.of.get(s, s), False) for s in reversed(sources) if id(groups.of.get(s, s)) not in done]

    for node in nodes:
        if node.op == "placeholder":
            place(node)
    for node in nodes:
        if node.op != "placeholder" and (edit.is_impure(node) or node.op == "output"):
            for earlier in pending:
                place(earlier)
            pending = []
            place(node)
        elif node.op != "placeholder":
            pending.append(node)
    return order
