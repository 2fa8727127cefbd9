"""Matrix products, and what they take into their kernel before them when there are few rows.

The prologue is the region of rows that makes the left operand, a norm above all: with at most `FEW_ROWS` rows every
program computes it again from the cache, which costs less than writing and reading it; with more rows it stays a kernel
of its own. What is behind a product is in `epilogues.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from graphopt.index_arithmetic import size_expression
from graphopt.index_map import IDENTITIES, RESHAPES
from graphopt.ops import WRITES
from graphopt.passes.fuse.groups import Group, Groups, chain, consumers, source_of
from graphopt.passes.fuse.joining import FEW_ROWS, group_rows, numel
from graphopt.row_ops import CONSTANTS, DTYPES

aten = torch.ops.aten

CONTRACTIONS: frozenset[Any] = frozenset({
    aten.mm.default, aten.addmm.default, aten.bmm.default, torch.ops.graphopt.linear.default,
    torch.ops.graphopt.parallel_linear.default,
})


def has_kernel(node: Node) -> bool:
    """Floating point operands of one dtype, which the generator's matrix kernels take."""
    values = [n.meta["val"] for n in node.all_input_nodes]
    if not all(isinstance(v, torch.Tensor) for v in values):
        return False
    dtypes = {v.dtype for v in values}
    return len(dtypes) == 1 and dtypes <= {torch.float32, torch.float16, torch.bfloat16} and dtypes <= DTYPES


def left_operand(node: Node) -> Node:
    """The operand whose rows become the product's rows."""
    operand = node.args[1] if node.target == aten.addmm.default else node.args[0]
    assert isinstance(operand, Node)
    return operand


def absorb_prologues(groups: Groups) -> None:
    """Merge a region of rows into the linear region that alone reads it, when there are few rows."""
    for group in groups.all():
        contraction = next((n for n in group.nodes if n.target in CONTRACTIONS), None)
        if contraction is None or contraction.target == aten.bmm.default:
            continue
        before = groups.of.get(_producer_of_left(contraction, group))
        if before is None or before.kind != "rows" or not _is_prologue(before, group, contraction):
            continue
        if groups.may_be_one(before.nodes, group.nodes):
            groups.join(group, list(before.nodes))


def _producer_of_left(contraction: Node, group: Group) -> Node:
    """The node that makes the left operand; views, and casts of the region itself, looked through."""
    source = source_of(left_operand(contraction))
    while source in group.nodes and source.all_input_nodes:
        source = source_of(source.all_input_nodes[0])
    return source


def _is_prologue(before: Group, group: Group, contraction: Node) -> bool:
    value = left_operand(contraction).meta["val"]
    sizes = [size_expression(s) for s in value.shape]
    rows = size_expression(1)
    for size in sizes[:-1]:
        rows = rows * size
    outputs = [n for n in before.nodes if any(r not in before.nodes for r in consumers(n))]
    private = all(r in group.nodes or r in before.nodes for n in before.nodes for r in consumers(n))
    same = group_rows(before) in (None, (rows, sizes[-1], ((), ())))
    plain = all(n.target not in CONSTANTS and n.target not in WRITES for n in before.nodes)
    views = all(v.target in RESHAPES | IDENTITIES for o in outputs for n in group.nodes for v in chain(n, o))
    left = _producer_of_left(contraction, group)
    scales = all(o is left or bool(numel(o) == rows) for o in outputs)
    return bool(rows.is_Integer and rows <= FEW_ROWS and private and same and plain and views and scales)
