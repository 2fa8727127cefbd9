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

from torch import fx

from graphopt import edit, grouped, views
from graphopt.passes.quantize import packable, planned
from graphopt.pipeline import graph_pass
from graphopt.quantization import operations, plan
from graphopt.quantize_options import Quantize

INT8 = Quantize("int8")


@graph_pass(exactness="lossy", stage="quantize", training=False, after="quantize_embeddings")
def quantize_experts(graph_module: fx.GraphModule, *, quantize: Quantize = INT8) -> int:
    """Replace grouped products with weights by `graphopt.quantized_grouped_linear` where the options ask for it."""
    count = 0
    assigned = planned.assigned(graph_module, quantize)
    for node in grouped.products(graph_module):
        x, experts, ends = grouped.operands(node)
        weight, name = views.root(experts), planned.name_of(experts)
        scheme, reason = plan.choose(quantize, name, False, assigned)
        reason = reason or planned.why_not(node) or packable.why_not(experts, scheme, transposed=True)
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
