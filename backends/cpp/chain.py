"""Chains: in a decode step, linears and what lies between them as one call of `torch.ops.graphopt_cpp.chain`.

A decoder computes norms, linears, attention, residuals and activations one behind the other: on a few rows each takes
microseconds, and so do a call from Python, waking threads and filling buffers. A chain is one call and one parallel
region, whose threads wait for each other only behind linears and attentions. Every step rounds to the dtype of the
rows, as eager's tensors do. The text of the steps is explained in src/chain_text.h.
"""

from __future__ import annotations

import operator
from collections import Counter

import torch
from torch import Tensor, fx

from graphopt import edit
from graphopt.backends.cpp.chain_steps import Operand, Step, line_of, maker, step_of
from graphopt.lowering import Choice

aten = torch.ops.aten
kernels = torch.ops.graphopt_cpp


def form(graph_module: fx.GraphModule) -> list[Choice]:
    """Make a chain of each run of steps on the same few rows, as long as one follows the other. In place.

    The steps move down to the last of them; a chain ends before the first other node that reads one of them, and before
    any that writes into its arguments.
    """
    chains: list[Choice] = []
    chain = _Chain()
    for node in list(graph_module.graph.nodes):
        if chain.takes(node):
            continue
        if chain.is_read_by(node) or _writes(node) or node.op == "output":
            chains += chain.emit(graph_module, node)
            chain = _Chain()
            chain.takes(node)
    return chains


class _Chain:
    """Steps on rows of one leading shape and dtype, each with its node. picks: of results of those that have several,
    wherever they stand."""

    def __init__(self) -> None:
        self.steps: dict[fx.Node, Step] = {}
        self.picks: dict[fx.Node, None] = {}

    def takes(self, node: fx.Node) -> bool:
        """Add a node, if it is a step that belongs here."""
        if node in self.picks:
            return True
        step = step_of(node)
        if step is None or not self._belongs(node, step):
            return False
        self.steps[node] = step
        self.picks |= dict.fromkeys(user for user in node.users if user.target is operator.getitem)
        return True

    def _belongs(self, node: fx.Node, step: Step) -> bool:
        if self.steps:
            first = next(iter(self.steps.values())).x.meta["val"]
            x = step.x.meta["val"]
            if x.shape[:-1] != first.shape[:-1] or x.dtype != first.dtype:
                return False
        return step.is_linear or any(map(self._has, step.operands("v"))) or _feeds_a_linear(node)

    def _has(self, node: fx.Node) -> bool:
        return node in self.steps or node in self.picks

    def is_read_by(self, node: fx.Node) -> bool:
        return any(self._has(source) for source in node.all_input_nodes)

    def emit(self, graph_module: fx.GraphModule, anchor: fx.Node) -> list[Choice]:
        """One call before the anchor for all steps, if there is something to gain."""
        written = any(step.operands("r") for step in self.steps.values())
        if not written and (len(self.steps) < 2 or not any(step.is_linear for step in self.steps.values())):
            return []
        text = _Text(self.steps)
        values = {pick: text.value(pick) for pick in (*self.steps, *self.picks) if isinstance(pick.meta["val"], Tensor)}
        shown = [node for node in values if any(not self._has(user) for user in node.users)]
        steps = "; ".join([*text.lines, "out " + " ".join(values[node] for node in shown)])
        with edit.rewriting(graph_module, anchor) as rewrite:
            if written:
                results = [_memory_for(rewrite, node) for node in shown]
                made = rewrite.call(kernels.chain_into.default, text.inputs, text.weights, text.rooms, results, steps)
            else:
                made = rewrite.call(kernels.chain.default, text.inputs, text.weights, [], steps)
                results = [rewrite.call(operator.getitem, made, place) for place in range(len(shown))]
            for node, result in zip(shown, results, strict=True):
                rewrite.replace(node, result)
        if not rewrite.applied:
            return []
        for node in sorted((*self.steps, *self.picks), reverse=True):
            graph_module.graph.erase_node(node)
        return [Choice(made.name, _summary(list(self.steps.values())), "cpp.chain")]


class _Text:
    """The steps as lines, with the inputs, weights and rooms that their words number."""

    def __init__(self, steps: dict[fx.Node, Step]) -> None:
        reads = [node for step in steps.values() for node in step.operands("v")]
        self.inputs = list(dict.fromkeys(node for node in reads if maker(node) not in steps))
        self.weights: list[fx.Node] = []
        self.rooms: list[fx.Node] = []
        self._places: dict[Operand, int] = {}
        self._values = {node: number for number, node in enumerate(self.inputs)}
        self.lines = []
        count = len(self.inputs)
        for node, step in steps.items():
            self.lines.append(line_of(step, self._word))
            self._values[node] = count
            count += step.results

    def value(self, node: fx.Node) -> str:
        """The word of rows: an input, or a result of a step."""
        if node in self._values:
            return f"v{self._values[node]}"
        place = node.args[1]
        assert isinstance(place, int)
        return f"v{self._values[maker(node)] + place}"

    def _word(self, operand: Operand) -> str:
        if operand.kind == "v":
            return self.value(operand.nodes[0])
        listed = self.weights if operand.kind == "w" else self.rooms
        if operand not in self._places:
            self._places[operand] = len(listed)
            listed += operand.nodes
        return f"{operand.kind}{self._places[operand]}"


def _summary(steps: list[Step]) -> str:
    """The steps counted, the commonest first."""
    counted = Counter(step.name.split()[0] for step in steps)
    return "a chain of " + ", ".join(f"{count} {name}" for name, count in counted.most_common())


def _memory_for(rewrite: edit.Rewrite, node: fx.Node) -> fx.Node:
    value = node.meta["val"]
    return rewrite.call(aten.empty.memory_format, list(value.shape), dtype=value.dtype, device=value.device)


def _feeds_a_linear(node: fx.Node) -> bool:
    """Whether a linear takes this node's first result as its rows."""
    readers = [reader for user in node.users for reader in (user.users if user.target is operator.getitem else (user,))]
    steps = map(step_of, readers)
    return any(step is not None and step.is_linear and maker(step.x) is node for step in steps)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
