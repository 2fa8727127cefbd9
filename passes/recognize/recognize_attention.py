"""Write attention as one `graphopt.attention`, be it torch's fused operator or a chain of products and a softmax.

    s = matmul(q, k.transpose(-1, -2)) * scale + mask;  y = matmul(softmax(s, -1), v)
    y = _scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask, scale=scale)[0]
become
    y = graphopt.attention(q, k, v, mask, scale=scale)

Keys and values that were repeated for grouped heads are taken before the repetition, and an additive mask made of 0
and -inf is taken as the boolean mask it was made from. A plain softmax makes a row that sees no key NaN, where the
fused operators make it 0: `nan_rows` tells them apart. Left alone: dropout, and results besides the first in use.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx

from graphopt import edit, match, ops
from graphopt.match.arguments import everything
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
    count = match.apply(graph_module, _rules()) if aten._softmax.default in targets else 0
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


def _chain(scaled: str, capped: bool, masked: bool, widened: bool, safe: bool) -> Callable[..., Tensor]:
    """One spelling of attention; `kt` are the keys, transposed already."""

    def attention(q: Tensor, kt: Tensor, v: Tensor, scale: float = 1.0, cap: float = 0.0, mask: Any = None) -> Tensor:
        scores = q @ kt
        if scaled:
            scores = scores * scale if scaled == "mul" else scores / scale
        if capped:
            scores = torch.tanh(scores / cap) * cap
        if masked:
            scores = scores + mask
        if safe:
            weights: Tensor = aten._safe_softmax(scores, -1)
            return weights @ v
        if widened:
            return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v
        return torch.softmax(scores, -1) @ v

    return attention


def _replacement(scaled: str, safe: bool) -> Callable[..., Any]:
    def attention(q: Tensor, kt: Tensor, v: Tensor, scale: float = 1.0, cap: float = 0.0, mask: Any = None) -> Any:
        factor = 1.0 / scale if scaled == "div" else scale
        return ops.attention(q, kt.mT, v, mask, scale=factor, softcap=cap, nan_rows=not safe)

    return attention


def _why_not(found: match.Match) -> str:
    if found.tensor("q").dim() != 4:
        return f"queries have {found.tensor('q').dim()} dimensions, not batch, head, position, channel"
    if "mask" in found.values and found.tensor("mask").dtype != found.tensor("q").dtype:
        return "the mask has another dtype than the queries"
    return ""


@functools.cache
def _rules() -> tuple[match.Rule, ...]:
    rules = []
    spellings = [
        (scaled, capped, masked, widened, False)
        for widened in (True, False)
        for scaled, capped in (("mul", True), ("mul", False), ("div", False), ("", False))
        for masked in (True, False)
    ]
    for spelling in (*spellings, ("", False, True, False, True), ("", False, False, False, True)):
        scaled, capped, masked, _, safe = spelling
        examples: dict[str, Any] = {"q": (2, 4, 3, 8), "kt": (2, 4, 8, 5), "v": (2, 4, 5, 8)}
        examples |= {"scale": 0.34375} if scaled else {}
        examples |= {"cap": 50.25} if capped else {}
        examples |= {"mask": (2, 1, 3, 5)} if masked else {}
        found = match.pattern(name="attention", **examples)(_chain(*spelling))
        rules.append(match.Rule(found, _replacement(scaled, safe), _why_not))
    return tuple(rules)
