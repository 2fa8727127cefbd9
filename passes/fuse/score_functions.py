"""Let attention compute its mask from positions instead of reading it: a function of each score's place.

    k = iota(T);  q = iota(S);  seen = le(k, q[:, None]) & padding[b, None, k];  y = attention(q, k, v, seen)

reads [B, 1, S, T] for nothing: each program knows which queries and keys it is at. Every attention gets its own copy of
the nodes that make its mask (as FlexAttention's `mask_mod` and `score_mod` are, Dong et al., 2024), down to what is
cheaper to read: slopes of heads, lengths, numbers of documents, padding. Region forming takes the copies into the
attention's region, and the kernel evaluates them at its own scores.

What a mask is computed from is decided by time on the device: to read the mask in each layer, after a launch that
writes it once, or to read what its nodes read. Left alone, so that the mask is read from memory: nodes that a kernel
cannot compute at one place, one gathered element for each score, more than `MOST_STEPS` operations for each score, and
memory that the graph updates.
"""

from __future__ import annotations

import sympy
from torch.fx import GraphModule, Node

from graphopt import cost, edit, estimate, views
from graphopt.passes.fuse.attention_regions import ATTENTIONS, has_kernel, mask_of
from graphopt.passes.fuse.mask_places import KEY, QUERY, places
from graphopt.passes.fuse.written_positions import write_positions
from graphopt.row_ops import CONSTANTS, ELEMENTWISE, STRUCTURES, is_fusable, is_view

MOST_STEPS = 24
"""Operations that a score may take besides its product: each is done again for every head."""


def generate_masks(graph_module: GraphModule) -> dict[Node, list[Node]]:
    """Give attentions the nodes of their masks; returns those that each attention is to compute."""
    readers: dict[Node, list[Node]] = {}
    for node in graph_module.graph.nodes:
        if node.target in ATTENTIONS and has_kernel(node) and (mask := mask_of(node)) is not None:
            readers.setdefault(mask, []).append(node)
    write_positions(graph_module, readers)
    family = {node for mask in readers for node in places(mask)}.union(*readers.values())
    made: dict[Node, list[Node]] = {}
    for mask, attentions in readers.items():
        function = _ScoreFunction(graph_module, mask, attentions, family)
        inside = function.nodes()
        if not any(node.target in ELEMENTWISE or node.target in STRUCTURES for node in inside):
            if function.reasons:
                edit.refuse(attentions[0], f"its mask is read from memory: {', '.join(function.reasons)}")
            continue
        for attention in attentions:
            made[attention] = _copied_before(attention, mask, inside)
    edit.eliminate_dead_code(graph_module)
    return made


def _copied_before(attention: Node, mask: Node, inside: list[Node]) -> list[Node]:
    copies: dict[Node, Node] = {}
    with attention.graph.inserting_before(attention):
        for node in inside:
            copies[node] = attention.graph.node_copy(node, lambda n: copies.get(n, n))
    attention.replace_input_with(mask, copies[mask])
    return list(copies.values())


class _ScoreFunction:
    """One mask and the attentions that read it. family: the nodes of all masks, and their readers.

    reasons: why nodes that might have been computed are read.
    """

    def __init__(self, graph_module: GraphModule, mask: Node, attentions: list[Node], family: set[Node]) -> None:
        self.mask, self.layers, self.family = mask, len(attentions), family
        self.reasons: dict[str, None] = {}
        order = {node: place for place, node in enumerate(graph_module.graph.nodes)}
        self._moved_from, self._moved_to = order, max(order[attention] for attention in attentions)
        self._writes = [(order[n], {views.storage(seen) for seen in n.all_input_nodes}) for n in order if _writes(n)]
        self._device = estimate.gpu_of(graph_module)
        self._sizes = estimate.example_sizes(graph_module)
        self._places = places(mask)
        self._best: dict[Node, tuple[float, bool]] = {}

    def nodes(self) -> list[Node]:
        """The nodes to be computed in the attention's kernel, in order; none if the mask is to be read."""
        inside: dict[Node, None] = {}
        stack = [self.mask]
        while stack:
            node = stack.pop()
            if self.best(node)[1] and node not in inside:
                inside[node] = None
                stack += node.all_input_nodes
        steps = sum(node.target in ELEMENTWISE and self._is_for_each_score(node) for node in inside)
        if steps > MOST_STEPS:
            self.reasons[f"{steps} operations for each score, more than {MOST_STEPS}"] = None
            return []
        return [node for node in self.mask.graph.nodes if node in inside]

    def best(self, node: Node) -> tuple[float, bool]:
        """The least seconds that a node's value costs all layers, and whether that is by computing it."""
        if node not in self._best:
            reading, reason = self._reading(node), self._refusal(node)
            computing = sum(self.best(source)[0] for source in node.all_input_nodes)
            if node.target in STRUCTURES:  # what is gathered is all that is read
                gathered = self._seconds(node) * self.layers
                first, *indices = node.all_input_nodes
                computing = min(self.best(first)[0], gathered) + sum(self.best(index)[0] for index in indices)
            if not reason and computing > reading:
                reason = "what it is computed from takes longer to read"
            if reason and node.op == "call_function" and reading:
                self.reasons[reason] = None
            self._best[node] = (reading, False) if reason else (computing, True)
        return self._best[node]

    def _reading(self, node: Node) -> float:
        """Seconds to read a node's value in each layer, and to make it where nothing else needs it."""
        shown = [node]
        while is_view(shown[-1]):
            shown.append(shown[-1].all_input_nodes[0])
        base = shown[-1]
        seconds = self.layers * min(map(self._seconds, shown))
        if base.op == "call_function" and is_fusable(base) and all(user in self.family for user in base.users):
            seconds += self._device.launch + self._seconds(base)
        return seconds

    def _seconds(self, node: Node) -> float:
        moved = sympy.sympify(cost.value_bytes(node.meta.get("val")))
        known = {symbol: self._sizes.get(symbol.name, 1) for symbol in moved.free_symbols}
        return float(moved.xreplace(known)) / self._device.bandwidth

    def _is_for_each_score(self, node: Node) -> bool:
        return {QUERY, KEY} <= self._places.get(node, frozenset())

    def _refusal(self, node: Node) -> str:
        """Why a node cannot be computed at one place of the mask."""
        if node.op != "call_function":
            return "it is stored"
        read = {views.storage(source) for source in node.all_input_nodes}
        if any(self._moved_from[node] < at < self._moved_to and read & written for at, written in self._writes):
            return "the graph updates what it is computed from before the attention"
        if node.target in CONSTANTS or (is_view(node) and is_fusable(node)):
            return ""
        if not is_fusable(node) or not (node.target in ELEMENTWISE or node.target in STRUCTURES):
            return f"{node.target} has no value at one place alone"
        if node.target in STRUCTURES and self._is_for_each_score(node):
            return f"{node.target} picks an element for each score"
        return ""


def _writes(node: Node) -> bool:
    return node.op not in ("placeholder", "get_attr", "output") and views.may_write(node)
