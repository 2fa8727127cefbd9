"""Writes at loaded indices, as reads: an element of the result asks each of a few indices whether it is meant.

The indices are asked in their order, so that of several that name one place the last counts, or all are added up one
after the other, as eager does on the CPU; nothing is atomic, and the same graph gives the same bits each time. Every
element asks every index: `row_ops.is_few` lets through what is cheaper than to write the result twice. Indices outside
of their dimension are not written (eager raises there).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node

from graphopt.backends.triton import expressions
from graphopt.backends.triton.evaluate import Evaluator, Guard, Value
from graphopt.backends.triton.printer import text_of
from graphopt.backends.triton.region import Unsupported
from graphopt.index_map import Index, broadcast_index
from graphopt.row_ops import is_few, scattered

aten = torch.ops.aten


def scatter(e: Evaluator, node: Node, index: Index, guard: Guard | None) -> Value:
    """scatter and scatter_add: along one dimension, each index has a place of its own in the other dimensions."""
    operand, dim, indices, source = node.args[:4]
    assert isinstance(operand, Node) and isinstance(indices, Node) and isinstance(dim, int)
    if node.kwargs.get("reduce") is not None or len(node.args) > 4:
        raise Unsupported("a scatter with a reduction")
    result = e.value(operand, index, guard)
    if not index:
        index, sizes, axis = (sympy.Integer(0),), (sympy.Integer(1),), 0
    else:
        sizes, axis = _as_vector(e.region.sizes(indices)), dim % len(index)
    shapes = zip(sizes, _as_vector(e.region.sizes(operand)), strict=True)
    limits = [(d, size) for d, (size, whole) in enumerate(shapes) if d != axis and size != whole]
    for place in range(_few(node)):
        at = (*index[:axis], sympy.Integer(place), *index[axis + 1 :])
        inside = guard
        for d, size in limits:
            position, uses = e.index_text(index[d])
            inside = e.also(f"({position}) < {text_of(size, True)}", uses, inside)
        hit = _hit(e, [(indices, _of(e, indices, at), index[axis], None)], inside)
        result = _put(e, node, result, hit, _source(e, source, at, hit), "add" in str(node.target))
    return result


def index_along(e: Evaluator, node: Node, index: Index, guard: Guard | None) -> Value:
    """index_copy, index_add and index_fill: a list of indices names slices of one dimension."""
    operand, dim, indices, source = node.args[:4]
    assert isinstance(operand, Node) and isinstance(indices, Node) and isinstance(dim, int)
    result = e.value(operand, index, guard)
    index = index or (sympy.Integer(0),)
    axis = dim % len(index)
    alpha = node.kwargs.get("alpha", 1)
    if not isinstance(alpha, (int, float)):
        raise Unsupported("a symbolic alpha")
    for place in range(_few(node)):
        at = (*index[:axis], sympy.Integer(place), *index[axis + 1 :])
        hit = _hit(e, [(indices, _of(e, indices, (sympy.Integer(place),)), index[axis], None)], guard)
        given = _source(e, source, at, hit)
        if alpha != 1:
            dtype = node.meta["val"].dtype
            factor = expressions.literal(alpha % 256 if dtype == torch.uint8 else alpha)
            text = f"{expressions.convert(given.text, given.dtype, dtype)} * {factor}"
            given = e.settle(expressions.rounded(text, dtype), dtype, given.uses)
        result = _put(e, node, result, hit, given, "add" in str(node.target))
    return result


def index_put(e: Evaluator, node: Node, index: Index, guard: Guard | None) -> Value:
    """x[i, :, j] = values: the index tensors broadcast; their dimensions come first unless they stand side by side."""
    operand, listed, values = node.args[:3]
    assert isinstance(operand, Node) and isinstance(listed, (list, tuple)) and isinstance(values, Node)
    adds = bool(node.args[3] if len(node.args) > 3 else node.kwargs.get("accumulate", False))
    given = {dim: tensor for dim, tensor in enumerate(listed) if isinstance(tensor, Node)}
    result = e.value(operand, index, guard)
    sizes, dims = e.region.sizes(operand), sorted(given)
    others = [index[d] for d in range(len(index)) if d not in given]
    first = dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0
    _few(node)
    for place in itertools.product(*map(range, scattered(node))):
        own = tuple(sympy.Integer(p) for p in place)
        asked = [(given[d], broadcast_index(own, e.region.sizes(given[d])), index[d], sizes[d]) for d in dims]
        hit = _hit(e, asked, guard)
        at = (*others[:first], *own, *others[first:])
        result = _put(e, node, result, hit, e.operand(values, at, hit), adds)
    return result


def _few(node: Node) -> int:
    """How many indices there are, along the dimension that is written."""
    if not is_few(node):
        raise Unsupported("a scatter of many indices, or of a symbolic number")
    return int(scattered(node)[0])


def _as_vector(sizes: Index) -> Index:
    return sizes or (sympy.Integer(1),)


def _of(e: Evaluator, node: Node, at: Index) -> Index:
    """An index in a tensor that may be a single number."""
    return at if e.region.sizes(node) else ()


def _hit(e: Evaluator, asked: Sequence[tuple[Node, Index, sympy.Expr, Any]], guard: Guard | None) -> Guard:
    """A guard that holds where each loaded index names this element; with a size, negative ones count from the end."""
    for indices, at, wanted, size in asked:
        value = e.operand(indices, at, guard)
        if value.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            raise Unsupported(f"indices of dtype {value.dtype}")
        position, uses = e.index_text(wanted)
        test = f"{value.text} == ({position})"
        if size is not None:
            test = f"({test}) | ({value.text} + {text_of(size, True)} == ({position}))"
        guard = e.also(test, value.uses | uses, guard)
    assert guard is not None
    return guard


def _source(e: Evaluator, source: Any, at: Index, guard: Guard) -> Value:
    if isinstance(source, Node) and isinstance(source.meta["val"], torch.Tensor):
        return e.value(source, _of(e, source, at), guard)
    return e.operand(source, (), guard)


def _put(e: Evaluator, node: Node, result: Value, hit: Guard, given: Value, adds: bool) -> Value:
    """The element after one more index."""
    dtype = node.meta["val"].dtype
    text = expressions.convert(given.text, given.dtype, dtype)
    if not given.text.isidentifier():  # a number
        text = f"tl.full([], {given.text}, {expressions.CARRIERS[dtype]})"
    if adds:
        joined = f"({result.text} | {text})" if dtype == torch.bool else f"({result.text} + {text})"
        text = expressions.rounded(joined, dtype)
    uses = result.uses | hit[1] | given.uses
    return e.settle(f"tl.where({hit[0]}, {text}, {result.text})", dtype, uses)
