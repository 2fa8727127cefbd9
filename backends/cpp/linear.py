"""Linears on the compiled kernels: `torch.ops.graphopt_cpp.linear` and `parallel_linear`.

The weight stays where and how the model has it: a row-major [N, K] matrix is already what a dot product along K
wants to stream, so there is no packed copy to keep in step with it. The operators take any number of rows: up to 16
(decode) on kernels bound by memory, more on AMX tiles in bfloat16, the rest by `at::linear` inside the operator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from graphopt import ops, shapes
from graphopt.backends.cpp import operands
from graphopt.lowering import Lowering, arguments, same_arguments


def lowerings() -> tuple[Lowering, ...]:
    """Lowerings of the dialect's linears; the library must be loaded."""
    one, several = torch.ops.graphopt_cpp.linear.default, torch.ops.graphopt_cpp.parallel_linear.default
    return (
        Lowering("cpp.linear", ops.linear, _linear, same_arguments(one)),
        Lowering("cpp.parallel_linear", ops.parallel_linear, _parallel, same_arguments(several)),
    )


def unsupported_reason(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why the kernels cannot take x [..., K], weight [N, K], bias [N], real or fake; None if they can."""
    reason = operands.declined([x, weight] if bias is None else [x, weight, bias])
    if reason is not None:
        return reason
    if x.dim() < 1 or weight.dim() != 2:
        return f"needs x [..., K] and weight [N, K], got {x.dim()} and {weight.dim()} dimensions"
    if not shapes.same(weight.stride(1), 1):
        return "the rows of the weight are not contiguous"
    if bias is not None and (bias.dim() != 1 or not shapes.same(bias.shape[0], weight.shape[0])):
        return "the bias is not one value for each row of the weight"
    return None


def _linear(node: fx.Node) -> str | None:
    given = arguments(node)
    return unsupported_reason(_value(given["x"]), _value(given["weight"]), _optional(given["bias"]))


def _parallel(node: fx.Node) -> str | None:
    given = arguments(node)
    weights: Sequence[fx.Node] = given["weights"]
    biases: Sequence[fx.Node | None] = given["biases"]
    reasons = (
        unsupported_reason(_value(given["x"]), _value(weight), _optional(bias))
        for weight, bias in zip(weights, biases, strict=True)
    )
    return next((reason for reason in reasons if reason), None)


def _value(node: fx.Node) -> Tensor:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value


def _optional(node: fx.Node | None) -> Tensor | None:
    return None if node is None else _value(node)
