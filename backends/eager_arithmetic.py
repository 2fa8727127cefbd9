"""Arithmetic that Inductor computes otherwise than eager, written out as eager computes it.

    1.0 // 0.1      eager 9 (the remainder is taken first), Inductor 10 (the quotient is rounded up to 10, then floored)
    inf // 2        eager nan, Inductor inf
    -1.0 % 0.1      eager 1.49e-8, Inductor 0
    3e38 // 0.1     eager inf, Inductor nan (it takes a remainder that vectors have for smaller quotients only)

The sources are eager's own: aten/src/ATen/native/BinaryOps.h (`div_floor_floating`) and cpu/BinaryOpsKernel.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from graphopt import capture, edit

aten = torch.ops.aten


def write_as_eager(graph_module: fx.GraphModule) -> None:
    """Replace floor division and remainder of floating-point numbers, in place."""
    for node in list(graph_module.graph.nodes):
        function = _meaning(node)
        if function is None:
            continue
        with edit.rewriting(graph_module, node) as rewrite:
            rewrite.replace(node, rewrite.inline(function, *node.args[:2], decompositions=capture.decompositions()))


def _meaning(node: fx.Node) -> Callable[[Any, Any], Tensor] | None:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
        return None
    if node.target is aten.div.Tensor_mode and node.kwargs.get("rounding_mode") == "floor":
        return _in_opmath(value.dtype, _floor_quotient)
    if node.target in (aten.remainder.Tensor, aten.remainder.Scalar, aten.remainder.Scalar_Tensor):
        return _in_opmath(value.dtype, _remainder, rounds_numbers=True)
    return None


def _in_opmath(
    dtype: torch.dtype, function: Callable[[Any, Any], Tensor], rounds_numbers: bool = False
) -> Callable[[Any, Any], Tensor]:
    """Two-byte numbers are computed with in float32, and rounded once.

    rounds_numbers: a plain number loses the digits that the tensor's type has not (in a remainder, not in a quotient).
    """
    wide = torch.float32 if dtype.itemsize < 4 else dtype

    def operand(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype).to(wide)
        return torch.tensor(value, dtype=dtype).item() if rounds_numbers else value

    return lambda a, b: function(operand(a), operand(b)).to(dtype)


def _floor_quotient(a: Any, b: Any) -> Tensor:
    remainder, plain = torch.fmod(a, b), a / b
    # Where the quotient of finite numbers overflows, vectors know no remainder; any is too small to matter.
    overflown = plain.isinf() & torch.as_tensor(a).isfinite() & (b != 0)
    remainder = torch.where(overflown & remainder.isnan(), 0.0, remainder)
    quotient = (a - remainder) / b
    quotient = torch.where((remainder != 0) & ((b < 0) != (remainder < 0)), quotient - 1, quotient)
    floor = torch.floor(quotient)
    floor = torch.where(quotient - floor > 0.5, floor + 1, floor)
    floor = torch.where(quotient != 0, floor, torch.copysign(torch.zeros_like(plain), plain))
    return torch.where(torch.as_tensor(b != 0), floor, plain)


def _remainder(a: Any, b: Any) -> Tensor:
    remainder = torch.fmod(a, b)
    return torch.where((remainder != 0) & ((b < 0) != (remainder < 0)), remainder + b, remainder)
