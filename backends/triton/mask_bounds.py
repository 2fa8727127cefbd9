"""Which keys a computed mask can let a query see: bounds for the walk over keys, read off the mask's own nodes.

    (k <= q + c) & (k > q - w) & padding[b, k]        at most c behind the query, at least 1 - w; padding bounds nothing

A Boolean mask hides what one of the parts of a conjunction hides, so that parts which are not understood do no harm; of
a disjunction only what bounds all of its parts is left. Only Boolean masks: -inf that is added does not hide a NaN.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import sympy
import torch
from torch.fx import Node

from graphopt.backends.triton.region import Region
from graphopt.index_map import VIEWS, Index, broadcast_index, operand_index

aten = torch.ops.aten
prims = torch.ops.prims

BATCH, HEAD, QUERY, KEY = PLACES = sympy.symbols("batch head query key", integer=True, nonnegative=True)

_AND = (aten.bitwise_and.Tensor, aten.logical_and.default, aten.mul.Tensor, prims.bitwise_and.default)
_OR = (aten.bitwise_or.Tensor, aten.logical_or.default, prims.bitwise_or.default)
_NOT = (aten.bitwise_not.default, aten.logical_not.default)
_SUMS = (aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar)
_PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar)
_CASTS = (prims.convert_element_type.default, aten._to_copy.default)
_WIDE = (torch.int64, torch.int32)
_ORDERS = {name: order for order in ("le", "lt", "ge", "gt")
           for name in (getattr(getattr(aten, order), kind) for kind in ("Tensor", "Scalar"))}
_OPPOSITE = {"le": "gt", "lt": "ge", "ge": "lt", "gt": "le"}


@dataclasses.dataclass(frozen=True)
class Bound:
    """A limit for the keys that a query may see: `offset`, from the query on if it `moves` with it."""

    offset: sympy.Expr
    moves: bool = True


@dataclasses.dataclass(frozen=True)
class Bounds:
    """last: limits that no key which is seen lies beyond; first: limits that none lies before. Each of them holds."""

    first: frozenset[Bound] = frozenset()
    last: frozenset[Bound] = frozenset()

    def __and__(self, other: Bounds) -> Bounds:
        return Bounds(self.first | other.first, self.last | other.last)

    def __or__(self, other: Bounds) -> Bounds:
        return Bounds(self.first & other.first, self.last & other.last)


def bounds_of(region: Region, mask: Node) -> Bounds:
    """The bounds of a mask that broadcasts to [B, H, S, T]; none for a mask that is added or read from memory."""
    if mask.meta["val"].dtype != torch.bool:
        return Bounds()
    return _seen(region, mask, broadcast_index(PLACES, region.sizes(mask)))


def _seen(region: Region, node: Node, index: Index, hidden: bool = False) -> Bounds:
    """What bounds the keys at which a Boolean node is true; `hidden`: at which it is false."""
    if node.op != "call_function" or node.meta["val"].dtype != torch.bool:
        return Bounds()
    if node.target in VIEWS or node.target in _CASTS:
        operand = node.args[0]
        assert isinstance(operand, Node)
        return _seen(region, operand, _operand_index(region, node, index), hidden)
    if node.target in _NOT:
        operand = node.args[0]
        assert isinstance(operand, Node)
        return _seen(region, operand, broadcast_index(index, region.sizes(operand)), not hidden)
    if node.target in _AND or node.target in _OR:
        parts = [_seen(region, n, broadcast_index(index, region.sizes(n)), hidden) if isinstance(n, Node) else Bounds()
                 for n in node.args[:2]]
        return parts[0] & parts[1] if (node.target in _AND) != hidden else parts[0] | parts[1]
    if node.target in _ORDERS:
        order = _ORDERS[node.target]
        return _compared(region, node, index, _OPPOSITE[order] if hidden else order)
    return Bounds()


def _compared(region: Region, node: Node, index: Index, order: str) -> Bounds:
    left, right = (_number(region, operand, index) for operand in node.args[:2])
    if left is None or right is None:
        return Bounds()
    less = left - right if order in ("le", "lt") else right - left
    less = sympy.expand(less + (1 if order in ("lt", "gt") else 0))  # at most 0 where the comparison holds
    by_key, by_query = less.coeff(KEY), less.coeff(QUERY)
    rest = sympy.expand(less - by_key * KEY - by_query * QUERY)
    if rest.free_symbols & set(PLACES) or by_key not in (1, -1) or by_query not in (0, -by_key):
        return Bounds()
    bound = frozenset({Bound(sympy.expand(-by_key * rest), bool(by_query != 0))})
    return Bounds(last=bound) if by_key == 1 else Bounds(first=bound)


def _number(region: Region, operand: Any, index: Index) -> sympy.Expr | None:
    """An integer of the mask as an expression of the place and of sizes; None where it is not known."""
    if isinstance(operand, (bool, float)):
        return None
    if not isinstance(operand, Node) or not isinstance(operand.meta["val"], torch.Tensor):
        value = operand.meta["val"] if isinstance(operand, Node) else operand
        return region.size(value) if isinstance(value, (int, torch.SymInt)) else None
    node, args = operand, operand.args
    if node.op != "call_function" or node.meta["val"].dtype not in _WIDE:
        return None
    index = broadcast_index(index, region.sizes(node))
    if node.target in VIEWS or node.target in _CASTS:
        return _number(region, args[0], _operand_index(region, node, index))
    if node.target is prims.iota.default:
        return _progression(region, index, node.kwargs["start"], node.kwargs["step"])
    if node.target in (aten.full.default, aten.scalar_tensor.default):
        return _number(region, args[0 if node.target is aten.scalar_tensor.default else 1], ())
    if node.target in _SUMS + _PRODUCTS and len(args) == 2 and node.kwargs.get("alpha", 1) == 1:
        left, right = (_number(region, each, index) for each in args)
        if left is None or right is None:
            return None
        if node.target in _PRODUCTS:
            return sympy.expand(left * right)
        return left - right if "sub" in str(node.target) else left + right
    return None


def _progression(region: Region, index: Index, start: Any, step: Any) -> sympy.Expr | None:
    first, by = _number(region, start, ()), _number(region, step, ())
    return None if first is None or by is None else sympy.expand(index[0] * by + first)


def _operand_index(region: Region, node: Node, index: Index) -> Index:
    operand = node.args[0]
    assert isinstance(operand, Node)
    if node.target in _CASTS:
        return index
    ranges = {place: size for place, size in zip(index, region.sizes(node), strict=True) if place.is_Symbol}
    return operand_index(node, index, region.sizes(node), region.sizes(operand), ranges)
