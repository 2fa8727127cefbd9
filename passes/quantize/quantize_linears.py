"""Multiply by packed weights of few bits instead of the full-precision ones.

    y = graphopt.linear(x, weight, bias)
becomes
    packed = graphopt.quantize_weight(weight, "int4-g32")
    y = graphopt.quantized_linear(x, [packed[0], packed[1], packed[2]], bias, "int4-g32")

The weight stays an input of the graph: it is packed at the first call and again when it has changed. Left
alone are weights that are computed in the graph, that hold an infinity or NaN, or that would not become
smaller; a table that is also looked up in (tied embedding) is quantised here only for the linear, which has
the effect of a second copy.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from graphopt import capture, edit, ops, views
from graphopt.pipeline import graph_pass
from graphopt.quantization import operations, schemes
from graphopt.quantization.names import weight_name
from graphopt.quantize_options import Quantize

aten = torch.ops.aten
INT8 = Quantize("int8")


@graph_pass(exactness="lossy", stage="quantize", training=False)
def quantize_linears(graph_module: fx.GraphModule, *, quantize: Quantize = INT8) -> int:
    """Replace `graphopt.linear` by `graphopt.quantized_linear` where the options ask for it."""
    linears = [node for node in graph_module.graph.nodes if node.target is ops.linear]
    heads = _lm_heads(graph_module, linears)
    count = 0
    for node in linears:
        weight = node.args[1]
        placeholder = views.root(weight)
        name = weight_name(placeholder.meta.get("source", ""))
        scheme = schemes.chosen(quantize, lm_head=node in heads)
        reason = quantize.wants(name)
        if not reason and scheme is None:
            reason = "lm_head=False leaves the linear that scores the vocabulary as it is"
        if reason or scheme is None:
            edit.refuse(node, f"{name}: {reason}")
            continue
        reason = _why_not(weight, scheme)
        if reason:
            edit.refuse(node, f"{name}: {reason}" if name else reason)
            continue
        count += _rewrite(graph_module, node, scheme)
    return count


def _why_not(weight: fx.Node, scheme: schemes.Scheme) -> str:
    placeholder, value = views.root(weight), weight.meta["val"]
    if not views.is_constant_input(weight):
        return "the weight is computed in the graph or an argument of the call"
    if weight is not placeholder and not _is_transposed(weight):
        return "the weight is a view of a part of a parameter"
    if not value.dtype.is_floating_point or value.element_size() < 2:
        return f"the weight is kept in {value.dtype}"
    if any(not isinstance(size, int) for size in value.shape):
        return "the weight has a symbolic size"
    rows, columns = value.shape
    if rows * columns == 0:
        return "the weight has no elements"
    before, after = rows * columns * value.element_size(), scheme.nbytes(rows, columns)
    if after >= before:
        return f"as {scheme.name} it would take {after} bytes instead of {before}"
    tensor = capture.weight_tensor(placeholder)
    if tensor is not None and not scheme.can_pack(tensor):
        return f"the weight holds infinities, NaN or values too large for {scheme.name}"
    return ""


def _is_transposed(weight: fx.Node) -> bool:
    """Whether the node is the plain transpose of a parameter (a weight kept as [K, N])."""
    return (
        weight.target is aten.permute.default
        and weight.args[0] is views.root(weight)
        and weight.args[1] == [1, 0]
    )


def _rewrite(graph_module: fx.GraphModule, node: fx.Node, scheme: schemes.Scheme) -> int:
    x, weight, *bias = node.args
    transposed = weight is not views.root(weight)
    with edit.rewriting(graph_module, node) as rewrite:
        keywords = {"transposed": True} if transposed else {}
        packed = rewrite.call(operations.quantize_weight, views.root(weight), scheme.name, **keywords)
        parts = [rewrite.call(operator.getitem, packed, index) for index in range(scheme.parts)]
        new = rewrite.call(operations.quantized_linear, x, parts, bias[0] if bias else None, scheme.name)
        rewrite.replace(node, new)
    return rewrite.applied


def _lm_heads(graph_module: fx.GraphModule, linears: list[fx.Node]) -> set[fx.Node]:
    """The linears that score a vocabulary: no other linear follows, and they have as many rows as an
    embedding table."""
    tables = {
        node.args[0].meta["val"].shape[0]
        for node in graph_module.graph.nodes
        if node.target is aten.embedding.default
    }
    feeds_linear: set[fx.Node] = set()
    for node in reversed(graph_module.graph.nodes):
        if any(user.target is ops.linear or user in feeds_linear for user in node.users):
            feeds_linear.add(node)
    return {
        node for node in linears if node not in feeds_linear and node.args[1].meta["val"].shape[0] in tables
    }
