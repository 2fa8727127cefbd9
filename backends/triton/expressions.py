"""The table from pointwise ATen operators to Triton expressions, with eager's dtype rules.

Every value of a kernel has a *logical* dtype, eager's, and lives in a *carrier*: float16 and bfloat16 values are
carried as float32 that has been rounded to the logical dtype wherever eager rounds; all other dtypes carry themselves.
An operator converts its operands to the dtype it computes in (`computes`), applies its template to the carriers, and
rounds unless its result is one of its operands (`exact`).

NaN, infinities and signs follow eager: max, min, clamp and relu let NaN through, integer division rounds as asked,
remainder takes the divisor's sign and fmod the dividend's. Sources: ATen's native/cuda kernels and type promotion.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

aten = torch.ops.aten
prims = torch.ops.prims

CARRIERS: dict[torch.dtype, str] = {
    torch.float64: "tl.float64",
    torch.float32: "tl.float32",
    torch.float16: "tl.float32",
    torch.bfloat16: "tl.float32",
    torch.int64: "tl.int64",
    torch.int32: "tl.int32",
    torch.int16: "tl.int16",
    torch.int8: "tl.int8",
    torch.uint8: "tl.uint8",
    torch.bool: "tl.int1",
}
"""The dtypes that kernels handle, and the Triton type that carries each."""

STORED: dict[torch.dtype, str] = {**CARRIERS, torch.float16: "tl.float16", torch.bfloat16: "tl.bfloat16"}
"""The Triton type of each dtype in memory."""

ROUNDED = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one operator is computed.

    template: Triton text with {0}, {1} ... for the operands' carriers, or a function of their texts.
    computes: "result" (operands become the result's dtype), "promoted" (their common dtype), "operand" (as they are)
    or "float" (as "promoted", integers as float32).
    exact: the result is an operand's value or its sign flipped, so that rounding it again changes nothing.
    operands: how many leading arguments are operands; the others are `settings` handled by the template function.
    """

    template: str | Callable[[Sequence[str], torch.dtype], str]
    computes: str = "result"
    exact: bool = False
    helpers: tuple[str, ...] = ()

    def text(self, operands: Sequence[str], dtype: torch.dtype) -> str:
        """The expression for operands of carrier texts `operands`, computed in `dtype`."""
        if callable(self.template):
            return self.template(operands, dtype)
        return self.template.format(*operands)


def literal(value: Any) -> str:
    """A number as Triton text. Only numbers pass: nothing of a graph can reach the source as code.

    Raises TypeError for anything else.
    """
    if isinstance(value, bool):
        return "True" if value else "False"
    if isinstance(value, int):
        return repr(int(value)) if value >= 0 else f"({int(value)!r})"
    if isinstance(value, float):
        if math.isnan(value) or math.isinf(value):
            return f"float({str(float(value))!r})"
        return repr(float(value)) if not math.copysign(1, value) < 0 else f"({float(value)!r})"
    raise TypeError(f"not a number: {value!r}")


def is_float(dtype: torch.dtype) -> bool:
    """Is it a floating point dtype?"""
    return dtype.is_floating_point


def convert(text: str, source: torch.dtype, target: torch.dtype) -> str:
    """The carrier `text` of a `source` value converted to `target`, rounded as eager's `to` rounds."""
    if source == target:
        return text
    if target == torch.bool:
        return f"({text} != 0)"
    if target in ROUNDED and source in (torch.int8, torch.uint8, torch.bool):
        return f"{text}.to(tl.float32)"  # which both hold exactly
    if target in ROUNDED:
        wide = text if CARRIERS[source] == "tl.float32" else f"{text}.to(tl.float32)"
        return f"{wide}.to({STORED[target]}).to(tl.float32)"
    if CARRIERS[source] == CARRIERS[target]:
        return text
    if target == torch.uint8 and is_float(source):
        return f"{text}.to(tl.int64).to(tl.uint8)"
    return f"{text}.to({CARRIERS[target]})"


def rounded(text: str, dtype: torch.dtype) -> str:
    """The carrier `text` rounded to `dtype` after a computation."""
    if dtype in ROUNDED:
        return f"({text}).to({STORED[dtype]}).to(tl.float32)"
    if dtype in (torch.int8, torch.int16, torch.uint8):
        return f"({text}).to({CARRIERS[dtype]})"
    return text


def _choose(float_text: str, integer_text: str) -> Callable[[Sequence[str], torch.dtype], str]:
    """One template for floating point, another for integers."""
    return lambda operands, dtype: (float_text if is_float(dtype) else integer_text).format(*operands)


def _precise(float32_text: str, other_text: str) -> Callable[[Sequence[str], torch.dtype], str]:
    """One template for what is carried in float32, another for float64."""
    return lambda operands, dtype: (other_text if dtype == torch.float64 else float32_text).format(*operands)


def _logical(operator_text: str) -> Rule:
    return Rule(f"(({{0}} != 0) {operator_text} ({{1}} != 0))", "operand", exact=True)


def _library(name: str, arguments: int = 1) -> Rule:
    listed = ", ".join(f"{{{i}}}" for i in range(arguments))
    return Rule(f"libdevice.{name}({listed})", "float" if arguments == 1 else "result")


_DIVIDE = _precise("tl.div_rn({0}, {1})", "({0} / {1})")
_MAXIMUM = "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"
_MINIMUM = "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"
_LARGER = _choose(_MAXIMUM, "tl.maximum({0}, {1})")
_SMALLER = _choose(_MINIMUM, "tl.minimum({0}, {1})")
_NEGATE = Rule("(-{0})", exact=True)


def _sign(operands: Sequence[str], dtype: torch.dtype) -> str:
    if dtype in (torch.bool, torch.uint8):
        return f"({operands[0]} != 0).to({CARRIERS[dtype]})"
    kind = CARRIERS[dtype]
    return f"(({operands[0]} > 0).to({kind}) - ({operands[0]} < 0).to({kind}))"


def _absolute(operands: Sequence[str], dtype: torch.dtype) -> str:
    return operands[0] if dtype in (torch.bool, torch.uint8) else f"tl.abs({operands[0]})"


def _complement(operands: Sequence[str], dtype: torch.dtype) -> str:
    return f"({operands[0]} == 0)" if dtype == torch.bool else f"(~{operands[0]})"


def _nan(operands: Sequence[str], dtype: torch.dtype) -> str:
    return f"({operands[0]} != {operands[0]})"


def _infinite(operands: Sequence[str], dtype: torch.dtype) -> str:
    if not is_float(dtype):
        return f"({operands[0]} != {operands[0]})"
    return f"(tl.abs({operands[0]}) == float('inf'))"


def _modulo(operands: Sequence[str], dtype: torch.dtype) -> str:
    if dtype in (torch.uint8, torch.bool):
        return f"({operands[0]} % {operands[1]})"
    name = "remainder_float" if is_float(dtype) else "remainder_integer"
    return f"{name}({operands[0]}, {operands[1]})"


def _floor_quotient(operands: Sequence[str], dtype: torch.dtype) -> str:
    if dtype in (torch.uint8, torch.bool):
        return f"({operands[0]} // {operands[1]})"
    name = "floor_divide_float" if is_float(dtype) else "floor_divide_integer"
    return f"{name}({operands[0]}, {operands[1]})"


def _truncated_quotient(operands: Sequence[str], dtype: torch.dtype) -> str:
    if not is_float(dtype):
        return f"({operands[0]} // {operands[1]})"
    return f"libdevice.trunc({rounded(_DIVIDE(operands, dtype), dtype)})"


def _arithmetic(symbol: str, boolean: str) -> Callable[[Sequence[str], torch.dtype], str]:
    return lambda operands, dtype: (boolean if dtype == torch.bool else f"({{0}} {symbol} {{1}})").format(*operands)


def _power(operands: Sequence[str], dtype: torch.dtype) -> str:
    if is_float(dtype):
        return f"libdevice.pow({operands[0]}, {operands[1]})"
    return f"power_integer({operands[0]}, {operands[1]})"


FLOOR_HELPERS = ("floor_divide_float", "floor_divide_integer")
REMAINDER_HELPERS = ("remainder_float", "remainder_integer")

TABLE: dict[Any, Rule] = {
    aten.add.Tensor: Rule(_arithmetic("+", "({0} | {1})")),
    aten.sub.Tensor: Rule("({0} - {1})"),
    aten.mul.Tensor: Rule(_arithmetic("*", "({0} & {1})")),
    aten.div.Tensor: Rule(_DIVIDE),
    aten.true_divide.Tensor: Rule(_DIVIDE),
    "div_floor": Rule(_floor_quotient, helpers=FLOOR_HELPERS),
    "div_trunc": Rule(_truncated_quotient),
    aten.floor_divide.default: Rule(_floor_quotient, helpers=FLOOR_HELPERS),
    aten.remainder.Tensor: Rule(_modulo, helpers=REMAINDER_HELPERS),
    aten.remainder.Scalar: Rule(_modulo, helpers=REMAINDER_HELPERS),
    aten.remainder.Scalar_Tensor: Rule(_modulo, helpers=REMAINDER_HELPERS),
    aten.fmod.Tensor: Rule(_choose("libdevice.fmod({0}, {1})", "({0} % {1})")),
    aten.fmod.Scalar: Rule(_choose("libdevice.fmod({0}, {1})", "({0} % {1})")),
    aten.pow.Tensor_Tensor: Rule(_power, helpers=("power_integer",)),
    aten.pow.Tensor_Scalar: Rule(_power, helpers=("power_integer",)),
    aten.pow.Scalar: Rule(_power, helpers=("power_integer",)),
    aten.maximum.default: Rule(_LARGER, exact=True),
    aten.minimum.default: Rule(_SMALLER, exact=True),
    aten.fmax.default: Rule("tl.maximum({0}, {1})", exact=True),
    aten.fmin.default: Rule("tl.minimum({0}, {1})", exact=True),
    aten.clamp_min.default: Rule(_LARGER, exact=True),
    aten.clamp_max.default: Rule(_SMALLER, exact=True),
    aten.clamp_min.Tensor: Rule(_LARGER, exact=True),
    aten.clamp_max.Tensor: Rule(_SMALLER, exact=True),
    prims.div.default: Rule(lambda operands, dtype: _truncated_quotient(operands, dtype) if not is_float(dtype)
                            else _DIVIDE(operands, dtype)),
    aten.atan2.default: _library("atan2", 2),
    aten.hypot.default: _library("hypot", 2),
    aten.nextafter.default: _library("nextafter", 2),
    aten.copysign.Tensor: Rule("libdevice.copysign({0}, {1})", exact=True),
    aten.copysign.Scalar: Rule("libdevice.copysign({0}, {1})", exact=True),
    aten.bitwise_and.Tensor: Rule("({0} & {1})"),
    aten.bitwise_or.Tensor: Rule("({0} | {1})"),
    aten.bitwise_xor.Tensor: Rule("({0} ^ {1})"),
    prims.bitwise_and.default: Rule("({0} & {1})"),
    prims.bitwise_or.default: Rule("({0} | {1})"),
    prims.bitwise_xor.default: Rule("({0} ^ {1})"),
    aten.bitwise_left_shift.Tensor: Rule("shift_left({0}, {1})", helpers=("shift_left",)),
    aten.bitwise_right_shift.Tensor: Rule("shift_right({0}, {1})", helpers=("shift_right",)),
    aten.bitwise_not.default: Rule(_complement),
    aten.logical_not.default: Rule("({0} == 0)", "operand", exact=True),
    aten.logical_and.default: _logical("&"),
    aten.logical_or.default: _logical("|"),
    aten.logical_xor.default: _logical("^"),
    aten.eq.Tensor: Rule("({0} == {1})", "promoted"),
    aten.ne.Tensor: Rule("({0} != {1})", "promoted"),
    aten.lt.Tensor: Rule("({0} < {1})", "promoted"),
    aten.le.Tensor: Rule("({0} <= {1})", "promoted"),
    aten.gt.Tensor: Rule("({0} > {1})", "promoted"),
    aten.ge.Tensor: Rule("({0} >= {1})", "promoted"),
    aten.neg.default: _NEGATE,
    aten.abs.default: Rule(_absolute, exact=True),
    aten.sign.default: Rule(_sign, exact=True),
    aten.sgn.default: Rule(_sign, exact=True),
    aten.signbit.default: Rule(_choose("(libdevice.signbit({0}) != 0)", "({0} < 0)"), "operand"),
    aten.isnan.default: Rule(_nan, "operand"),
    aten.isinf.default: Rule(_infinite, "operand"),
    aten.relu.default: Rule("tl.where({0} < 0, 0, {0})", exact=True),
    aten.ldexp.Tensor: Rule("({0} * tl.exp2({1}))"),
    aten.square.default: Rule("({0} * {0})"),
    aten.reciprocal.default: Rule(_precise("tl.div_rn(tl.full([], 1.0, tl.float32), {0})", "(1.0 / {0})")),
    aten.sqrt.default: Rule(_precise("tl.sqrt_rn({0})", "tl.sqrt({0})")),
    aten.rsqrt.default: Rule("tl.rsqrt({0})"),
    aten.exp.default: Rule("tl.exp({0})"),
    aten.exp2.default: Rule("tl.exp2({0})"),
    aten.log.default: Rule("tl.log({0})"),
    aten.log2.default: Rule("tl.log2({0})"),
    aten.sin.default: Rule("tl.sin({0})"),
    aten.cos.default: Rule("tl.cos({0})"),
    aten.erf.default: Rule("tl.erf({0})"),
    aten.sigmoid.default: Rule(_precise("tl.div_rn(tl.full([], 1.0, tl.float32), 1.0 + tl.exp(-{0}))",
                                        "(1.0 / (1.0 + tl.exp(-{0})))")),
    aten.silu.default: Rule(_precise("tl.div_rn({0}, 1.0 + tl.exp(-{0}))", "({0} / (1.0 + tl.exp(-{0})))")),
    aten.floor.default: Rule(_choose("tl.floor({0})", "{0}"), exact=True),
    aten.ceil.default: Rule(_choose("tl.ceil({0})", "{0}"), exact=True),
    aten.trunc.default: Rule(_choose("libdevice.trunc({0})", "{0}"), exact=True),
    aten.round.default: Rule(_choose("libdevice.nearbyint({0})", "{0}"), exact=True),
    **{getattr(aten, name).default: _library(name) for name in (
        "log10", "log1p", "expm1", "tan", "tanh", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh",
        "erfc", "erfinv", "lgamma",
    )},
    aten.special_erfcx.default: _library("erfcx"),
    aten.special_bessel_j0.default: _library("j0"),
    aten.special_bessel_j1.default: _library("j1"),
    aten.special_bessel_y0.default: _library("y0"),
    aten.special_bessel_y1.default: _library("y1"),
    aten.special_modified_bessel_i0.default: _library("cyl_bessel_i0"),
    aten.special_modified_bessel_i1.default: _library("cyl_bessel_i1"),
    aten.i0.default: _library("cyl_bessel_i0"),
    aten.special_i1.default: _library("cyl_bessel_i1"),
}
"""Operators whose value at an index depends on their operands' values at that index alone."""

for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    TABLE[getattr(aten, _name).Scalar] = TABLE[getattr(aten, _name).Tensor]
for _packet in (aten.add, aten.sub, aten.mul, aten.div, aten.bitwise_and, aten.bitwise_or, aten.bitwise_xor):
    TABLE[_packet.Scalar] = TABLE[_packet.Tensor]


def power_of_constant(base: str, exponent: float, dtype: torch.dtype) -> str | None:
    """`base ** exponent` as eager computes it for the exponents that it treats alone; `None` for the others."""
    if exponent == 2:
        return f"({base} * {base})"
    if exponent == 3:
        return f"({base} * {base} * {base})"
    if exponent == 1:
        return base
    if not is_float(dtype):
        return None
    if exponent == 0.5:
        return TABLE[aten.sqrt.default].text([base], dtype)
    if exponent == -0.5:
        return TABLE[aten.rsqrt.default].text([base], dtype)
    if exponent == -1:
        return TABLE[aten.reciprocal.default].text([base], dtype)
    if exponent == -2:
        return TABLE[aten.reciprocal.default].text([f"({base} * {base})"], dtype)
    return None
