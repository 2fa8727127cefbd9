"""Let every attention be a region of its own; views of its operands (a transposed or repeated cache) go with it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

import graphopt.ops  # noqa: F401  (registers the dialect)
from graphopt.passes.fuse.groups import Groups

aten = torch.ops.aten

ATTENTIONS: frozenset[Any] = frozenset({
    torch.ops.graphopt.attention.default, aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten.scaled_dot_product_attention.default,
})


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
