"""Let every attention be a region of its own; views of its operands (a transposed or repeated cache) go with it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

import graphopt.ops  # noqa: F401  (registers the dialect)
from graphopt.lowering import arguments
from graphopt.passes.fuse.groups import Groups
from graphopt.quantization.cache_operations import attention_quantized
from graphopt.runtime.kv_paged import attention_paged

aten = torch.ops.aten

DIALECT: frozenset[Any] = frozenset({
    torch.ops.graphopt.attention.default, attention_paged, attention_quantized,
})
ATTENTIONS: frozenset[Any] = DIALECT | frozenset({
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten.scaled_dot_product_attention.default,
})


def erase_unread(graph: Graph) -> None:
    """Erase attention that nothing reads: torch counts it as random, but without dropout it draws nothing."""
    for node in reversed(list(graph.nodes)):
        if node.target in ATTENTIONS and not node.users and _has_no_dropout(node):
            graph.erase_node(node)


def _has_no_dropout(node: Node) -> bool:
    dropout = arguments(node).get("dropout_p", 0.0)
    return isinstance(dropout, float) and dropout == 0.0


def _rows(node: Node) -> list[Any]:
    """The query, and the keys and values or what holds their newest rows."""
    if node.target not in DIALECT:
        return list(node.args[:3])
    given = arguments(node)
    return [given["q"], *(given.get(side) or given[f"{side}_tail"] for side in "kv")]


def mask_of(node: Node) -> Node | None:
    """The mask of an attention, if it has one."""
    given = arguments(node)
    mask = given["mask" if node.target in DIALECT else "attn_mask"]
    return mask if isinstance(mask, Node) else None


def has_kernel(node: Node) -> bool:
    """Floating point operands of one dtype and four dimensions, and nothing but the output is used."""
    rows = [argument.meta["val"] for argument in _rows(node)]
    floats = {t.dtype for t in rows}
    if len(floats) != 1 or not floats <= {torch.float32, torch.float16, torch.bfloat16}:
        return False
    picks = list(node.users)
    single = isinstance(node.meta["val"], torch.Tensor)
    first = len(picks) == 1 and picks[0].target is operator.getitem and picks[0].args[1] == 0
    return all(t.dim() == 4 for t in rows) and bool(single or first)


def form_attention(groups: Groups, node: Node, mask: list[Node]) -> None:
    """Make the region of an attention, if it has a kernel. mask: the nodes of its mask that the kernel computes."""
    if has_kernel(node):
        single = isinstance(node.meta["val"], torch.Tensor)
        groups.new("attention", [*mask, node, *([] if single else node.users)])
