"""The arithmetic of the schemes on groups of weights: parameters, codes, and back. See `schemes` for the
layouts.

Each codec is four functions (parameters, encode, decode, step) on float32 groups [N, G, B]. Scales that are
stored in float16 are rounded up, and offsets down, before codes are chosen, so that no weight falls outside
of its grid and the error never exceeds half a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Codec = tuple[
    Callable[[Tensor], list[Tensor]],
    Callable[[Tensor, Sequence[Tensor]], Tensor],
    Callable[[Tensor, Sequence[Tensor]], Tensor],
    Callable[[Sequence[Tensor]], Tensor],
]

FP8_MAX = 448.0
# 16 quantiles of the normal distribution, scaled to [-1, 1]: QLoRA (Dettmers et al., 2023), appendix E.
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
)  # fmt: skip
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def nibbles(codes: Tensor) -> Tensor:
    """Codes 0..15, uint8 [N, C] with C a multiple of 32, two to a byte: uint8 [N, C / 2]."""
    halves = codes.reshape(codes.shape[0], -1, 2, 16)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).flatten(1)


def from_nibbles(data: Tensor) -> Tensor:
    """The inverse of `nibbles`."""
    runs = data.unflatten(1, (data.shape[1] // 16, 16))
    return torch.stack((runs & 15, runs >> 4), dim=2).flatten(1)


def half_up(value: Tensor) -> Tensor:
    """The smallest float16 that is not below a value >= 0."""
    near = value.half()
    above = (near.view(torch.int16) + 1).view(torch.float16)
    return torch.where(near.float() < value, above, near)


def half_down(value: Tensor) -> Tensor:
    """The largest float16 that is not above a value of either sign."""
    near = value.half()
    bits = near.view(torch.int16)
    # Behind a rounded-off 0 comes the denormal number with the bits 0x8001.
    below = torch.where(near > 0, bits - 1, torch.where(near < 0, bits + 1, -0x7FFF)).to(torch.int16)
    return torch.where(near.float() > value, below.view(torch.float16), near)


def _divide(groups: Tensor, scale: Tensor) -> Tensor:
    """Groups in units of their scale."""
    return _in_units(groups, scale.float()[..., None])


def _in_units(values: Tensor, unit: Tensor) -> Tensor:
    # A unit of 0 (all values are zeros) counts as 1.
    return values / torch.where(unit == 0, 1.0, unit)


def _largest(groups: Tensor) -> Tensor:
    return groups.abs().amax(-1)


def _half_scale(parameters: Sequence[Tensor]) -> Tensor:
    return parameters[0].float() / 2


def _int8_parameters(groups: Tensor) -> list[Tensor]:
    return [_largest(groups) / 127]


def _int8_half_parameters(groups: Tensor) -> list[Tensor]:
    return [half_up(_largest(groups) / 127)]


def _int8_encode(groups: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    return _divide(groups, parameters[0]).round().clamp(-127, 127).to(torch.int8)


def _scaled(codes: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    return codes.float() * parameters[0].float()[..., None]


def _int4_parameters(groups: Tensor) -> list[Tensor]:
    offset = half_down(groups.amin(-1))
    return [half_up((groups.amax(-1) - offset.float()) / 15), offset]


def _int4_encode(groups: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    scale, offset = parameters
    return _divide(groups - offset.float()[..., None], scale).round().clamp(0, 15).to(torch.uint8)


def _int4_decode(codes: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    scale, offset = parameters
    return codes.float() * scale.float()[..., None] + offset.float()[..., None]


def _int4_symmetric_parameters(groups: Tensor) -> list[Tensor]:
    return [half_up(torch.maximum(groups.amax(-1) / 7, -groups.amin(-1) / 8).clamp(min=0))]


def _int4_symmetric_encode(groups: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    return (_divide(groups, parameters[0]).round().clamp(-8, 7) + 8).to(torch.uint8)


def _int4_symmetric_decode(codes: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    return (codes.float() - 8) * parameters[0].float()[..., None]


def _fp8_parameters(groups: Tensor) -> list[Tensor]:
    return [_largest(groups) / FP8_MAX]


def _fp8_encode(groups: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    return _divide(groups, parameters[0]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _fp8_step(parameters: Sequence[Tensor]) -> Tensor:
    return parameters[0] * 16  # numbers from 256 to 448 lie 32 apart


def _lookup(values: Sequence[float], codes: Tensor) -> Tensor:
    return torch.tensor(values, device=codes.device)[codes.long()]


def _nearest(values: Sequence[float], scaled: Tensor) -> Tensor:
    """The index of the nearest of ascending values."""
    middles = [(low + high) / 2 for low, high in zip(values, values[1:], strict=False)]
    return torch.bucketize(scaled.contiguous(), torch.tensor(middles, device=scaled.device)).to(torch.uint8)


def _nf4_parameters(groups: Tensor) -> list[Tensor]:
    return [half_up(_largest(groups))]


def _nf4_encode(groups: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    return _nearest(NF4_VALUES, _divide(groups, parameters[0]))


def _nf4_decode(codes: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    return _lookup(NF4_VALUES, codes) * parameters[0].float()[..., None]


def _nf4_step(parameters: Sequence[Tensor]) -> Tensor:
    return parameters[0].float() * ((NF4_VALUES[1] - NF4_VALUES[0]) / 2)


def _mxfp4_parameters(groups: Tensor) -> list[Tensor]:
    """The exponent of OCP Microscaling 1.0, or the next one if that makes a smaller squared error; 255 means
    NaN.

    With the former a weight between 6 and 8 scales is cut to 6.
    """
    largest = _largest(groups)
    _, exponent = torch.frexp(largest)
    narrow = (exponent - 3 + 127).clamp(0, 254)
    wide = (narrow + 1).clamp(max=254)
    errors = [
        (groups - _mxfp4_decode(_mxfp4_encode(groups, [tried]), [tried])).square().sum(-1) for tried in (narrow, wide)
    ]
    best = torch.where(errors[1] < errors[0], wide, narrow)
    return [torch.where(torch.isfinite(largest), best, 255).to(torch.uint8)]


def _mxfp4_scale(parameters: Sequence[Tensor]) -> Tensor:
    biased = parameters[0].int()
    return torch.where(
        biased == 255, float("nan"), torch.ldexp(torch.ones_like(biased, dtype=torch.float32), biased - 127)
    )


def _mxfp4_encode(groups: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    scaled = groups / _mxfp4_scale(parameters)[..., None]
    return _nearest(E2M1_VALUES, scaled.abs()) | (torch.signbit(scaled).to(torch.uint8) << 3)


def _mxfp4_decode(codes: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    values = (*E2M1_VALUES, *(-value for value in E2M1_VALUES))
    return _lookup(values, codes) * _mxfp4_scale(parameters)[..., None]


def _mxfp4_step(parameters: Sequence[Tensor]) -> Tensor:
    # One scale in the widest gap of the grid (4 to 6); two for a weight between 6 and 8 scales that is cut to
    # 6.
    return 2 * _mxfp4_scale(parameters)


def _q4_k_parameters(groups: Tensor) -> list[Tensor]:
    minimum, unit_of_minimums = _six_bits(-groups.amin(-1).clamp(max=0))
    raised = groups.amax(-1) + minimum * unit_of_minimums.float()
    scale, unit = _six_bits(raised / 15)
    return [scale, minimum, unit, unit_of_minimums]


def _six_bits(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values >= 0 [N, G], rounded up to 0..63 times a unit in float16 that eight of them share: counts and units."""
    count = values.shape[1]
    eights = torch.nn.functional.pad(values, (0, -count % 8)).unflatten(1, (-1, 8))
    unit = half_up(eights.amax(-1, keepdim=True) / 63)
    counts = _in_units(eights, unit.float()).ceil().clamp(max=63)
    whole = counts.nan_to_num(nan=0.0).to(torch.uint8)
    return whole.flatten(1)[:, :count], unit[..., 0].repeat_interleave(8, 1)[:, :count]


def _q4_k_scale(parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Scale and minimum of each group; both products are exact in float32."""
    scale, minimum, unit, unit_of_minimums = (part.float() for part in parameters)
    return unit * scale, unit_of_minimums * minimum


def _q4_k_encode(groups: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    scale, minimum = _q4_k_scale(parameters)
    return _divide(groups + minimum[..., None], scale).round().clamp(0, 15).to(torch.uint8)


def _q4_k_decode(codes: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    scale, minimum = _q4_k_scale(parameters)
    return codes.float() * scale[..., None] - minimum[..., None]


def _q4_k_step(parameters: Sequence[Tensor]) -> Tensor:
    return _q4_k_scale(parameters)[0] / 2


INT8: Codec = (_int8_parameters, _int8_encode, _scaled, _half_scale)
INT8_HALF: Codec = (_int8_half_parameters, _int8_encode, _scaled, _half_scale)
INT4: Codec = (_int4_parameters, _int4_encode, _int4_decode, _half_scale)
INT4_SYMMETRIC: Codec = (
    _int4_symmetric_parameters,
    _int4_symmetric_encode,
    _int4_symmetric_decode,
    _half_scale,
)
FP8: Codec = (_fp8_parameters, _fp8_encode, _scaled, _fp8_step)
NF4: Codec = (_nf4_parameters, _nf4_encode, _nf4_decode, _nf4_step)
MXFP4: Codec = (_mxfp4_parameters, _mxfp4_encode, _mxfp4_decode, _mxfp4_step)
Q4_K: Codec = (_q4_k_parameters, _q4_k_encode, _q4_k_decode, _q4_k_step)
