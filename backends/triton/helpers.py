"""Small device functions that generated kernels call; a file of kernels begins with those it uses.

Each is plain Triton source, kept as text because a generated file must run alone.
"""

from __future__ import annotations

HELPERS: dict[str, str] = {
    "floor_divide_integer": '''
@triton.jit
def floor_divide_integer(a, b):
    """Quotient rounded towards minus infinity; Triton's own rounds towards zero."""
    quotient = a // b
    return tl.where((a % b != 0) & ((a < 0) != (b < 0)), quotient - 1, quotient)
''',
    "remainder_integer": '''
@triton.jit
def remainder_integer(a, b):
    """Remainder with the divisor's sign; Triton's own has the dividend's."""
    rest = a % b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)
''',
    "floor_divide_float": '''
@triton.jit
def floor_divide_float(a, b):
    """Floor of the quotient, as ATen computes it: from fmod, so that rounding cannot step over an integer."""
    rest = libdevice.fmod(a, b)
    quotient = (a - rest) / b
    quotient = tl.where((rest != 0) & ((b < 0) != (rest < 0)), quotient - 1, quotient)
    down = tl.floor(quotient)
    down = tl.where(quotient - down > 0.5, down + 1, down)
    down = tl.where(quotient == 0, libdevice.copysign(tl.zeros_like(quotient), a / b), down)
    return tl.where(b == 0, a / b, down)
''',
    "remainder_float": '''
@triton.jit
def remainder_float(a, b):
    """Remainder with the divisor's sign."""
    rest = libdevice.fmod(a, b)
    return tl.where((rest != 0) & ((b < 0) != (rest < 0)), rest + b, rest)
''',
    "power_integer": '''
@triton.jit
def power_integer(base, exponent):
    """Integer power by squaring; a negative exponent gives 0, or 1 and -1 for a base of 1 and -1."""
    base = base + tl.zeros_like(exponent)
    exponent = exponent + tl.zeros_like(base)
    result = tl.full(base.shape, 1, base.dtype)
    square = base
    left = tl.where(exponent < 0, 0, exponent)
    for _ in range(31):
        result = tl.where(left % 2 == 1, result * square, result)
        square = square * square
        left = left // 2
    negative = tl.where(base == 1, 1, tl.where(base == -1, tl.where(exponent % 2 == 0, 1, -1), 0))
    return tl.where(exponent < 0, negative, result)
''',
    "shift_left": '''
@triton.jit
def shift_left(a, b):
    """Left shift; a count outside of the type's bits gives 0."""
    bits: tl.constexpr = a.dtype.primitive_bitwidth
    inside = (b >= 0) & (b < bits)
    return tl.where(inside, a << tl.where(inside, b, 0), 0)
''',
    "shift_right": '''
@triton.jit
def shift_right(a, b):
    """Arithmetic right shift; a count outside of the type's bits fills with the sign."""
    bits: tl.constexpr = a.dtype.primitive_bitwidth
    inside = (b >= 0) & (b < bits)
    return a >> tl.where(inside, b, bits - 1)
''',
    "row_max": '''
@triton.jit
def row_max(values):
    """The largest value of each row; NaN if there is one (tl.max drops NaN)."""
    largest = tl.max(values, 1, keep_dims=True)
    bad = tl.max((values != values).to(tl.int32), 1, keep_dims=True)
    return tl.where(bad != 0, float("nan"), largest)
''',
    "row_min": '''
@triton.jit
def row_min(values):
    """The smallest value of each row; NaN if there is one (tl.min drops NaN)."""
    smallest = tl.min(values, 1, keep_dims=True)
    bad = tl.max((values != values).to(tl.int32), 1, keep_dims=True)
    return tl.where(bad != 0, float("nan"), smallest)
''',
    "multiply": '''
@triton.jit
def multiply(a, b):
    """The combining step of a product."""
    return a * b
''',
}


def in_order(names: set[str]) -> list[str]:
    """The sources of the named helpers, in the table's order."""
    return [source for name, source in HELPERS.items() if name in names]
