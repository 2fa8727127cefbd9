"""Reads at loaded indices: embedding, index_select, gather and advanced indexing.

A loaded index is checked before it is used: outside of its dimension nothing is read (eager raises there; a GPU's eager
kernels assert). Negative indices count from the end where eager lets them.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from graphopt.backends.triton import expressions
from graphopt.backends.triton.evaluate import Evaluator, Guard, Value
from graphopt.backends.triton.printer import text_of
from graphopt.backends.triton.region import Unsupported
from graphopt.index_map import Index, broadcast_index


def _checked(e: Evaluator, indices: Node, index: Index, size: sympy.Expr, guard: Guard | None, wrap: bool) -> Any:
    """A loaded index as a symbol, and the guard that it lies in the dimension; negative ones count from the end."""
    value = e.operand(indices, index, guard)
    if value.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise Unsupported(f"indices of dtype {value.dtype}")
    limit = text_of(size, True)
    if wrap:
        value = e.settle(f"tl.where({value.text} < 0, {value.text} + {limit}, {value.text})", value.dtype, value.uses)
    elif not value.text.isidentifier():
        value = e.settle(f"{value.text} + 0", value.dtype, value.uses)
    test = e.also(f"({value.text} >= 0) & ({value.text} < {limit})", value.uses, guard)
    return e.as_symbol(value, size), test


def embedding(e: Evaluator, node: Node, index: Index, guard: Guard | None) -> Value:
    """Rows of a table."""
    weight, indices = node.args[:2]
    assert isinstance(weight, Node) and isinstance(indices, Node)
    row, test = _checked(e, indices, index[:-1], e.region.sizes(weight)[0], guard, wrap=False)
    return e.value(weight, (row, index[-1]), test)


def index_select(e: Evaluator, node: Node, index: Index, guard: Guard | None) -> Value:
    """The slices of one dimension that a list of indices names."""
    operand, dim, indices = node.args[:3]
    assert isinstance(operand, Node) and isinstance(indices, Node) and isinstance(dim, int)
    if not index:
        return e.value(operand, index, guard)
    axis = dim % len(index)
    place = (index[axis],) if indices.meta["val"].dim() else ()
    row, test = _checked(e, indices, place, e.region.sizes(operand)[axis], guard, wrap=False)
    return e.value(operand, (*index[:axis], row, *index[axis + 1 :]), test)


def gather(e: Evaluator, node: Node, index: Index, guard: Guard | None) -> Value:
    """One element for each index, along a dimension."""
    operand, dim, indices = node.args[:3]
    assert isinstance(operand, Node) and isinstance(indices, Node) and isinstance(dim, int)
    rank = operand.meta["val"].dim()
    if not rank:
        return e.value(operand, (), guard)
    if len(index) != rank and index and e.region.numel(indices) == 0:  # of another rank only where there is nothing
        dtype = node.meta["val"].dtype
        return e.settle(f"tl.full([], 0, {expressions.CARRIERS[dtype]})", dtype, frozenset())
    axis = dim % rank
    row, test = _checked(e, indices, index, e.region.sizes(operand)[axis], guard, wrap=False)
    return e.value(operand, (*index[:axis], row, *index[axis + 1 :]), test)


def advanced_index(e: Evaluator, node: Node, index: Index, guard: Guard | None) -> Value:
    """x[i, :, j]: the index tensors broadcast; their dimensions come first unless they stand side by side."""
    operand, listed = node.args[0], node.args[1]
    assert isinstance(operand, Node) and isinstance(listed, (list, tuple))
    sizes = e.region.sizes(operand)
    given = {dim: tensor for dim, tensor in enumerate(listed) if isinstance(tensor, Node)}
    if any(t.meta["val"].dtype == torch.bool for t in given.values()):
        raise Unsupported("an index by a mask: its size depends on the data")
    rank = max(t.meta["val"].dim() for t in given.values())
    dims = sorted(given)
    first = dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0
    own = index[first : first + rank]
    others = iter((*index[:first], *index[first + rank :]))
    moved: list[sympy.Expr] = []
    for dim, size in enumerate(sizes):
        if dim in given:
            tensor = given[dim]
            row, guard = _checked(e, tensor, broadcast_index(own, e.region.sizes(tensor)), size, guard, wrap=True)
            moved.append(row)
        else:
            moved.append(next(others))
    return e.value(operand, tuple(moved), guard)
