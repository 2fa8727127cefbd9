"""Say, for every ATen operator that only moves data, which element of its operand an element of its result is.

An *index* is a tuple of sympy expressions, one for each dimension of a tensor. `operand_index` takes the index of an
element of a view's result and answers the index of the same element in the view's operand, so that a chain of views
costs a fused kernel nothing but arithmetic on indices. Sizes are sympy expressions too: a symbolic size stays symbolic.

    permute([1, 0])          (i, j)    -> (j, i)
    view [S, H] -> [S*H]     (k,)      -> (k // H, k % H)
    slice(dim=0, start=3)    (i, j)    -> (i + 3, j)
    expand [1, H] -> [S, H]  (i, j)    -> (0, j)

Indices are simplified by the ranges of their symbols (`index_arithmetic`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node

from graphopt.index_arithmetic import Ranges, Remainder, floor_divide, product, remainder, size_expression

aten = torch.ops.aten
prims = torch.ops.prims

Index = tuple[sympy.Expr, ...]


def flatten(index: Sequence[sympy.Expr], sizes: Sequence[sympy.Expr]) -> sympy.Expr:
    """The position of an element in row-major order."""
    position: sympy.Expr = sympy.Integer(0)
    for i, size in zip(index, sizes, strict=True):
        position = position * size + i
    return sympy.expand(position)


def unflatten(position: sympy.Expr, sizes: Sequence[sympy.Expr], ranges: Ranges) -> Index:
    """The index of the element at a row-major position; the inverse of `flatten`."""
    index: list[sympy.Expr] = []
    for dim, size in enumerate(sizes):
        inner = product(sizes[dim + 1 :])
        if size == 1:
            index.append(sympy.Integer(0))
        else:
            digit = floor_divide(position, inner, ranges)
            leading = all(s == 1 for s in sizes[:dim])
            index.append(digit if leading else remainder(digit, size, ranges))
    return tuple(index)


def reshape_index(index: Index, new: Sequence[sympy.Expr], old: Sequence[sympy.Expr], ranges: Ranges) -> Index:
    """The index in the shape `old` of the element that has `index` in the shape `new` (same elements, row-major).

    Dimensions are matched in groups of equal products, so that a view that only splits or merges a few dimensions
    leaves the other indices untouched.
    """
    result: list[sympy.Expr] = []
    i = j = 0
    while i < len(new) or j < len(old):
        group_new: list[int] = []
        group_old: list[int] = []
        total_new: sympy.Expr = sympy.Integer(1)
        total_old: sympy.Expr = sympy.Integer(1)
        while True:
            if j < len(old) and (not group_old or old[j] == 1):
                group_old.append(j)
                total_old *= old[j]
                j += 1
            elif i < len(new) and (not group_new or new[i] == 1):
                group_new.append(i)
                total_new *= new[i]
                i += 1
            elif total_new == total_old:
                break
            elif i < len(new) and sympy.fraction(total_old / (total_new * new[i]))[1] == 1:
                group_new.append(i)
                total_new *= new[i]
                i += 1
            elif j < len(old):
                group_old.append(j)
                total_old *= old[j]
                j += 1
            else:
                group_new += range(i, len(new))
                i = len(new)
                break
        sizes_new = [new[k] for k in group_new]
        sizes_old = [old[k] for k in group_old]
        result += unflatten(flatten([index[k] for k in group_new], sizes_new), sizes_old, ranges)
    return tuple(result)


def broadcast_index(index: Index, sizes: Sequence[sympy.Expr]) -> Index:
    """The index an operand of shape `sizes` is read at when it is broadcast to the shape `index` belongs to."""
    tail = index[len(index) - len(sizes) :]
    return tuple(sympy.Integer(0) if size == 1 else i for i, size in zip(tail, sizes, strict=True))


RESHAPES = frozenset({
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.squeeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.unsqueeze.default, aten.flatten.using_ints, aten.unflatten.int, aten._reshape_alias.default,
})
"""Operators whose result has the operand's elements in the operand's row-major order."""

IDENTITIES = frozenset({
    aten.alias.default, aten.detach.default, aten.clone.default, aten.contiguous.default, aten.lift_fresh_copy.default,
    aten.lift.default, aten.view_of.default if hasattr(aten, "view_of") else aten.alias.default,
})
"""Operators whose result equals the operand element by element (perhaps in another memory layout)."""

MOVES = frozenset({
    aten.permute.default, aten.transpose.int, aten.t.default, aten.expand.default, aten.slice.Tensor, aten.select.int,
    aten.flip.default, aten.diagonal.default, aten.repeat.default, aten.roll.default, aten.unfold.default,
    prims.broadcast_in_dim.default, prims.rev.default,
})
VIEWS = RESHAPES | IDENTITIES | MOVES
"""Every operator that `operand_index` knows."""

ALIASING_VIEWS = VIEWS - {
    aten.clone.default, aten.contiguous.default, aten.lift_fresh_copy.default, aten.flip.default, aten.repeat.default,
    aten.roll.default, prims.rev.default,
} | {aten.view.dtype}
"""The views whose result shares the operand's memory: by themselves they move nothing."""


def operand_index(node: Node, index: Index, result: Index, operand: Index, ranges: Ranges) -> Index:
    """The index in the operand of the element that has `index` in the result of a view `node`.

    `result` and `operand` are the sizes of the two. Raises KeyError for an operator that is not in `VIEWS`.
    """
    if node.target in IDENTITIES:
        return index
    if node.target in RESHAPES:
        return reshape_index(index, result, operand, ranges)
    moves: Mapping[Any, Callable[[Node, Index, Index, Ranges], Index]] = _MOVES
    return moves[node.target](node, index, operand, ranges)


def _axis(dim: int, rank: int) -> int:
    return dim % rank if rank else 0


def _settings(node: Node, *defaults: Any) -> list[Any]:
    """The arguments behind the operand, filled up with defaults."""
    given = list(node.args[1:])
    return given + list(defaults[len(given) :])


def _permute(node: Node, index: Index, operand: Index, ranges: Ranges) -> Index:
    moved: list[sympy.Expr] = [sympy.Integer(0)] * len(operand)
    for here, dim in enumerate(node.args[1]):  # type: ignore[arg-type]
        moved[_axis(dim, len(operand))] = index[here]
    return tuple(moved)


def _transpose(node: Node, index: Index, operand: Index, ranges: Ranges) -> Index:
    moved = list(index)
    if len(moved) > 1:
        a, b = (0, 1) if node.target == aten.t.default else (_axis(d, len(operand)) for d in node.args[1:3])  # type: ignore[arg-type]
        moved[a], moved[b] = moved[b], moved[a]
    return tuple(moved)


def _slice(node: Node, index: Index, operand: Index, ranges: Ranges) -> Index:
    dim, start, _, step = _settings(node, 0, None, None, 1)
    axis = _axis(int(dim), len(operand))
    begin = _clamped_start(0 if start is None else start, operand[axis])
    stride = size_expression(_value(step))
    return (*index[:axis], sympy.expand(index[axis] * stride + begin), *index[axis + 1 :])


def _clamped_start(start: Any, size: sympy.Expr) -> sympy.Expr:
    """Where a slice begins: negative counts from the end, and both ends are clamped to the dimension."""
    begin = size_expression(_value(start))
    if not begin.is_Integer:
        return begin
    if begin < 0:
        if size.is_Integer:
            return sympy.Integer(max(0, int(size) + int(begin)))
        return sympy.Max(0, size + begin)
    if begin == 0:
        return begin
    return sympy.Integer(min(int(begin), int(size))) if size.is_Integer else sympy.Min(begin, size)


def _value(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, Node) else argument


def _select(node: Node, index: Index, operand: Index, ranges: Ranges) -> Index:
    axis = _axis(int(node.args[1]), len(operand))  # type: ignore[arg-type]
    at = size_expression(_value(node.args[2]))
    if at.is_Integer and at < 0:
        at = operand[axis] + at
    return (*index[:axis], at, *index[axis:])


def _expand(node: Node, index: Index, operand: Index, ranges: Ranges) -> Index:
    return broadcast_index(index, operand)


def _broadcast_in_dim(node: Node, index: Index, operand: Index, ranges: Ranges) -> Index:
    picked = tuple(index[int(d)] for d in node.args[2])  # type: ignore[arg-type, union-attr]
    return broadcast_index(picked, operand)


def _flip(node: Node, index: Index, operand: Index, ranges: Ranges) -> Index:
    axes = {_axis(int(d), len(operand)) for d in node.args[1]}  # type: ignore[arg-type, union-attr]
    return tuple(operand[d] - 1 - i if d in axes else i for d, i in enumerate(index))


def _diagonal(node: Node, index: Index, operand: Index, ranges: Ranges) -> Index:
    offset, dim1, dim2 = _settings(node, 0, 0, 1)
    a, b = _axis(int(dim1), len(operand)), _axis(int(dim2), len(operand))
    rest = iter(index[:-1])
    along = index[-1]
    shift = int(offset)
    return tuple(
        along + max(0, -shift) if d == a else along + max(0, shift) if d == b else next(rest)
        for d in range(len(operand))
    )


def _repeat(node: Node, index: Index, operand: Index, ranges: Ranges) -> Index:
    tail = index[len(index) - len(operand) :]
    return tuple(
        sympy.Integer(0) if size == 1 else remainder(i, size, ranges) for i, size in zip(tail, operand, strict=True)
    )


def _roll(node: Node, index: Index, operand: Index, ranges: Ranges) -> Index:
    shifts, dims = _settings(node, None, [])
    if not dims:
        position = flatten(index, operand)
        shift = size_expression(shifts[0])
        total = product(operand)
        return unflatten(Remainder(position + _steps_back(shift, total), total), operand, ranges)
    moved = list(index)
    for shift, dim in zip(shifts, dims, strict=True):
        axis = _axis(int(dim), len(operand))
        back = _steps_back(size_expression(shift), operand[axis])
        moved[axis] = Remainder(moved[axis] + back, operand[axis])
    return tuple(moved)


def _steps_back(shift: sympy.Expr, size: sympy.Expr) -> sympy.Expr:
    """`-shift` modulo the size, written without a negative dividend: a GPU's remainder has the dividend's sign."""
    return Remainder(-shift, size) if shift.is_nonpositive else size - Remainder(shift, size)


def _unfold(node: Node, index: Index, operand: Index, ranges: Ranges) -> Index:
    axis, step = _axis(int(node.args[1]), len(operand)), int(node.args[3])  # type: ignore[arg-type]
    *rest, within = index
    return tuple(i * step + within if d == axis else i for d, i in enumerate(rest))


_MOVES = {
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _transpose,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.flip.default: _flip,
    prims.rev.default: _flip,
    aten.diagonal.default: _diagonal,
    aten.repeat.default: _repeat,
    aten.roll.default: _roll,
    aten.unfold.default: _unfold,
    prims.broadcast_in_dim.default: _broadcast_in_dim,
}
