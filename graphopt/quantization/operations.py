"""The dialect operations of quantised weights. Their bodies are their meaning, as in `graphopt.ops`.

A packed weight is the list of tensors that `schemes` describes; `scheme` is a canonical name of that page. A
pass writes `quantize_weight` on the runtime weight and hands its results to the consumer; at call time the
pack is made once (`packing`), so that a compiled graph receives packed tensors as inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.ops import operation
from graphopt.quantization import codecs, schemes
from graphopt.quantization import rounding as rounding_methods


def matrix(shape: Sequence[int], *, transposed: bool = False) -> tuple[int, int]:
    """Rows N and columns K of a weight [..., N, K], or, transposed, [..., K, N]: leading dimensions count as rows."""
    *leading, rows, columns = shape
    if transposed:
        rows, columns = columns, rows
    return math.prod(leading) * rows, columns


def _packed_shape(
    weight: Tensor, scheme: str, scale: Tensor | None = None, *, transposed: bool = False, rounding: str = ""
) -> list[Tensor]:
    layout = schemes.named(scheme).layout(*matrix(weight.shape, transposed=transposed))
    return [weight.new_empty(shape, dtype=dtype) for shape, dtype in layout]


def _scales_shape(weights: Sequence[Tensor], scheme: str, rounding: str, *, transposed: bool = False) -> list[Tensor]:
    columns = weights[0].shape[0 if transposed else 1]
    return [weights[0].new_empty((columns,), dtype=torch.float32) for _ in range(2)]


def _linear_shape(x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, scheme: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed[0].shape[0]))


def _parallel_shape(x: Tensor, packed: Sequence[Tensor], biases: Sequence[Tensor | None], scheme: str) -> list[Tensor]:
    return [_linear_shape(x, [data], None, scheme) for data in packed[:: schemes.named(scheme).parts]]


def _grouped_shape(x: Tensor, packed: Sequence[Tensor], ends: Tensor, scheme: str) -> Tensor:
    return x.new_empty((x.shape[0], packed[0].shape[0] // ends.shape[0]))


def _embedding_shape(
    indices: Tensor, packed: Sequence[Tensor], columns: int, dtype: torch.dtype, scheme: str
) -> Tensor:
    return indices.new_empty((*indices.shape, columns), dtype=dtype)


@operation(
    "(Tensor weight, str scheme, Tensor? scale=None, *, bool transposed=False, str rounding='') -> Tensor[]",
    _packed_shape,
)
def quantize_weight(
    weight: Tensor, scheme: str, scale: Tensor | None = None, *, transposed: bool = False, rounding: str = ""
) -> list[Tensor]:
    """The packed tensors of a weight [N, K], or, transposed, of one that is kept as [K, N].

    Of several weights of one shape, [E, N, K] or [E, K, N], they are those of the rows of all, [E * N, K].

    scale: float32 [K], multiplied into the input channels first. rounding: "" takes the nearest codes;
        "gptq:..."
    those that suit the inputs named by the rest of the text (`rounding.spell`).
    """
    weight = (weight.mT if transposed else weight).flatten(0, -2)
    if scale is not None:
        weight = weight.float() * scale
    if rounding:
        return rounding_methods.gptq(weight, schemes.named(scheme), rounding_methods.inputs_of(rounding))
    return schemes.named(scheme).pack(weight)


@operation("(Tensor[] weights, str scheme, str rounding, *, bool transposed=False) -> Tensor[]", _scales_shape)
def input_scales(weights: Sequence[Tensor], scheme: str, rounding: str, *, transposed: bool = False) -> list[Tensor]:
    """What to multiply the channels of weights [N_i, K] of one input by, and the input by: both float32 [K].

    rounding: "awq:..." or "smoothquant:...", then the inputs (`rounding.spell`).
    """
    turned = [weight.t() if transposed else weight for weight in weights]
    method = rounding.partition(":")[0]
    scale = rounding_methods.channel_scale(turned, schemes.named(scheme), rounding_methods.inputs_of(rounding), method)
    return [scale, 1 / scale]


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


@operation("(Tensor x, Tensor[] packed, Tensor ends, str scheme) -> Tensor", _grouped_shape)
def quantized_grouped_linear(x: Tensor, packed: Sequence[Tensor], ends: Tensor, scheme: str) -> Tensor:
    """Rows of x [S, K], sorted by expert, times the packed weight [N, K] of their expert transposed: [S, N].

    packed: of the rows of all experts, [E * N, K]. ends: integers [E], the row of x behind the last of each expert.
    Rows behind all of them give zeros.
    """
    experts = ends.shape[0]
    rows = packed[0].shape[0] // experts
    expert = (torch.arange(x.shape[0], device=x.device)[:, None] >= ends).sum(1, keepdim=True)
    y = x.new_zeros((x.shape[0], rows))
    for index in range(experts):
        own = [part[index * rows : (index + 1) * rows] for part in packed]
        y = torch.where(expert == index, quantized_linear(x, own, None, scheme), y)
    return y


@operation("(Tensor indices, Tensor[] packed, int columns, ScalarType dtype, str scheme) -> Tensor", _embedding_shape)
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
