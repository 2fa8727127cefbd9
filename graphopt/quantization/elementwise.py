"""Quantised weights in views and elementwise operators alone: what generated kernels compute inside of a product.

The numbers are those of `Scheme.unpack` and of the operations' meanings, bit for bit. What differs is how they come
about: nothing is looked up in a table, bytes of e4m3 are taken apart as integers, and parameters are spread over the
elements of their groups by views, so that the codes are read where they lie and one parameter for a whole group.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from graphopt import _compat
from graphopt.quantization import codecs
from graphopt.quantization.schemes import Scheme


def weight(scheme: Scheme, packed: Sequence[Tensor], columns: int) -> Tensor:
    """The weight [N, columns] in float32 of a scheme with groups."""
    data, *parameters = packed
    codes = (codecs.from_nibbles(data) if scheme.bits == 4 else data)[:, :columns]
    shared = scheme.shared or (1,) * len(parameters)
    spread = [
        part[..., None].expand(*part.shape, scheme.group * every).flatten(1)[:, :columns]
        for part, every in zip(parameters, shared, strict=True)
    ]
    decode = _WITHOUT_TABLES.get(scheme.decode, scheme.decode)
    # Each element as a group of its own: the codes need not be brought into groups.
    return decode(codes[..., None], spread)[..., 0]


def whole_bytes(data: Tensor) -> Tensor:
    """The codes of a scheme with one scale for a row: int8, or the bytes of e4m3, uint8."""
    return data.view(torch.uint8) if data.dtype == torch.float8_e4m3fn else data


@dataclasses.dataclass(frozen=True)
class Float8:
    """A format of eight bits: how many its mantissa has, and what its exponents are counted from.

    most: the code of infinity (`infinite`) or of the largest number; codes above it are NaN.
    """

    mantissa: int
    bias: int
    most: int
    infinite: bool


FLOAT8 = {
    torch.float8_e4m3fn: Float8(3, 7, 0x7E, False),
    torch.float8_e5m2: Float8(2, 15, 0x7C, True),
}
"""The formats that are computed as bytes."""


def codes(data: Tensor, dtype: torch.dtype) -> Tensor:
    """What `whole_bytes` stand for as floating point numbers; float16 and bfloat16 hold them all."""
    if data.dtype != torch.uint8:
        return data.to(dtype)
    return from_float8(data, torch.float8_e4m3fn).to(dtype)


def from_float8(data: Tensor, dtype: torch.dtype) -> Tensor:
    """What the bytes of a format stand for, in float32."""
    how, bits = FLOAT8[dtype], data.int()
    # Sign, exponent and mantissa where float32 has them; then the exponents are counted from another number.
    magnitude = ((bits & 127) << (23 - how.mantissa)).view(torch.float32) * 2.0 ** (127 - how.bias)
    if how.infinite:
        magnitude = torch.where((bits & 127) == how.most, torch.inf, magnitude)
    signed = torch.where(bits > 127, -magnitude, magnitude)
    return torch.where((bits & 127) > how.most, torch.nan, signed)


@functools.cache
def _too_large(dtype: torch.dtype) -> int:
    """The code that torch gives to what is too large: for e4m3 NaN or, in newer versions, the largest number."""
    with _compat.real_execution():
        return int(torch.tensor([torch.inf]).to(dtype).view(torch.uint8))


def to_float8(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of the nearest number of a format, the even one of two, to each float32, as torch casts."""
    how, bits = FLOAT8[dtype], value.view(torch.int32)
    magnitude, step = bits & 0x7FFFFFFF, 23 - how.mantissa
    # A carry out of the mantissa runs into the exponent, which is right.
    rounded = magnitude + ((1 << (step - 1)) - 1) + ((magnitude >> step) & 1)
    normal = (rounded - ((127 - how.bias) << 23)) >> step
    # Below the least normal number they lie equally far apart.
    small = (value.abs() * 2.0 ** (how.bias - 1 + how.mantissa)).round().int()
    code = torch.where(value.abs() < 2.0 ** (1 - how.bias), small, normal).clamp_max(_too_large(dtype))
    code = torch.where(value.isnan(), 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(torch.uint8)


def rounded_rows(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Codes [..., K] of each row of x, int8 or e4m3 as bfloat16, which holds them; scales [..., 1] in float32."""
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True)
    scale = largest / (127 if kind == "int8" else codecs.FP8_MAX)
    units = wide / torch.where(scale == 0, 1.0, scale)
    if kind == "int8":
        return units.round().clamp(-127, 127).to(torch.int8), scale
    return _to_e4m3(units.clamp(-codecs.FP8_MAX, codecs.FP8_MAX)).bfloat16(), scale


def _to_e4m3(value: Tensor) -> Tensor:
    """The nearest number of e4m3, the even one of two, to each float32 of magnitude 448 at most."""
    bits = value.view(torch.int32)
    # Three bits of the mantissa stay: a carry runs into the exponent, which is right. Below 2**-6 numbers lie equally
    # far apart.
    near = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).view(torch.float32)
    return torch.where(value.abs() < 2.0**-6, (value * 512).round() / 512, near)


def _nf4_decode(codes: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    return _chosen(codecs.NF4_VALUES, codes) * parameters[0].float()[..., None]


def _chosen(values: Sequence[float], codes: Tensor) -> Tensor:
    """Of sixteen values the one that each code names, by one question for each of its bits."""
    level: list[Tensor | float] = list(values)
    for bit in range(4):
        test = (codes & (1 << bit)) != 0
        level = [torch.where(test, high, low) for low, high in zip(level[::2], level[1::2], strict=True)]
    (found,) = level
    assert isinstance(found, Tensor)
    return found.float()


def _mxfp4_decode(codes: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    count = (codes & 7).float()
    # 0, 0.5, 1, 1.5, 2, 3, 4, 6: the largest of three straight lines.
    magnitude = torch.maximum(torch.maximum(count * 0.5, count - 2), count * 2 - 8)
    biased = parameters[0].int()
    # A power of two is its exponent in place; 2**-127 has none, and is half of the least number that has one.
    power = torch.where(biased == 0, 0x400000, biased << 23).view(torch.float32)
    scale = torch.where(biased == 255, torch.nan, power)
    return torch.where(codes > 7, -magnitude, magnitude) * scale[..., None]


Decode = Callable[[Tensor, Sequence[Tensor]], Tensor]
_WITHOUT_TABLES: dict[Decode, Decode] = {codecs.NF4[2]: _nf4_decode, codecs.MXFP4[2]: _mxfp4_decode}
