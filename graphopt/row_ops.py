"""What fused regions can hold: the ATen operators by how their result's elements depend on their operands'.

`ELEMENTWISE` and `STRUCTURES` read their operands at known places, reductions read a whole row, views
(`index_map.VIEWS`) only rename places. The generator has a rule for each of them (checked by a test); region forming
asks nothing else.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import Node

from graphopt.index_map import VIEWS

aten = torch.ops.aten
prims = torch.ops.prims

DTYPES = frozenset({
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
})
"""The dtypes that kernels handle."""


def _overloads(names: str, *suffixes: str) -> set[Any]:
    packets = [getattr(aten, name) for name in names.split()]
    return {getattr(p, s) for p in packets for s in suffixes if s in p.overloads()}


ELEMENTWISE: frozenset[Any] = frozenset(
    _overloads("add sub mul div bitwise_and bitwise_or bitwise_xor eq ne lt le gt ge", "Tensor", "Scalar")
    | _overloads("remainder", "Tensor", "Scalar", "Scalar_Tensor")
    | _overloads("fmod true_divide copysign bitwise_left_shift bitwise_right_shift ldexp", "Tensor", "Scalar")
    - {aten.true_divide.Scalar, aten.bitwise_left_shift.Tensor_Scalar}
    | _overloads("pow", "Tensor_Tensor", "Tensor_Scalar", "Scalar")
    | _overloads("clamp_min clamp_max", "default", "Tensor")
    | _overloads(
        "floor_divide maximum minimum fmax fmin atan2 hypot nextafter bitwise_not logical_not logical_and logical_or "
        "logical_xor neg abs sign sgn signbit isnan isinf relu square reciprocal sqrt rsqrt exp exp2 log log2 sin cos "
        "erf sigmoid silu floor ceil trunc round log10 log1p expm1 tan tanh asin acos atan sinh cosh asinh acosh atanh "
        "erfc erfinv lgamma gelu special_erfcx special_bessel_j0 special_bessel_j1 special_bessel_y0 special_bessel_y1 "
        "special_modified_bessel_i0 special_modified_bessel_i1 i0 special_i1 addcmul addcdiv clamp copy", "default")
    | {prims.bitwise_and.default, prims.bitwise_or.default, prims.bitwise_xor.default}
    | {prims.div.default, prims.convert_element_type.default, aten._to_copy.default, aten.div.Tensor_mode,
       aten.div.Scalar_mode, aten.where.self, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.clamp.Tensor,
       aten.__lshift__.Scalar, aten.__rshift__.Scalar, aten.view.dtype}
)
"""The value at an index needs the operands at that index alone."""

CONSTANTS: frozenset[Any] = frozenset({
    aten.full.default, aten.full_like.default, aten.scalar_tensor.default, aten.zeros.default, aten.ones.default,
    aten.zeros_like.default, aten.ones_like.default, aten.empty.memory_format, prims.iota.default,
    aten.arange.default, aten.arange.start, aten.arange.start_step,
})
"""No tensor operand is read: cheaper to compute again than to keep."""

STRUCTURES: frozenset[Any] = frozenset({
    aten.cat.default, aten.constant_pad_nd.default, aten.embedding.default, aten.index_select.default,
    aten.gather.default, aten.index.Tensor, aten._unsafe_index.Tensor, aten.slice_scatter.default,
    aten.select_scatter.default, aten.as_strided.default,
})
"""The value at an index needs operands at other, known or loaded, indices."""

SCATTERS: frozenset[Any] = frozenset({
    aten.index_put.default, aten._unsafe_index_put.default, aten.index_copy.default, aten.index_add.default,
    aten.index_fill.int_Scalar, aten.index_fill.int_Tensor, aten.scatter.src, aten.scatter.value,
    aten.scatter_add.default,
})
"""The value at an index depends on which of some loaded indices name it."""

FEW_INDICES = 16
"""Indices of a scatter that a kernel asks for each element; more are left to ATen, which writes at them."""

SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.split_copy.Tensor,
                    aten.split_with_sizes_copy.default, aten.unbind.int})
"""Several views at once."""

SUMS = frozenset({aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim})
PRODUCTS = frozenset({aten.prod.default, aten.prod.dim_int})
EXTREMES = frozenset({aten.amax.default, aten.amin.default, aten.max.default, aten.min.default, aten.any.default,
                      aten.any.dim, aten.any.dims, aten.all.default, aten.all.dim, aten.all.dims})
POSITIONS = frozenset({aten.argmax.default, aten.argmin.default})
PAIRS = frozenset({aten.max.dim, aten.min.dim})
VARIANCES = frozenset({aten.var_mean.correction, aten.var.correction})
SCANS = frozenset({aten.cumsum.default, aten.cumprod.default})
TOTALS = SUMS | PRODUCTS | EXTREMES | VARIANCES
"""Of a row numbers that do not tell where in it anything is."""

REDUCTIONS = TOTALS | POSITIONS | PAIRS | SCANS
"""A value needs a whole row of the operand."""


def reduced_dims(node: Node) -> tuple[int, ...]:
    """The dimensions that a reduction runs over, in order."""
    operand = node.args[0]
    assert isinstance(operand, Node)
    rank = operand.meta["val"].dim()
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if given is None or given == [] or isinstance(given, torch.dtype):
        return tuple(range(rank))
    listed = [given] if isinstance(given, int) else given
    return tuple(sorted({int(dim) % rank for dim in listed})) if rank else ()


def keeps_dims(node: Node) -> bool:
    """Does the result of a reduction have the dimensions that it ran over, with one place each?"""
    return bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))


def scattered(node: Node) -> list[Any]:
    """The sizes that the indices of a scatter run over: for `index_put` those that its tensors broadcast to."""
    if node.target in (aten.index_put.default, aten._unsafe_index_put.default):
        tensors = [n.meta["val"] for n in node.args[1] if isinstance(n, Node)]  # type: ignore[union-attr]
        if any(tensor.dtype == torch.bool for tensor in tensors):
            return []
        rank = max(tensor.dim() for tensor in tensors)
        padded = [(1,) * (rank - tensor.dim()) + tuple(tensor.shape) for tensor in tensors]
        if not all(isinstance(size, int) for sizes in padded for size in sizes):
            return [size for sizes in padded for size in sizes]
        return [0 if 0 in sizes else max(sizes) for sizes in zip(*padded, strict=True)] or [1]
    indices, dim = node.args[2], node.args[1]
    assert isinstance(indices, Node) and isinstance(dim, int)
    shape = indices.meta["val"].shape
    if not shape:
        return [1]
    return [shape[dim % len(shape)] if "scatter" in str(node.target) else shape[0]]


def is_few(node: Node) -> bool:
    """Does a scatter have so few indices that each element of the result may ask them all?"""
    sizes = scattered(node)
    return bool(sizes) and all(isinstance(size, int) for size in sizes) and math.prod(sizes) <= FEW_INDICES


def may_restride(node: Node) -> bool:
    """Does `as_strided` only rename places of a value that its kernel computes, laid out row by row?"""
    operand = node.args[0]
    assert isinstance(operand, Node)
    value, result = operand.meta["val"], node.meta["val"]
    sizes = [*value.shape, *value.stride(), *result.shape, *result.stride(), *node.args[2:]]
    if operand.op != "call_function" or not all(isinstance(size, int) for size in _flat(sizes)):
        return False
    return bool(value.is_contiguous() and value.storage_offset() == 0)


def is_bitcast(node: Node) -> bool:
    """Does a view of another dtype take the bits of each element for those of a number in registers?"""
    operand = node.args[0]
    assert isinstance(operand, Node)
    dtypes = operand.meta["val"].dtype, node.meta["val"].dtype
    return all(dtype.itemsize >= 4 for dtype in dtypes) and dtypes[0].itemsize == dtypes[1].itemsize


def _flat(values: Any) -> list[Any]:
    return [v for value in values for v in (value if isinstance(value, (list, tuple)) else (value,)) if v is not None]


def is_view(node: Node) -> bool:
    """Does the node only rename places: a view, a copy in another layout, or a piece of a split?"""
    if node.target is operator.getitem:
        return isinstance(node.args[0], Node) and node.args[0].target in SPLITS
    return node.target in VIEWS or node.target in SPLITS


def is_pick(node: Node) -> bool:
    """Is the node one result of a reduction that has several?"""
    return node.target is operator.getitem and isinstance(node.args[0], Node) and node.args[0].target in REDUCTIONS


def is_fusable(node: Node) -> bool:
    """Can a fused region compute the node?"""
    if node.op != "call_function" or not (
        node.target in ELEMENTWISE or node.target in CONSTANTS or node.target in STRUCTURES
        or node.target in REDUCTIONS or is_view(node) or is_pick(node) or (node.target in SCATTERS and is_few(node))
    ):
        return False
    if node.target is aten.as_strided.default and not may_restride(node):
        return False
    if node.target is aten.view.dtype and not is_bitcast(node):
        return False
    values = [node.meta.get("val"), *(n.meta.get("val") for n in node.all_input_nodes)]
    tensors = [t for v in values for t in (v if isinstance(v, (tuple, list)) else (v,)) if isinstance(t, torch.Tensor)]
    if node.target is aten.index.Tensor and any(t.dtype == torch.bool for t in tensors[2:]):
        return False
    devices = {t.device for t in tensors}
    return bool(tensors) and len(devices) == 1 and all(t.dtype in DTYPES and not t.is_sparse for t in tensors)
