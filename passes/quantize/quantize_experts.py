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

from torch import fx

from graphopt import edit, views
from graphopt.passes.quantize import packable
from graphopt.pipeline import graph_pass
from graphopt.quantization import operations, plan
from graphopt.quantization.names import weight_name
from graphopt.quantization.schemes import Scheme
from graphopt.quantize_options import Quantize

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
        reason = reason or _why_not(node, scheme)
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


def _why_not(node: fx.Node, scheme: Scheme | None) -> str:
    x, experts, ends = _operands(node)
    given = x.meta["val"]
    more = [*node.args[3:], *(argument for name, argument in node.kwargs.items() if name != "offs")]
    if given.dim() != 2 or experts.meta["val"].dim() != 3 or ends is None or any(other is not None for other in more):
        return "it is no product of rows [S, K], sorted by expert, with experts [E, K, N]"
    if given.device.type != "cpu":
        return f"grouped products are quantised on the CPU only, not on {given.device.type}"
    return packable.why_not(experts, scheme, transposed=True)
