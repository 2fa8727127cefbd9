"""Write every matrix product with a transposed weight as one `graphopt.linear`.

    x2 = view(x, [B * S, K]);  wt = permute(w, [1, 0]);  y2 = mm(x2, wt);  y = view(y2, [B, S, N])
becomes
    y = graphopt.linear(x, w)

So are `addmm` with a bias of one row, `bmm` with one weight for the whole batch, and einsum's permuted forms: the
transposition is found by addresses, not by spelling. A weight kept as [K, N] (GPT-2's Conv1D) becomes the linear of
its transposed view, which costs nothing and lets every later pass see one form. Products of two activations stay.
"""

from __future__ import annotations

import torch
from torch import fx

from graphopt import edit, ops, shapes, views
from graphopt.pipeline import graph_pass

aten = torch.ops.aten


@graph_pass(exactness="rounding", stage="recognize", training=False)
def recognize_linear(graph_module: fx.GraphModule) -> int:
    """Replace mm, addmm and bmm with a weight by `graphopt.linear`."""
    count = 0
    for node in list(graph_module.graph.nodes):
        if node.target in (aten.mm.default, aten.bmm.default):
            x, right, bias = node.args[0], node.args[1], None
        elif node.target is aten.addmm.default:
            bias, x, right = node.args[:3]
        else:
            continue
        reason = _why_not(node, right, bias)
        if reason:
            edit.refuse(node, reason)
        else:
            count += _rewrite(graph_module, node, x, right, bias)
    return count


def _why_not(node: fx.Node, right: fx.Node, bias: fx.Node | None) -> str:
    if not node.meta["val"].dtype.is_floating_point:
        return "the product is not in floating point"
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
        return "addmm scales its terms by alpha or beta"
    if bias is not None and not shapes.same_sizes(bias.meta["val"].shape, node.meta["val"].shape[1:]):
        return f"the bias has shape {tuple(bias.meta['val'].shape)}, not one row of the result"
    if _weight_source(right) is None:
        return "the right operand is neither transposed nor a weight"
    return ""


def _weight_source(right: fx.Node) -> fx.Node | None:
    """The tensor whose transpose `right` is, or a weight that is stored as `right` is."""
    source = views.transpose_source(right)
    if right.meta["val"].dim() == 2:
        return right if source is None and views.is_constant_input(right) else source
    # The keys of multi-query attention are one matrix for all heads too, but no weight.
    return source if source is not None and views.is_constant_input(source) else None


def _rewrite(
    graph_module: fx.GraphModule, node: fx.Node, x: fx.Node, right: fx.Node, bias: fx.Node | None
) -> int:
    source = _weight_source(right)
    assert source is not None
    with edit.rewriting(graph_module, node) as rewrite:
        weight = source if source is not right else rewrite.call(aten.permute.default, right, [1, 0])
        rest = (weight,) if bias is None else (weight, bias)
        unflattened, results = _unflattened(node, x)
        new = rewrite.call(ops.linear, unflattened, *rest)
        if shapes.difference(results[0].meta["val"], new.meta["val"]):
            edit.refuse(node, "the result would lie differently in memory")
        else:
            for result in results:
                rewrite.replace(result, new)
    return rewrite.applied


def _unflattened(node: fx.Node, x: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The left operand before its leading dimensions were flattened, and the results after they were restored."""
    results = list(node.users)
    if all(user.target is aten.view.default for user in results):
        shape = results[0].meta["val"].shape
        same = all(shapes.same_sizes(user.meta["val"].shape, shape) for user in results)
        for candidate in views.chain(x, views.RESHAPES):
            if same and shapes.same_sizes(candidate.meta["val"].shape, (*shape[:-1], x.meta["val"].shape[-1])):
                return candidate, results
    return x, [node]
