"""Grouped products: rows sorted by expert, each times the matrix of its expert, as mixtures of experts compute them.

    y = grouped_mm(x, experts, ends)    # x [S, K], experts [E, K, N], ends [E], the row behind the last of each: [S, N]

`grouped_mm` is ATen's, or what transformers registers in its place (`transformers::grouped_mm_fallback`).
"""

from __future__ import annotations

from typing import Any

from torch import fx

NAMES = ("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default")


def products(graph_module: fx.GraphModule) -> list[fx.Node]:
    """The nodes that multiply rows with the matrix of their expert."""
    return [node for node in graph_module.graph.nodes if str(node.target) in NAMES]


def operands(product: fx.Node) -> tuple[fx.Node, fx.Node, Any]:
    """Of a grouped product: x [S, K], the experts [E, K, N] and the row behind the last of each expert, or None."""
    x, experts, *more = product.args
    assert isinstance(x, fx.Node) and isinstance(experts, fx.Node)
    return x, experts, more[0] if more else product.kwargs.get("offs")


def why_other(product: fx.Node) -> str:
    """Why a grouped product is another one than above, such as the gradient of experts; "" if it is not."""
    x, experts, ends = operands(product)
    more = [*product.args[3:], *(argument for name, argument in product.kwargs.items() if name != "offs")]
    if x.meta["val"].dim() == 2 and experts.meta["val"].dim() == 3 and ends is not None and not any(more):
        return ""
    return "it is no product of rows [S, K], sorted by expert, with experts [E, K, N]"
