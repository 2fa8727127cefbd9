"""Multiply by packed weights of few bits instead of the full-precision ones.

    y = graphopt.linear(x, weight, bias)
becomes
    packed = graphopt.quantize_weight(weight, "int4-g32")
    y = graphopt.quantized_linear(x, [packed[0], packed[1], packed[2]], bias, "int4-g32")

The weight stays an input of the graph: it is packed at the first call and again when it has changed. Left
alone are weights that are computed in the graph, that hold an infinity or NaN, or that would not become
smaller; a table that is also looked up in (tied embedding) is quantised here for the linear only. With AWQ or
SmoothQuant, linears that read one input share one scale for its channels, so that they can still be merged.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphopt import edit, views
from graphopt.passes.quantize import packable, planned
from graphopt.pipeline import graph_pass
from graphopt.quantization import operations, plan, rounding
from graphopt.quantization.schemes import Scheme
from graphopt.quantize_options import Quantize

INT8 = Quantize("int8")


@graph_pass(exactness="lossy", stage="quantize", training=False)
def quantize_linears(graph_module: fx.GraphModule, *, quantize: Quantize = INT8) -> int:
    """Replace `graphopt.linear` by `graphopt.quantized_linear` where the options ask for it."""
    heads, assigned = planned.lm_heads(graph_module), planned.assigned(graph_module, quantize)
    groups: dict[tuple[Any, ...], list[fx.Node]] = {}
    for node in planned.linears(graph_module):
        x, weight, *bias = planned.arguments(node)
        name = planned.name_of(weight)
        scheme, reason = plan.choose(quantize, name, node in heads, assigned)
        reason = reason or packable.why_not(weight, scheme)
        if scheme is None or reason:
            edit.refuse(node, f"{name}: {reason}" if name else reason)
            continue
        calibrated = plan.inputs_for(quantize, name) is not None
        if quantize.rounding != "nearest" and not calibrated:
            edit.refuse(node, f"{name}: the calibration has not seen it, so it gets the nearest codes")
        shares = calibrated and quantize.rounding in rounding.SCALED and all(n.op == "placeholder" for n in bias)
        alone = () if shares else (node,)
        groups.setdefault((x, scheme, packable.is_turned(weight), calibrated, *alone), []).append(node)
    return sum(_rewrite(graph_module, group, key[1], quantize, key[3]) for key, group in groups.items())


def _rewrite(
    graph_module: fx.GraphModule, group: Sequence[fx.Node], scheme: Scheme, quantize: Quantize, calibrated: bool
) -> int:
    """Rewrite linears of one input; only those that share a scale for its channels come together."""
    weights = [planned.arguments(node)[1] for node in group]
    keywords: dict[str, Any] = {"transposed": True} if packable.is_turned(weights[0]) else {}
    spelled = plan.spelled(quantize, planned.name_of(weights[0])) if calibrated else ""
    with edit.rewriting(graph_module, group[0]) as rewrite:
        x, scale = planned.arguments(group[0])[0], None
        if spelled and quantize.rounding in rounding.SCALED:
            roots = [views.root(weight) for weight in weights]
            both = rewrite.call(operations.input_scales, roots, scheme.name, spelled, **keywords)
            scale = rewrite.call(operator.getitem, both, 0)
            x = rewrite.inline(_scaled, x, rewrite.call(operator.getitem, both, 1))
        elif spelled:
            keywords["rounding"] = spelled
        for node, weight in zip(group, weights, strict=True):
            packed = rewrite.call(operations.quantize_weight, views.root(weight), scheme.name, scale, **keywords)
            parts = [rewrite.call(operator.getitem, packed, index) for index in range(scheme.parts)]
            bias = planned.arguments(node)[2] if len(node.args) > 2 else None
            rewrite.replace(node, rewrite.call(operations.quantized_linear, x, parts, bias, scheme.name))
    return rewrite.applied


def _scaled(x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    return (x * inverse).to(x.dtype)
