"""Facts about sizes, strides and symbols that never specialise a symbolic size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

Size = int | torch.SymInt


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are provably equal."""
    return bool(statically_known_true(a == b))


def same_sizes(a: Sequence[Size], b: Sequence[Size]) -> bool:
    """Whether two lists of sizes are provably equal."""
    return len(a) == len(b) and all(same(m, n) for m, n in zip(a, b, strict=True))


def same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors provably have one shape."""
    return same_sizes(a.shape, b.shape)


def same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape provably lie alike in memory; strides of dimensions of size 1 do not count."""
    return all(
        same(size, 1) or same(m, n) for size, m, n in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


def expression(size: Size) -> sympy.Expr:
    """A size as a sympy expression in the graph's symbols."""
    if isinstance(size, torch.SymInt):
        return sympy.sympify(size.node.expr)
    return sympy.Integer(size)


def numel(value: torch.Tensor) -> sympy.Expr:
    """The number of elements as a sympy expression."""
    return sympy.Mul(*(expression(size) for size in value.shape))


def memory_order(value: torch.Tensor) -> list[int]:
    """The dimensions of a tensor from the slowest to the fastest in memory; undecidable ones stay as they are."""
    order = list(range(value.dim()))
    for end in range(len(order), 1, -1):
        for i in range(end - 1):
            if statically_known_true(value.stride(order[i]) < value.stride(order[i + 1])):
                order[i], order[i + 1] = order[i + 1], order[i]
    return order


def signature(value: torch.Tensor) -> tuple[Any, ...]:
    """All that operations on a fake tensor can depend on: dtype, device, sizes and strides as expressions, offset."""
    numbers = (*value.shape, *value.stride(), value.storage_offset())
    return value.dtype, value.device, value.dim(), tuple(map(expression, numbers))


def difference(old: Any, new: Any) -> str:
    """What differs between two fake values as the rest of a graph sees them: "" or e.g. "dtype (float32, bfloat16)"."""
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        if old.dtype != new.dtype:
            return f"dtype ({old.dtype}, {new.dtype})"
        if old.device != new.device:
            return f"device ({old.device}, {new.device})"
        if not same_shape(old, new):
            return f"shape ({tuple(old.shape)}, {tuple(new.shape)})"
        if old.layout == new.layout == torch.strided and not same_strides(old, new):
            return f"stride ({old.stride()}, {new.stride()})"
        return ""
    if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)):
        if len(old) != len(new):
            return f"number of values ({len(old)}, {len(new)})"
        return next(filter(None, map(difference, old, new)), "")
    if isinstance(old, torch.Tensor) or isinstance(new, torch.Tensor):
        return f"type ({type(old).__name__}, {type(new).__name__})"
    return "" if old is None or same(old, new) else f"value ({old}, {new})"
