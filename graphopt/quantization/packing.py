"""Packs at call time: a weight is packed at the first call that needs it and again when it has changed."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.errors import WeightsReleasedError
from graphopt.quantization import operations, release, schemes
from graphopt.runtime import packs, prologue

_AT_ONCE = 1 << 22
"""Elements of a weight that are packed at a time."""


@prologue.call_time(operations.quantize_weight, packs_weights=True)
@packs.packed
def pack_weight(
    weight: Tensor, scheme: str, scale: Tensor | None = None, *, transposed: bool = False, rounding: str = ""
) -> list[Tensor]:
    """`graphopt.quantize_weight` under the guard of `runtime.packs`."""
    if release.is_released(weight):
        raise WeightsReleasedError(
            f"a weight of shape {tuple(weight.shape)} was released and has no pack as {scheme!r}: compile with the"
            " options that were in force when it was released, or load the weights again"
        )
    weight = weight.detach()
    if rounding:
        rounded: list[Tensor] = operations.quantize_weight(
            weight, scheme, scale, transposed=transposed, rounding=rounding
        )
        return rounded
    # Rows are packed by themselves, into memory that is there first: what is computed on the way is several times as
    # large as the rows in float32, and a result between one such and the next would keep its memory from going back.
    rows = (weight.mT if transposed else weight).flatten(0, -2)
    layout = schemes.named(scheme).layout(rows.shape[0], rows.shape[1])
    packed = [torch.empty(shape, dtype=dtype, device=rows.device) for shape, dtype in layout]
    at_once = max(1, _AT_ONCE // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], at_once):
        some = slice(start, start + at_once)
        for whole, part in zip(packed, operations.quantize_weight(rows[some], scheme, scale), strict=True):
            whole[some] = part
    return packed


@prologue.call_time(operations.input_scales, packs_weights=True)
@packs.packed
def pack_scales(weights: list[Tensor], scheme: str, rounding: str, *, transposed: bool = False) -> list[Tensor]:
    """`graphopt.input_scales` under the guard of `runtime.packs`."""
    detached = [weight.detach() for weight in weights]
    scales: list[Tensor] = operations.input_scales(detached, scheme, rounding, transposed=transposed)
    return scales
