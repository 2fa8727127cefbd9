"""The dialect operations of quantised weights. Their bodies are their meaning, as in `graphopt.ops`.

A packed weight is the list of tensors that `schemes` describes; `scheme` is a canonical name of that page. A
pass writes `quantize_weight` on the runtime weight and hands its results to the consumer; at call time the
pack is made once (`packing`), so that a compiled graph receives packed tensors as inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.ops import operation
from graphopt.quantization import codecs, schemes


def _packed_shape(weight: Tensor, scheme: str, *, transposed: bool = False) -> list[Tensor]:
    rows, columns = reversed(weight.shape) if transposed else weight.shape
    layout = schemes.named(scheme).layout(rows, columns)
    return [weight.new_empty(shape, dtype=dtype) for shape, dtype in layout]


def _linear_shape(x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, scheme: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed[0].shape[0]))


def _parallel_shape(
    x: Tensor, packed: Sequence[Tensor], biases: Sequence[Tensor | None], scheme: str
) -> list[Tensor]:
    return [_linear_shape(x, [data], None, scheme) for data in packed[:: schemes.named(scheme).parts]]


def _embedding_shape(
    indices: Tensor, packed: Sequence[Tensor], columns: int, dtype: torch.dtype, scheme: str
) -> Tensor:
    return indices.new_empty((*indices.shape, columns), dtype=dtype)


@operation("(Tensor weight, str scheme, *, bool transposed=False) -> Tensor[]", _packed_shape)
def quantize_weight(weight: Tensor, scheme: str, *, transposed: bool = False) -> list[Tensor]:
    """The packed tensors of a weight [N, K], or, transposed, of one that is kept as [K, N]."""
    return schemes.named(scheme).pack(weight.t() if transposed else weight)


@operation("(Tensor x, Tensor[] packed, Tensor? bias, str scheme) -> Tensor", _linear_shape)
def quantized_linear(x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, scheme: str) -> Tensor:
    """x [..., K] times a packed weight [N, K] transposed, plus bias [N]: [..., N], in the dtype of x.

    Where one scale serves a whole row the codes are multiplied first and the sum is scaled in float32; else
    the weight is rounded to the dtype of x. Dynamic schemes round each row of x to the codes of the weight as
    well.
    """
    how = schemes.named(scheme)
    if how.activations:
        codes, scale = _rounded_rows(x, how.activations)
        y = F.linear(codes.float(), packed[0].float()) * scale * packed[1]
    elif not how.group:
        # Sums of codes exceed what float16 can hold.
        wide = x.float() if x.dtype == torch.float16 else x
        y = F.linear(wide, packed[0].to(wide.dtype)).float() * packed[1]
    else:
        return F.linear(x, how.unpack(packed, x.shape[-1]).to(x.dtype), bias)
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


@operation("(Tensor x, Tensor[] packed, Tensor?[] biases, str scheme) -> Tensor[]", _parallel_shape)
def parallel_quantized_linear(
    x: Tensor, packed: Sequence[Tensor], biases: Sequence[Tensor | None], scheme: str
) -> list[Tensor]:
    """Several quantised linears of one input: `packed` holds the tensors of one weight after those of the
    other."""
    parts = schemes.named(scheme).parts
    return [
        quantized_linear(x, packed[index * parts : (index + 1) * parts], bias, scheme)
        for index, bias in enumerate(biases)
    ]


@operation(
    "(Tensor indices, Tensor[] packed, int columns, ScalarType dtype, str scheme) -> Tensor", _embedding_shape
)
def quantized_embedding(
    indices: Tensor, packed: Sequence[Tensor], columns: int, dtype: torch.dtype, scheme: str
) -> Tensor:
    """Rows of a packed table [N, columns] at integer `indices` of any shape: [*indices.shape, columns] in
    `dtype`."""
    rows = indices.flatten()
    picked = schemes.named(scheme).unpack([part[rows] for part in packed], columns)
    return picked.to(dtype).reshape(*indices.shape, columns).contiguous()


def _rounded_rows(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Codes [..., K] of each row of x and their scales [..., 1] in float32."""
    codec = codecs.INT8 if kind == "int8" else codecs.FP8
    parameters, encode = codec[:2]
    wide = x.float()[..., None, :]
    scale = parameters(wide)
    return encode(wide, scale)[..., 0, :], scale[0]
