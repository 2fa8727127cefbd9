"""Multiply by packed experts of few bits where a mixture multiplies each expert with its own tokens.

    y = grouped_mm(x, permute(experts, [0, 2, 1]), ends)      # x [S, K] sorted by expert, experts [E, N, K]
becomes
    packed = graphopt.quantize_weight(experts, "int8-g64")    # as one weight [E * N, K]
    y = graphopt.quantized_grouped_linear(x, [packed[0], packed[1]], ends, "int8-g64")

`grouped_mm` is ATen's, or what transformers registers in its place (`transformers::grouped_mm_fallback`). Experts may
also be kept as [E, K, N]. Codes are the nearest ones: calibrations know linears only.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from graphopt import capture, edit, views
from graphopt.pipeline import graph_pass
from graphopt.quantization import operations, plan
from graphopt.quantization.names import weight_name
from graphopt.quantization.release import is_released
from graphopt.quantization.schemes import Scheme
from graphopt.quantize_options import Quantize

aten = torch.ops.aten
INT8 = Quantize("int8")
_PRODUCTS = ("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default")


@graph_pass(exactness="lossy", stage="quantize", training=False, after="quantize_embeddings")
def quantize_experts(graph_module: fx.GraphModule, *, quantize: Quantize = INT8) -> int:
    """Replace grouped products with weights by `graphopt.quantized_grouped_linear` where the options ask for it."""
    count = 0
    for node in list(graph_module.graph.nodes):
        if str(node.target) not in _PRODUCTS:
            continue
        x, experts, ends = _operands(node)
        weight = views.root(experts)
        name = weight_name(weight.meta.get("source", ""))
        scheme, reason = plan.choose(quantize, name, False, dict(quantize.assigned))
        reason = reason or _why_not(node, weight, experts, scheme)
        if scheme is None or reason:
            edit.refuse(node, f"{name}: {reason}" if name else reason)
            continue
        if quantize.rounding != "nearest":
            edit.refuse(node, f"{name}: calibrations know linears only, so it gets the nearest codes")
        with edit.rewriting(graph_module, node) as rewrite:
            turned = {"transposed": True} if weight is experts else {}
            packed = rewrite.call(operations.quantize_weight, weight, scheme.name, None, **turned)
            parts = [rewrite.call(operator.getitem, packed, index) for index in range(scheme.parts)]
            rewrite.replace(node, rewrite.call(operations.quantized_grouped_linear, x, parts, ends, scheme.name))
        count += rewrite.applied
    return count


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, Any]:
    """x [S, K], the experts [E, K, N] and the row behind the last of each expert, None if there is none."""
    x, experts, *more = node.args
    assert isinstance(x, fx.Node) and isinstance(experts, fx.Node)
    return x, experts, more[0] if more else node.kwargs.get("offs")


def _why_not(node: fx.Node, weight: fx.Node, experts: fx.Node, scheme: Scheme | None) -> str:
    x, _, ends = _operands(node)
    value, given = weight.meta["val"], x.meta["val"]
    more = [*node.args[3:], *(argument for name, argument in node.kwargs.items() if name != "offs")]
    if given.dim() != 2 or experts.meta["val"].dim() != 3 or ends is None or any(other is not None for other in more):
        return "it is no product of rows [S, K], sorted by expert, with experts [E, K, N]"
    if given.device.type != "cpu":
        return f"grouped products are quantised on the CPU only, not on {given.device.type}"
    if not views.is_constant_input(experts):
        return "the experts are computed in the graph or an argument of the call"
    if experts is not weight and not _is_transposed(experts, weight):
        return "the experts are a view of a part of a parameter"
    if not value.dtype.is_floating_point or value.element_size() < 2:
        return f"the experts are kept in {value.dtype}"
    if any(not isinstance(size, int) for size in value.shape) or value.numel() == 0:
        return "the experts have a symbolic size or no elements"
    if scheme is None:
        return ""
    rows, columns = operations.matrix(value.shape, transposed=experts is weight)
    before, after = rows * columns * value.element_size(), scheme.nbytes(rows, columns)
    if after >= before:
        return f"as {scheme.name} they would take {after} bytes instead of {before}"
    tensor = capture.weight_tensor(weight)
    if tensor is not None and not is_released(tensor) and not scheme.can_pack(tensor):
        return f"the experts hold infinities, NaN or values too large for {scheme.name}"
    return ""


def _is_transposed(experts: fx.Node, weight: fx.Node) -> bool:
    return experts.target is aten.permute.default and experts.args[0] is weight and experts.args[1] == [0, 2, 1]
