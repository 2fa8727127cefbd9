"""Compute once what is computed several times.

    a = permute(w, [1, 0]);  b = permute(w, [1, 0]);  mm(x, a) + mm(x, b)
becomes
    a = permute(w, [1, 0]);  m = mm(x, a);  m + m

Nodes are equal if target and arguments are. Never merged: random numbers, uninitialised memory, what reads or is
written memory, and fresh tensors that both reach the caller, who may write into one of them.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import fx

from graphopt import edit, views
from graphopt.pipeline import graph_pass

aten = torch.ops.aten

_UNINITIALISED = ("aten::empty", "aten::new_empty", "aten::resize", "prims::empty")


@graph_pass(exactness="bitwise", stage="canonicalize")
def merge_common_nodes(graph_module: fx.GraphModule) -> int:
    """Let users of a repeated node use its first occurrence."""
    exposure = views.Exposure(graph_module.graph)
    first: dict[Hashable, fx.Node] = {}
    count = 0
    for node in list(graph_module.graph.nodes):
        if not _is_repeatable(node, exposure):
            continue
        earlier = first.setdefault(_key(node), node)
        if earlier is node:
            continue
        if not exposure.may_become(node, earlier):
            edit.refuse(node, f"it and the equal {earlier.name} are results of the graph that must stay apart")
            continue
        with edit.rewriting(graph_module, node) as rewrite:
            rewrite.replace(node, earlier)
        if rewrite.applied:
            exposure.became(node, earlier)
        count += rewrite.applied
    return count


def _is_repeatable(node: fx.Node, exposure: views.Exposure) -> bool:
    """Whether the node gives the same whenever it is computed, and has a value to compare by."""
    if node.op != "call_function" or edit.is_impure(node) or not node.users:
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return False
    if isinstance(node.target, torch._ops.OpOverload) and node.target.name().startswith(_UNINITIALISED):
        return False
    return not any(views.storage(source) in exposure.written for source in node.all_input_nodes)


def _key(node: fx.Node) -> Hashable:
    return node.target, _frozen(node.args), _frozen(node.kwargs)


def _frozen(argument: Any) -> Hashable:
    """An argument as a dictionary key. 1, 1.0 and True differ (the result's dtype does), as do 0.0 and -0.0."""
    if isinstance(argument, (list, tuple)):
        return tuple(_frozen(item) for item in argument)
    if isinstance(argument, dict):
        return tuple((name, _frozen(item)) for name, item in argument.items())
    if isinstance(argument, slice):
        return ("slice", _frozen((argument.start, argument.stop, argument.step)))
    if isinstance(argument, (bool, int, float, complex)):
        return type(argument), repr(argument)
    hashable: Hashable = argument
    return hashable
