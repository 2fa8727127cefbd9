"""2:4 sparsity: of each four neighbouring weights of a row two are zero. Which two, and the dialect operations for it.

"magnitude" keeps the larger ones; "wanda" those whose magnitude times the norm of the input channel is larger (Sun et
al., 2023). GPUs from compute capability 8.0 on multiply such weights in half the operations (NVIDIA's semi-structured
kernels); no CPU does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.sparse import SparseSemiStructuredTensorCUTLASS

from graphopt.ops import operation
from graphopt.pruning import lines
from graphopt.quantization import rounding
from graphopt.runtime import packs, prologue

GROUP, KEPT = 4, 2
_PER_META = 16  # weights that one element of the kernels' meta data describes
_ROWS, _COLUMNS = 32, 64  # what the kernels want N and K to be multiples of


def keep_largest(scores: Tensor) -> Tensor:
    """For scores [N, K] (K a multiple of 4) which two of each four along K are the largest: bool [N, K]."""
    groups = scores.unflatten(-1, (-1, GROUP))
    chosen = groups.topk(KEPT, -1).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter(-1, chosen, True).flatten(-2)


def _sparse_shape(weight: Tensor, method: str, columns: str, transposed: bool) -> Tensor:
    return weight.new_empty(tuple(reversed(weight.shape)) if transposed else tuple(weight.shape))


@operation("(Tensor weight, str method, str columns, bool transposed) -> Tensor", _sparse_shape)
def sparsify_weight(weight: Tensor, method: str, columns: str, transposed: bool) -> Tensor:
    """A weight [N, K] (transposed: kept as [K, N]) with two of each four neighbours of a row set to zero.

    method: "magnitude", or "wanda:..." with the inputs that the rest of the text names (`rounding.spell`). columns: the
    input channels of theirs that the weight still has, as `lines.spell` writes them; "" means all.
    """
    kept = weight.t() if transposed else weight
    scores = kept.float().abs()
    if method != "magnitude":
        norms = rounding.inputs_of(method).rows.float().square().sum(0).sqrt().to(weight.device)
        scores = scores * (norms[lines.numbers(columns)] if columns else norms)
    return torch.where(keep_largest(scores), kept, 0).contiguous()


def _compressed_shape(weight: Tensor) -> list[Tensor]:
    rows, columns = weight.shape
    return [weight.new_empty(rows, columns // 2), weight.new_empty(rows, columns // _PER_META, dtype=torch.int16)]


@operation("(Tensor weight) -> Tensor[]", _compressed_shape)
def compress_weight(weight: Tensor) -> list[Tensor]:
    """A 2:4 sparse weight [N, K] of 16 bits as the semi-structured kernels read it: values [N, K / 2], and where."""
    made: Any = SparseSemiStructuredTensorCUTLASS
    if weight.device.type == "cuda":
        packed = made.from_dense(weight)
        return [packed.packed, packed.meta]
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    return list(sparse_semi_structured_from_dense_cutlass(weight))


def _linear_shape(x: Tensor, packed: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed[0].shape[0]))


@operation("(Tensor x, Tensor[] packed, Tensor? bias) -> Tensor", _linear_shape, traceable=False)
def sparse_linear(x: Tensor, packed: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """x [..., K] times a compressed weight [N, K] transposed, plus bias [N]: [..., N]. GPUs have kernels for it."""
    made: Any = SparseSemiStructuredTensorCUTLASS
    values, where = packed
    if x.device.type == "cuda":
        shape = torch.Size((values.shape[0], values.shape[1] * 2))
        weight = made(shape, packed=values, meta=where, packed_t=None, meta_t=None, compressed_swizzled_bitmask=None)
        return F.linear(x, weight, bias).contiguous()
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

    return F.linear(x, sparse_semi_structured_to_dense_cutlass(values, where), bias)


def why_dense(weight: fx.Node) -> str:
    """Why a 2:4 sparse weight [N, K] is multiplied as a dense one; "" if its device has kernels for it."""
    value = weight.meta["val"]
    if value.device.type != "cuda":
        return f"{value.device.type.upper()}s have no kernel for 2:4 weights: multiplied as dense ones, with no gain"
    capability = torch.cuda.get_device_capability(value.device)
    if capability[0] not in (8, 9):
        return f"2:4 kernels are for compute capability 8 and 9, this is {capability[0]}.{capability[1]}: no gain"
    if value.dtype not in (torch.float16, torch.bfloat16):
        return f"2:4 kernels are for 16 bits, the weight has {value.dtype}: no gain"
    rows, columns = value.shape
    if rows % _ROWS or columns % _COLUMNS:
        return f"2:4 kernels want multiples of {_ROWS} rows and {_COLUMNS} columns, not {rows} x {columns}: no gain"
    return ""


@prologue.call_time(sparsify_weight, packs_weights=True)
@packs.packed
def pack_sparsified(weight: Tensor, method: str, columns: str, transposed: bool) -> Tensor:
    """`graphopt.sparsify_weight` under the guard of `runtime.packs`."""
    sparse: Tensor = sparsify_weight(weight.detach(), method, columns, transposed)
    return sparse


@prologue.call_time(compress_weight, packs_weights=True)
@packs.packed
def pack_compressed(weight: Tensor) -> list[Tensor]:
    """`graphopt.compress_weight` under the guard of `runtime.packs`."""
    compressed: list[Tensor] = compress_weight(weight.detach())
    return compressed
