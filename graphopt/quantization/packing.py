"""Packs at call time: a weight is packed at the first call that needs it and again when it has changed."""

from __future__ import annotations

from torch import Tensor

from graphopt.quantization import operations, schemes
from graphopt.runtime import packs, prologue


@prologue.call_time(operations.quantize_weight)
@packs.packed
def pack_weight(weight: Tensor, scheme: str, *, transposed: bool = False) -> list[Tensor]:
    """The packed tensors of a weight, kept under the guard of `runtime.packs`."""
    return schemes.named(scheme).pack(weight.detach().t() if transposed else weight.detach())
