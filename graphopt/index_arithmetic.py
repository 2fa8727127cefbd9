"""Arithmetic on indices: division and remainder of non-negative integers, simplified by the ranges of index symbols.

The simplifier removes a division or a remainder only when the range of every index symbol (`Ranges`) proves it away;
sizes are positive integers and nothing else is assumed of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch

Ranges = Mapping[sympy.Symbol, sympy.Expr]
"""The size of each index symbol: the symbol takes the values 0 .. size - 1."""


class _Division(sympy.Function):  # type: ignore[misc]  # sympy has no types
    """Of a non-negative integer by a positive one. part: 0 is the quotient, 1 the remainder."""

    nargs = (2,)
    is_integer = True
    is_nonnegative = True
    part: int

    @classmethod
    def eval(cls, dividend: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr | None:
        if divisor == 1 or dividend == 0:
            return (dividend, sympy.Integer(0))[cls.part]
        if dividend.is_Integer and divisor.is_Integer:
            return sympy.Integer(divmod(int(dividend), int(divisor))[cls.part])
        return None


class FloorDivide(_Division):
    """`a // b` of a non-negative integer and a positive one."""

    part = 0


class Remainder(_Division):
    """`a % b` of a non-negative integer and a positive one."""

    part = 1


def size_expression(size: Any) -> sympy.Expr:
    """An int or a SymInt as a sympy expression; asking it installs no guard."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        assert isinstance(expression, sympy.Expr)
        return expression
    return sympy.Integer(int(size))


def product(sizes: Sequence[sympy.Expr]) -> sympy.Expr:
    """The product of the sizes, 1 for none."""
    result: sympy.Expr = sympy.Integer(1)
    for size in sizes:
        result = result * size
    return result


def is_nonnegative(expression: sympy.Expr) -> bool:
    """Is the polynomial at least 0 for all positive integer sizes? `False` also when it cannot be told."""
    expression = sympy.expand(expression)
    if expression.is_Integer:
        return bool(expression >= 0)
    if not expression.is_polynomial(*expression.free_symbols):
        return False
    shifted = sympy.expand(expression.subs({s: s + 1 for s in expression.free_symbols}, simultaneous=True))
    return all(c.is_nonnegative for c in sympy.Poly(shifted, *sorted(shifted.free_symbols, key=str)).coeffs()) \
        if shifted.free_symbols else bool(shifted >= 0)


def upper_bound(expression: sympy.Expr, ranges: Ranges) -> sympy.Expr | None:
    """The largest value of a sum of products of index symbols with non-negative coefficients, `None` when unknown."""
    total: sympy.Expr = sympy.Integer(0)
    for term in sympy.Add.make_args(sympy.expand(expression)):
        bound: sympy.Expr = sympy.Integer(1)
        for factor in sympy.Mul.make_args(term):
            if factor.is_Integer:
                if factor < 0:
                    return None
                bound *= factor
            elif factor in ranges:
                bound *= ranges[factor] - 1
            elif isinstance(factor, Remainder):
                bound *= factor.args[1] - 1
            elif isinstance(factor, FloorDivide):
                inner = upper_bound(factor.args[0], ranges)
                if inner is None or not (inner.is_Integer and factor.args[1].is_Integer):
                    return None
                bound *= int(inner) // int(factor.args[1])
            elif factor.is_Symbol and factor.is_positive:
                bound *= factor
            else:
                return None
        total += bound
    return sympy.expand(total)


def lies_between(place: sympy.Expr, begin: sympy.Expr, end: sympy.Expr, ranges: Ranges) -> bool:
    """Is an index known to lie in begin .. end - 1? What has an upper bound is a sum that begins at its constant."""
    highest = upper_bound(place, ranges)
    lowest = sympy.expand(place).as_coeff_Add()[0]
    return highest is not None and is_nonnegative(lowest - begin) and is_nonnegative(end - 1 - highest)


def _split(expression: sympy.Expr, divisor: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """`expression` as `quotient * divisor + rest`, term by term."""
    quotient, rest = [], []
    for term in sympy.Add.make_args(sympy.expand(expression)):
        ratio = term / divisor
        if sympy.fraction(ratio)[1] == 1:
            quotient.append(ratio)
        else:
            rest.append(term)
    return sympy.Add(*quotient), sympy.Add(*rest)


def _stays_below(expression: sympy.Expr, limit: sympy.Expr, ranges: Ranges) -> bool:
    bound = upper_bound(expression, ranges)
    return bound is not None and is_nonnegative(limit - 1 - bound)


def floor_divide(expression: sympy.Expr, divisor: sympy.Expr, ranges: Ranges) -> sympy.Expr:
    """`expression // divisor`, simplified by the ranges."""
    quotient, rest = _split(expression, divisor)
    if rest == 0 or _stays_below(rest, divisor, ranges):
        return quotient
    for common in _divisors_of(rest, divisor):  # (32 * a + b) // 64 with b < 32 is a // 2
        coarse, fine = _split(rest, common)
        below = fine == 0 or _stays_below(fine, common, ranges)
        if below and upper_bound(coarse, ranges) is not None:
            return quotient + floor_divide(coarse, divisor / common, ranges)
    if upper_bound(rest, ranges) is None:
        return FloorDivide(expression, divisor)
    return quotient + FloorDivide(rest, divisor)


def _divisors_of(expression: sympy.Expr, divisor: sympy.Expr) -> list[sympy.Expr]:
    """Coefficients of terms that divide an integer divisor, largest first."""
    if not divisor.is_Integer:
        return []
    found = {term.as_coeff_Mul()[0] for term in sympy.Add.make_args(expression) if not term.is_Integer}
    return sorted((c for c in found if c.is_Integer and c > 1 and divisor % c == 0), reverse=True)


def remainder(expression: sympy.Expr, divisor: sympy.Expr, ranges: Ranges) -> sympy.Expr:
    """`expression % divisor`, simplified by the ranges."""
    _, rest = _split(expression, divisor)
    if rest == 0 or _stays_below(rest, divisor, ranges):
        return rest
    if upper_bound(rest, ranges) is None:
        return Remainder(expression, divisor)
    return Remainder(rest, divisor)
