"""Let every attention be a region of its own; views of its operands (a transposed or repeated cache) go with it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

import graphopt.ops  # noqa: F401  (registers the dialect)
from graphopt.passes.fuse.groups import Groups

aten = torch.ops.aten

ATTENTIONS: frozenset[Any] = frozenset({
    torch.ops.graphopt.attention.default, aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten.scaled_dot_product_attention.default,
})


def erase_unread(graph: Graph) -> None:
    """Erase attention that nothing reads: torch counts it as random, but without dropout it draws nothing."""
    for node in reversed(list(graph.nodes)):
        if node.target in ATTENTIONS and not node.users and _has_no_dropout(node):
            graph.erase_node(node)


def _has_no_dropout(node: Node) -> bool:
    place = 4 if node.target == aten.scaled_dot_product_attention.default else 3
    dropout = node.args[place] if len(node.args) > place else node.kwargs.get("dropout_p", 0.0)
    return node.target == torch.ops.graphopt.attention.default or (isinstance(dropout, float) and dropout == 0.0)


def form_attention(groups: Groups, node: Node) -> None:
    """Make the region of an attention, unless something other than its output is used."""
    tensors = [n.meta["val"] for n in node.all_input_nodes]
    floats = {t.dtype for t in tensors[:3]}
    if len(floats) != 1 or not floats <= {torch.float32, torch.float16, torch.bfloat16}:
        return
    if any(t.dim() != 4 for t in tensors[:3]):
        return
    members = [node]
    if not isinstance(node.meta["val"], torch.Tensor):
        picks = list(node.users)
        if len(picks) != 1 or picks[0].target is not operator.getitem or picks[0].args[1] != 0:
            return
        members.append(picks[0])
    groups.new("attention", members)
