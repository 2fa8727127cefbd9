"""Write products and look-ups of quantised weights as their meaning around a plain contraction.

    y = graphopt.quantized_linear(x, [codes, scale], None, "int8-g64")
becomes
    w = to_bf16(mul(to_float(codes), spread(to_float(scale))));  y = graphopt.linear(x, w)

and, where one scale serves a whole row, the product of the codes with the scale behind it, in float32:

    y = graphopt.quantized_linear(x, [codes, scale], None, "int8")
becomes
    s = graphopt.linear(to_float(x), to_float(to_bf16(codes)));  y = to_bf16(mul(s, scale))

Of packed experts, each of few rows picks its own, so that no more of them is read than the rows need:

    y = graphopt.quantized_grouped_linear(x, [codes, scale], ends, "int8-g64")
becomes
    w = to_bf16(mul(to_float(codes[expert]), spread(to_float(scale[expert]))));  y = bmm(x[:, None], w.transpose(1, 2))

A dynamic scheme's rows of x are rounded in between. The weight is an elementwise function of packed tensors
(`quantization.elementwise`), which `operands.py` makes part of the product's region: it is never stored. Operands that
were widened show the generator in which type they may be multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from graphopt import capture, edit, ops
from graphopt.passes.fuse.joining import FEW_ROWS
from graphopt.quantization import elementwise, operations, schemes


def expand_quantized(graph_module: GraphModule) -> list[list[Node]]:
    """Expand every quantised product and look-up; returns the nodes of each look-up, which are to be one region."""
    look_ups: list[list[Node]] = []
    for node in list(graph_module.graph.nodes):
        meaning = _MEANINGS.get(node.target)
        if meaning is None:
            continue
        if meaning is _grouped_linear and (reason := _why_not_grouped(node)):
            edit.refuse(node, reason)
            continue
        known = set(graph_module.graph.nodes)
        with edit.rewriting(graph_module, node) as rewrite:
            traced = rewrite.trace(meaning, *node.args, decompositions=capture.decompositions())
            for alias in traced.graph.find_nodes(op="call_function", target=torch.ops.aten.alias.default):
                alias.replace_all_uses_with(alias.args[0])
                traced.graph.erase_node(alias)
            rewrite.replace(node, rewrite.paste(traced, list(dict.fromkeys(node.all_input_nodes))))
        if rewrite.applied and node.target is operations.quantized_embedding:
            look_ups.append([new for new in graph_module.graph.nodes if new not in known])
    edit.eliminate_dead_code(graph_module)
    return look_ups


def _linear(x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, scheme: str) -> Tensor:
    return _linears(x, packed, [bias], scheme)[0]


def _why_not_grouped(node: Node) -> str:
    rows, _ = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    if not isinstance(rows, int):
        return "the number of rows is symbolic: whether each may read its expert by itself is not known"
    if rows > FEW_ROWS:
        return f"there are {rows} rows, and for more than {FEW_ROWS} experts are not read for each row by itself"
    return ""


def _grouped_linear(x: Tensor, packed: Sequence[Tensor], ends: Tensor, scheme: str) -> Tensor:
    """Each row times the weight of its own expert, picked from the packed ones; rows behind all experts give zeros."""
    how, count = schemes.named(scheme), ends.shape[0]
    expert = (torch.arange(x.shape[0], device=x.device)[:, None] >= ends).sum(1)
    chosen, inside = expert.clamp_max(count - 1), (expert < count)[:, None]
    codes, *others = (elementwise.whole_bytes(part) for part in packed)
    each = [part.unflatten(0, (count, -1)).index_select(0, chosen) for part in (codes, *others)]
    if how.group:
        weights = elementwise.weight(how, [part.flatten(0, 1) for part in each], x.shape[-1]).to(x.dtype)
        y = torch.bmm(x[:, None], weights.unflatten(0, (x.shape[0], -1)).transpose(1, 2)).flatten(1)
    else:
        rows, of_rows = elementwise.rounded_rows(x, how.activations) if how.activations else (x, None)
        weights = elementwise.codes(each[0], rows.dtype).float()
        y = torch.bmm(rows.float()[:, None], weights.transpose(1, 2)).flatten(1)
        y = ((y if of_rows is None else y * of_rows) * each[1]).to(x.dtype)
    return torch.where(inside, y, torch.zeros_like(y))


def _linears(x: Tensor, packed: Sequence[Tensor], biases: Sequence[Tensor | None], scheme: str) -> list[Tensor]:
    how = schemes.named(scheme)
    each = [packed[start : start + how.parts] for start in range(0, len(packed), how.parts)]
    if how.group:
        return _products(x, [elementwise.weight(how, own, x.shape[-1]).to(x.dtype) for own in each], biases)
    codes, of_rows = elementwise.rounded_rows(x, how.activations) if how.activations else (x, None)
    weights = [elementwise.codes(elementwise.whole_bytes(own[0]), codes.dtype).float() for own in each]
    results = []
    for y, (_, scale), bias in zip(_products(codes.float(), weights, [None] * len(each)), each, biases, strict=True):
        y = (y if of_rows is None else y * of_rows) * scale
        results.append((y if bias is None else y + bias).to(x.dtype))
    return results


def _products(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    if len(weights) == 1:
        return [ops.linear(x, weights[0], biases[0])]
    return ops.parallel_linear(x, weights, biases)  # type: ignore[no-any-return]


def _embedding(indices: Tensor, packed: Sequence[Tensor], columns: int, dtype: torch.dtype, scheme: str) -> Tensor:
    how = schemes.named(scheme)
    rows = [elementwise.whole_bytes(part)[indices.flatten()] for part in packed]
    if how.group:
        picked = elementwise.weight(how, rows, columns)
    else:
        picked = elementwise.codes(rows[0], torch.float32) * rows[1][:, None]
    return picked.to(dtype).reshape(*indices.shape, columns)


_MEANINGS: dict[Any, Callable[..., Any]] = {
    operations.quantized_linear: _linear,
    operations.parallel_quantized_linear: _linears,
    operations.quantized_grouped_linear: _grouped_linear,
    operations.quantized_embedding: _embedding,
}
