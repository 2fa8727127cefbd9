"""Write attention as one `graphopt.attention`, be it torch's fused operator or a chain of products and a softmax.

    s = matmul(q, k.transpose(-1, -2)) * scale + mask;  y = matmul(softmax(s, -1), v)
    s = baddbmm(bias, q, k.transpose(-1, -2), alpha=scale).view(B, H, S, T) + mask;  y = bmm(softmax(s, -1), v)
    y = _scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask, scale=scale)[0]
become
    y = graphopt.attention(q, k, v, mask, scale=scale)

Keys and values that were repeated for grouped heads are taken before the repetition, and an additive mask made of 0
and -inf is taken as the boolean mask it was made from. A plain softmax makes a row that sees no key NaN, where the
fused operators make it 0: `nan_rows` tells them apart. Left alone: dropout, results besides the first in use, and
scores that are filled where a mask hides them. The spellings stand in `attention_chains.py`.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx

from graphopt import edit, match, ops
from graphopt.match.arguments import everything
from graphopt.passes.recognize import attention_chains
from graphopt.passes.recognize.attention_operands import laid_out_anyhow, simplest_mask, ungrouped
from graphopt.pipeline import graph_pass

aten = torch.ops.aten

FUSED = tuple(
    getattr(aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    )
)


@graph_pass(exactness="rounding", stage="recognize", training=False)
def recognize_attention(graph_module: fx.GraphModule) -> int:
    """Replace fused and spelled-out attention by `graphopt.attention`."""
    targets = {node.target for node in graph_module.graph.nodes}
    count = match.apply(graph_module, attention_chains.rules()) if aten._softmax.default in targets else 0
    for node in list(graph_module.graph.nodes):
        if node.target in FUSED:
            count += _replace_fused(graph_module, node)
        elif node.target is ops.attention:
            count += _simplify(graph_module, node)
    return count


def _replace_fused(graph_module: fx.GraphModule, node: fx.Node) -> int:
    given = everything(node)
    q, k, v = given["query"], given["key"], given["value"]
    scale = given.get("scale")
    if given.get("dropout_p") or any(user.args[1] != 0 and user.users for user in node.users):
        edit.refuse(node, "it drops out, or more than its first result is used")
        return 0
    if scale is None and not isinstance(q.meta["val"].shape[-1], int):
        edit.refuse(node, "its scale depends on a symbolic size")
        return 0
    mask = given.get("attn_mask", given.get("attn_bias"))
    with edit.rewriting(graph_module, node) as rewrite:
        scale = q.meta["val"].shape[-1] ** -0.5 if scale is None else scale
        k, v = ungrouped(k, v)
        operands = laid_out_anyhow(q), k, v, simplest_mask(mask)
        new = rewrite.call(ops.attention, *operands, is_causal=bool(given.get("is_causal")), scale=scale)
        for user in node.users:
            if user.target is operator.getitem and user.args[1] == 0:
                rewrite.replace(user, rewrite.like(new, user))
    return rewrite.applied


def _simplify(graph_module: fx.GraphModule, node: fx.Node) -> int:
    """Read keys, values and mask of an attention from where they come from."""
    q, k, v, mask = cast(tuple[Any, ...], (*node.args, None)[:4])
    simple = (laid_out_anyhow(q), *ungrouped(k, v), simplest_mask(mask))
    if simple == (q, k, v, mask):
        return 0
    with edit.rewriting(graph_module, node) as rewrite:
        rewrite.replace(node, rewrite.call(ops.attention, *simple, **node.kwargs))
    return rewrite.applied
