"""Cut one rewrite out of its graph as two small graphs of the same inputs: what was there, and what replaces it.

The new nodes are followed back to nodes that existed before: the common inputs. The replaced nodes are followed back
to the same inputs; where a path misses them, it ends at a node that does not depend on any of them, which becomes an
input too. Integers, masks and constants are followed further, because passes prove facts from how they are made.
`widened` gives the same rewrite seen from further back, for rewrites that rest on a fact about a floating point input.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable

import torch
from torch import fx

from graphopt import _compat, text
from graphopt.edit import Application, Provenance, is_impure, source_line
from graphopt.verify import execution

_MOST_NODES = 400


@dataclasses.dataclass(frozen=True)
class Pair:
    """One rewrite by itself: graphs `before` and `after` have the same placeholders and as many outputs.

    exposed: for each output whether the user may see its memory (it is returned by the graph, or written into);
    exposed_inputs: the same for the inputs, if any output is exposed.
    """

    provenance: Provenance
    exactness: str
    same_layout: bool
    before: fx.GraphModule
    after: fx.GraphModule
    where: str
    exposed: tuple[bool, ...]
    exposed_inputs: tuple[bool, ...]

    @property
    def key(self) -> str:
        """Equal for rewrites that differ only in the names of nodes and symbols."""
        graphs = text.canonical_symbols(_content(self.before) + "\n->\n" + _content(self.after))
        return f"{self.exactness} {self.same_layout} {self.exposed} {self.exposed_inputs}\n{graphs}"


@dataclasses.dataclass
class _Cut:
    """The nodes of a cut while it is made: `inputs` are its leaves, in order; `cone` what lies above them."""

    new_nodes: set[fx.Node]
    inputs: dict[fx.Node, None]
    old: dict[fx.Node, None]
    new: dict[fx.Node, None]


def cut(application: Application) -> Pair:
    """The narrowest before/after pair of a rewrite."""
    return _build(application, _narrow(application))


def widened(application: Application, steps: int) -> Pair | None:
    """The pair seen from `steps` operations further back, or None when it is no wider than with fewer steps."""
    made = _narrow(application)
    reached = False
    for _ in range(steps):
        leaves = [node for node in made.inputs if node.op == "call_function" and not _is_number(node)]
        if not leaves or len(made.old) + len(made.new) > _MOST_NODES:
            return _build(application, made) if reached else None
        _expand(made, leaves)
        _expand_facts(made)
        reached = True
    return _build(application, made)


def _narrow(application: Application) -> _Cut:
    new_nodes = {
        node for node in application.graph_module.graph.nodes if node.meta.get("graphopt") is application.provenance
    }
    made = _Cut(new_nodes, {}, {}, {})
    # What is written into new memory is part of the new side, also where no value depends on the writing node.
    waiting = [*(new for _, new in application.pairs), *(node for node in new_nodes if writes(node))]
    while waiting:
        node = waiting.pop()
        if node in new_nodes:
            if node not in made.new:
                made.new[node] = None
                waiting += node.all_input_nodes
        else:
            made.inputs.setdefault(node)
    olds = [old for old, _ in application.pairs]
    # An existing node as replacement (common nodes merged): compare how both are made.
    existing = [new for _, new in application.pairs if new not in new_nodes and new.op == "call_function"]
    depends = _Dependence(made.inputs)
    twins = [new for new in existing if not any(depends(old) for old in olds)]
    for new in twins:
        del made.inputs[new]
        made.new[new] = None
        made.inputs |= dict.fromkeys(source for source in new.all_input_nodes if source not in made.new)
    depends = _Dependence(made.inputs)
    waiting = list(olds)
    while waiting:
        node = waiting.pop()
        if node in made.old or (node in made.inputs and node not in olds):
            continue
        if node in olds or (depends(node) and node.op != "placeholder"):
            made.inputs.pop(node, None)
            made.old[node] = None
            waiting += node.all_input_nodes
        else:
            made.inputs.setdefault(node)
    _expand_facts(made)
    return made


class _Dependence:
    """Whether a node is computed from any of the given nodes."""

    def __init__(self, leaves: Iterable[fx.Node]) -> None:
        self._known = dict.fromkeys(leaves, True)
        self._first = min(self._known, default=None)

    def __call__(self, node: fx.Node) -> bool:
        stack = [node]
        while stack:
            top = stack[-1]
            if top in self._known:
                stack.pop()
            elif self._first is None or top < self._first:
                self._known[stack.pop()] = False
            else:
                unknown = [source for source in top.all_input_nodes if source not in self._known]
                if unknown:
                    stack += unknown
                else:
                    self._known[stack.pop()] = any(self._known[source] for source in top.all_input_nodes)
        return self._known[node]


def _expand_facts(made: _Cut) -> None:
    while len(made.old) + len(made.new) <= _MOST_NODES:
        leaves = [node for node in made.inputs if _carries_facts(node)]
        if not leaves:
            return
        _expand(made, leaves)


def _expand(made: _Cut, leaves: list[fx.Node]) -> None:
    """Let both graphs compute these inputs themselves."""
    for node in leaves:
        del made.inputs[node]
        made.old[node] = made.new[node] = None
    for node in leaves:
        for source in node.all_input_nodes:
            if source not in made.new and source not in made.inputs:
                if source in made.old:
                    made.new[source] = None
                else:
                    made.inputs[source] = None


def _carries_facts(node: fx.Node) -> bool:
    """Whether a pass may know more of this input than its type: constants, indices, masks, tuples of results."""
    if node.op == "get_attr":
        return True
    if node.op != "call_function" or is_impure(node):
        return False
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return not value.dtype.is_floating_point or not node.all_input_nodes
    return not _is_number(node)


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


def _build(application: Application, made: _Cut) -> Pair:
    order = {node: index for index, node in enumerate(application.graph_module.graph.nodes)}
    inputs = sorted(made.inputs, key=order.__getitem__)
    olds, news = ([pair[side] for pair in application.pairs] for side in (0, 1))
    before = _graph(application.graph_module, inputs, made.old, olds, order)
    # Nodes needed by the new side that only the old cone holds (a new node that reads the node it replaces).
    after = _graph(application.graph_module, inputs, made.new | _missing(made, news), news, order)
    # A view that is replaced as well is seen through its own replacement.
    exposed = tuple(_is_exposed(old, frozenset(olds)) for old in olds)
    owners = [_memory_owner(node) for node in inputs]
    where = next(filter(None, map(source_line, olds)), "")
    return Pair(
        application.provenance,
        application.exactness,
        application.same_layout,
        before,
        after,
        where,
        exposed,
        tuple(any(exposed) and (node.op == "placeholder" or _is_exposed(node)) for node in owners),
    )


def _missing(made: _Cut, outputs: list[fx.Node]) -> dict[fx.Node, None]:
    missing: dict[fx.Node, None] = {}
    waiting = list(outputs)
    seen: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node in seen or node in made.inputs:
            continue
        seen.add(node)
        if node not in made.new:
            missing[node] = None
        waiting += node.all_input_nodes
    return missing


def _graph(
    graph_module: fx.GraphModule,
    inputs: list[fx.Node],
    cone: dict[fx.Node, None],
    outputs: list[fx.Node],
    order: dict[fx.Node, int],
) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for number, node in enumerate(inputs):
        copies[node] = graph.placeholder(f"in{number}")
        copies[node].meta = {"val": node.meta.get("val"), "source": node.meta.get("source") or node.name}
    for node in sorted(cone, key=order.__getitem__):
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    # Random draws that no output needs go too: a cut holds only what it compares, and what writes.
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output") or writes(node))
    # Of a hundred cuts few are distinct, and only these are run.
    return _compat.lazy_graph_module(graph_module, graph)


def _is_view(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    returns = node.target._schema.returns
    return any(item.alias_info is not None and not item.alias_info.is_write for item in returns)


def _memory_owner(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and _is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _is_exposed(node: fx.Node, replaced: frozenset[fx.Node] = frozenset()) -> bool:
    waiting, seen = [node], set()
    while waiting:
        top = waiting.pop()
        for user in top.users:
            if user.op == "output" or writes(user):
                return True
            if _is_view(user) and user not in seen and user not in replaced:
                seen.add(user)
                waiting.append(user)
    return False


def writes(node: fx.Node) -> bool:
    """Whether a node updates memory in place."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _content(graph_module: fx.GraphModule) -> str:
    """The graph as text, its constants by their values instead of their names."""
    rendered = text.render(graph_module)
    for node in graph_module.graph.nodes:
        held = getattr(graph_module, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(held, torch.Tensor):
            with execution.real_execution():
                digest = hashlib.sha256(repr(held.flatten()[:4096].tolist()).encode()).hexdigest()[:16]
            rendered = rendered.replace(f"constant {node.target}\n", f"constant {digest}\n")
    return rendered
