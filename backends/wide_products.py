"""Products of bfloat16 and float16 by way of float32, on processors that have no instructions for them.

    mm(a, b)                                 # bfloat16: 1 to 17 GFLOP/s on two cores with AVX2, in float32 136
    mm(a.float(), b.float()).to(bfloat16)    # with the casts 117 (256 x 512 x 512)

torch's own loops, which serve where oneDNN has no instructions, sum in float32 and round once; so does this. Linears
have operators of their own for it (cpp/src/wide_product.h).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphopt import _compat, capture, edit

aten = torch.ops.aten
_PRODUCTS = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten.convolution.default,
        aten.convolution_backward.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    }
)


def widen(graph_module: fx.GraphModule) -> None:
    """Let products of two-byte numbers that are slow here be computed in float32, in place."""
    for node in list(graph_module.graph.nodes):
        if node.target in _PRODUCTS and _is_slow(node):
            with edit.rewriting(graph_module, node) as rewrite:
                function = _in_float32(node.target, node.meta["val"])
                new = rewrite.inline(function, *node.args, decompositions=capture.decompositions(), **node.kwargs)
                rewrite.replace(node, rewrite.like(new, node) if isinstance(new, fx.Node) else new)
    edit.eliminate_dead_code(graph_module)


def _is_slow(node: fx.Node) -> bool:
    operands = [operand.meta.get("val") for operand in node.all_input_nodes]
    values = [value for value in operands if isinstance(value, Tensor)]
    on_cpu = all(value.device.type == "cpu" for value in values)
    return on_cpu and not all(_compat.multiplies_fast(value.dtype) for value in values)


def _in_float32(target: Callable[..., Any], like: Any) -> Callable[..., Any]:
    """The operator on operands that are made float32, with results of the dtypes of those in `like`."""

    def wide(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    def narrow(value: Any, like: Any) -> Any:
        return value.to(like.dtype) if isinstance(like, Tensor) else value

    def function(*args: Any, **kwargs: Any) -> Any:
        results = target(*pytree.tree_map(wide, args), **pytree.tree_map(wide, kwargs))
        if isinstance(like, Tensor):
            return narrow(results, like)
        return tuple(map(narrow, results, like))

    return function
