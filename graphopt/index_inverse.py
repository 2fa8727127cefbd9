"""Index maps turned round: from an element of an operand to the place at which a chain of views shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx import Node

from graphopt.index_arithmetic import FloorDivide, Ranges, Remainder
from graphopt.index_map import IDENTITIES, RESHAPES, Index, operand_index, reshape_index

aten = torch.ops.aten

ONE_TO_ONE = RESHAPES | IDENTITIES | {aten.permute.default, aten.transpose.int, aten.t.default}
"""The views that show every element of the operand once, so that the place of each is known."""


def base_of(node: Node) -> Node:
    """The first node behind a chain of one-to-one views; the node itself if it is none."""
    while node.target in ONE_TO_ONE:
        operand = node.args[0]
        assert isinstance(operand, Node)
        node = operand
    return node


def shown_index(node: Node, index: Index, sizes: Callable[[Node], Index], ranges: Ranges) -> Index:
    """Where a chain of one-to-one views that ends in `node` shows the element that has `index` in `base_of(node)`.

    sizes: the sizes of a node's value; ranges: the sizes of the index symbols.
    """
    if node.target not in ONE_TO_ONE:
        return index
    operand = node.args[0]
    assert isinstance(operand, Node)
    return shown_by(node, shown_index(operand, index, sizes, ranges), sizes, ranges)


def shown_by(view: Node, index: Index, sizes: Callable[[Node], Index], ranges: Ranges) -> Index:
    """Where a one-to-one view shows the element of its operand that has `index`."""
    operand = view.args[0]
    assert isinstance(operand, Node)
    if view.target in RESHAPES:
        return reshape_index(index, sizes(operand), sizes(view), ranges)
    if view.target is aten.permute.default:
        order: Any = view.args[1]
        return tuple(index[dim % len(index)] for dim in order)
    return operand_index(view, index, sizes(view), sizes(operand), ranges)  # its own inverse


def rejoin(expression: sympy.Expr) -> sympy.Expr:
    """The expression with c * d * (x // d) + c * (x % d) written as c * x."""
    expression = sympy.expand(expression)
    for quotient in sorted(expression.atoms(FloorDivide), key=str):
        whole, divisor = quotient.args
        rest = Remainder(whole, divisor)
        outer, inner = expression.coeff(quotient), expression.coeff(rest)
        if inner != 0 and sympy.expand(outer - inner * divisor) == 0:
            expression = sympy.expand(expression - outer * quotient - inner * rest + inner * whole)
    return expression
