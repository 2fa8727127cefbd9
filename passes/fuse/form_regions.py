"""Cut the graph into regions that become one kernel each, so that every value crosses memory as seldom as possible.

Example input (a residual, a norm, two linears and a gate):

    h = add(x, y);  wide = to_float(h);  scale = rsqrt(add(mean(pow(wide, 2)), eps));  n = to_bf16(mul(wide, scale))
    g, u = parallel_linear(n, [wg, wu]);  a = mul(silu(g), u)

becomes

    h, n = region_0(x, y)            # rows: reads x and y once, writes h and n once
    a = region_1(n, wg, wu)          # linear with its gate

1. A contraction takes the elementwise nodes behind it (bias, activation, gate, residual, codes: `expand_float8.py`)
   into its region, rotary embedding, other joins of its columns and norms of groups of them too (`joined_columns.py`),
   and before it what makes an operand from fewer bytes (`operands.py`): weights that are dequantised, after
   `expand_quantized.py`.
2. The other fusable nodes join their producers' regions when the rules of `joining.py` hold and no cycle appears.
3. With few rows, a region of rows whose only reader is a contraction becomes that contraction's prologue.
4. A write of new rows into a cache ends the region that makes the rows (`writes.py`).
5. Attention computes masks from positions (`score_functions.py`).
6. Independent regions share one launch: elementwise ones between the same neighbours, and reductions over the same rows
   of one tensor, which is then read once.

Views and constants cost nothing inside of a kernel and are copied into every region that reads them. A widening cast at
the edge of a region is left to its readers: fewer bytes. What is not fusable stays as it is.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from graphopt import edit
from graphopt.cost import CostModel
from graphopt.passes.fuse.attention_regions import ATTENTIONS, erase_unread, form_attention
from graphopt.passes.fuse.contractions import CONTRACTIONS, absorb_prologues
from graphopt.passes.fuse.epilogues import absorb_readers
from graphopt.passes.fuse.expand_float8 import expand_float8
from graphopt.passes.fuse.expand_quantized import expand_quantized
from graphopt.passes.fuse.expand_rows import expand_rows
from graphopt.passes.fuse.extract import extract
from graphopt.passes.fuse.groups import Group, Groups, consumers, producers
from graphopt.passes.fuse.joining import group_rows, itemsize, may_join
from graphopt.passes.fuse.operands import absorb_operands
from graphopt.passes.fuse.score_functions import generate_masks
from graphopt.passes.fuse.sharing import share_launches
from graphopt.passes.fuse.worth import Worth
from graphopt.passes.fuse.writes import is_write, refuse_others
from graphopt.pipeline import graph_pass
from graphopt.row_ops import CONSTANTS, ELEMENTWISE, is_fusable, is_pick, is_view

LARGEST = 200
"""Nodes in a region at most: a kernel must stay readable, and its compile time bounded."""


@graph_pass(exactness="rounding", stage="fuse", training=False)
def form_regions(graph_module: GraphModule, *, cost_model: CostModel | None = None) -> int:
    """Replace fusable parts of the graph by `call_module` regions; returns how many regions were made.

    cost_model: what joins only if it says that this takes no longer; the rules below must allow it as well.
    """
    edit.eliminate_dead_code(graph_module)
    erase_unread(graph_module.graph)
    expand_rows(graph_module)
    look_ups = expand_quantized(graph_module)
    expand_float8(graph_module)
    refuse_others(graph_module.graph)
    masks = generate_masks(graph_module)
    groups = Groups(graph_module.graph, Worth(graph_module, cost_model) if cost_model is not None else None)
    for nodes in look_ups:
        groups.new("rows", [node for node in nodes if _joins_rows(node)])
    for node in graph_module.graph.nodes:
        if node.target in CONTRACTIONS:
            absorb_readers(groups, node)
            absorb_operands(groups, node)
        elif node.target in ATTENTIONS:
            form_attention(groups, node, masks.get(node, []))
    for node in graph_module.graph.nodes:
        if _joins_rows(node) and node not in groups.of:
            _join(groups, node)
    _leave_widening_to_readers(groups)
    absorb_prologues(groups)
    share_launches(groups, LARGEST)
    return extract(graph_module, groups)


def _joins_rows(node: Node) -> bool:
    if is_write(node):
        return True
    return is_fusable(node) and node.target not in CONSTANTS and (not is_view(node) or is_pick(node))


def _join(groups: Groups, node: Node) -> None:
    """Let a node join the regions that make its operands, one after the other; else it starts a region."""
    joined: Group | None = None
    for producer in producers(node):
        group = groups.of.get(producer)
        if group is None or group is joined or group.kind != "rows" or len(group.nodes) >= LARGEST:
            continue
        if joined is None:
            if may_join(node, group) and groups.may_be_one(group.nodes, [node]):
                groups.join(group, [node])
                joined = group
        elif _may_merge(joined, group, node) and groups.may_be_one(joined.nodes, group.nodes):
            groups.join(joined, list(group.nodes))
    if joined is None:
        groups.new("rows", [node])


def _may_merge(joined: Group, other: Group, node: Node) -> bool:
    """May another producer's region be merged into the one that a node has joined?"""
    rows, theirs = group_rows(joined), group_rows(other)
    return (rows is None or theirs is None or rows == theirs) and may_join(node, other)


def _leave_widening_to_readers(groups: Groups) -> None:
    """Take a node out of its region again when its operand is no larger and its readers can compute it."""
    for group in groups.all():
        for node in reversed(list(group.nodes)):
            if node.target not in ELEMENTWISE or len(group.nodes) == 1:
                continue
            readers = consumers(node)
            inner = [p for p in producers(node) if p in group.nodes]
            outside = [r for r in readers if r not in group.nodes]
            if outside != readers or not readers or len(inner) != 1 or len(producers(node)) != 1:
                continue
            regions = {id(groups.of[r]) for r in readers if r in groups.of}
            all_rows = all(r in groups.of and groups.of[r].kind == "rows" for r in readers)
            if all_rows and len(regions) == 1 and itemsize(inner[0]) <= itemsize(node):
                reader = groups.of[readers[0]]
                groups.remove(node)
                if groups.makes_cycle([*reader.nodes, node]):
                    groups.join(group, [node])
                else:
                    groups.join(reader, [node])
