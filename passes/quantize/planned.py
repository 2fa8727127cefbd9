"""Which weights of a graph meet quantised operations, and one plan for all of them.

Under `Quantize("auto")` linears and experts share one budget, so that the pass which runs first solves for both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt import capture, grouped, ops, views
from graphopt.passes.quantize import packable
from graphopt.quantization import plan
from graphopt.quantization.names import weight_name
from graphopt.quantize_options import Quantize

_PLANNED = "graphopt.planned"


def assigned(graph_module: fx.GraphModule, quantize: Quantize) -> dict[str, str]:
    """The scheme of each weight by name: as the options say it, or, under "auto", as solved for this graph."""
    if quantize.scheme != "auto" or quantize.assigned:
        return dict(quantize.assigned)
    known: tuple[Quantize, dict[str, str]] | None = graph_module.meta.get(_PLANNED)
    if known is None or known[0] != quantize:
        weights = list({weight.name: weight for weight in _weights(graph_module)}.values())
        found = dict(plan.plan_weights(weights, quantize).quantize.assigned) if weights else {}
        graph_module.meta[_PLANNED] = known = quantize, found
    return known[1]


def name_of(used: fx.Node) -> str:
    """The dotted name of the weight that a node reads, "" if it has none."""
    return weight_name(views.root(used).meta.get("source", ""))


def linears(graph_module: fx.GraphModule) -> list[fx.Node]:
    """The linears of a graph."""
    return [node for node in graph_module.graph.nodes if node.target is ops.linear]


def why_not(product: fx.Node) -> str:
    """Why a grouped product has no quantised form, whatever its experts hold; "" if it has one."""
    return grouped.why_other(product) or plan.why_not_experts(product.meta["val"].device)


def lm_heads(graph_module: fx.GraphModule) -> set[fx.Node]:
    """The linears that score a vocabulary: no linear follows, and they have as many rows as an embedding table."""
    nodes = list(graph_module.graph.nodes)
    look_ups = [arguments(node)[0] for node in nodes if node.target is torch.ops.aten.embedding.default]
    tables = {table.meta["val"].shape[0] for table in look_ups}
    feeding: set[fx.Node] = set()
    for node in reversed(nodes):
        if any(user.target is ops.linear or user in feeding for user in node.users):
            feeding.add(node)
    found = (node for node in linears(graph_module) if node not in feeding)
    return {node for node in found if arguments(node)[1].meta["val"].shape[0] in tables}


def _weights(graph_module: fx.GraphModule) -> Iterator[plan.Weight]:
    """The weights that may be quantised and are at hand."""
    heads = lm_heads(graph_module)
    for node in linears(graph_module):
        used = arguments(node)[1]
        tensor = capture.weight_tensor(views.root(used))
        if tensor is not None and not packable.why_not(used, None):
            yield plan.Weight(name_of(used), tensor, packable.is_turned(used), node in heads)
    for node in grouped.products(graph_module):
        experts = grouped.operands(node)[1]
        tensor = capture.weight_tensor(views.root(experts))
        if tensor is not None and not why_not(node) and not packable.why_not(experts, None, transposed=True):
            yield plan.Weight(name_of(experts), tensor, views.root(experts) is experts)


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """Of a linear x, weight and, if it has one, bias; of a quantised one x, the packed weight, bias or None and scheme;
    of a look-up the table and the indices; of a packing the weight and the scheme."""
    return node.args
