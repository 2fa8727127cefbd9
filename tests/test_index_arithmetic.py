"""Division of indices, simplified by the ranges of their symbols, against plain integers."""

from __future__ import annotations

import itertools

import pytest
import sympy

from graphopt.index_arithmetic import floor_divide, remainder

o, p, i = sympy.symbols("o p i", integer=True, nonnegative=True)
RANGES = {o: sympy.Integer(7), p: sympy.Integer(2), i: sympy.Integer(16)}


@pytest.mark.parametrize("divisor", [1, 2, 6, 16, 32, 48, 64, 96, 256])
@pytest.mark.parametrize(
    "place", [32 * o + 16 * p + i, 16 * o + i, 24 * o + 5 * i + 3, o + 7 * i, 32 * o + 16 * p - i + 15]
)
def test_division_and_remainder_are_those_of_integers(place: sympy.Expr, divisor: int) -> None:
    quotient, rest = (f(place, sympy.Integer(divisor), RANGES) for f in (floor_divide, remainder))
    for values in itertools.product(*(range(int(size)) for size in RANGES.values())):
        known = {s: sympy.Integer(v) for s, v in zip(RANGES, values, strict=True)}
        assert divmod(int(place.xreplace(known)), divisor) == (quotient.xreplace(known), rest.xreplace(known))


def test_the_number_of_a_group_needs_no_place_within_it() -> None:
    assert floor_divide(32 * o + 16 * p + i, sympy.Integer(32), RANGES) == o
    assert floor_divide(32 * o + 16 * p + i, sympy.Integer(64), RANGES).free_symbols == {o}
