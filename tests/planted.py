"""Ways to plant a bug: a wrong pass that replaces each node of one operation by something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from graphopt import edit
from graphopt.pipeline import graph_pass


def wrong_pass(
    target: Any, make: Callable[[edit.Rewrite, fx.Node], fx.Node], *, exactness: str = "rounding", most: int = 99
) -> Callable[[fx.GraphModule], int]:
    """A pass that replaces up to `most` nodes calling `target` by what `make` builds."""

    @graph_pass(exactness=exactness)
    def planted(graph_module: fx.GraphModule) -> int:
        count = 0
        for node in list(graph_module.graph.nodes):
            if node.target is target and not isinstance(node.meta.get("graphopt"), edit.Provenance) and count < most:
                with edit.rewriting(graph_module, node) as rewrite:
                    rewrite.replace(node, make(rewrite, node))
                count += rewrite.applied
        return count

    return planted


def inlined(function: Callable[..., Any]) -> Callable[[edit.Rewrite, fx.Node], fx.Node]:
    """Replaces a node by `function` of its arguments."""
    return lambda rewrite, node: rewrite.inline(function, *node.args, **node.kwargs)
