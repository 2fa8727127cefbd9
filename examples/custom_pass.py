"""Run a pass of your own among the library's, and read in the report what it did and what it refused."""

from typing import Any

import torch
from torch import fx

import graphopt
from graphopt import edit

aten = torch.ops.aten


@graphopt.graph_pass(exactness="bitwise", training=True)
def remove_double_flip(graph_module: fx.GraphModule) -> int:
    """flip(flip(x, dims), dims) -> x. Flips along other dimensions are refused."""
    count = 0
    for node in graph_module.graph.find_nodes(op="call_function", target=aten.flip.default):
        inner = node.args[0]
        if inner.target is not aten.flip.default:
            continue
        if inner.args[1] != node.args[1]:
            edit.refuse(node, f"flips along {node.args[1]} what was flipped along {inner.args[1]}")
            continue
        with edit.rewriting(graph_module, node) as rewrite:
            copy = rewrite.call(aten.clone.default, inner.args[0], memory_format=torch.contiguous_format)
            rewrite.replace(node, copy)  # a flip makes a new tensor, so its replacement must not alias x
        count += rewrite.applied
    return count


def model(x: torch.Tensor) -> torch.Tensor:
    """One pair of flips to remove, one to keep."""
    twice = x.flip(0).flip(0)
    return twice + x.flip(0).flip(1)


def main() -> None:
    """Compile with the pass, compare, report."""
    options: dict[str, Any] = {"passes": [remove_double_flip]}
    x = torch.randn(3, 3)
    torch.testing.assert_close(torch.compile(model, backend="graphopt", options=options)(x), model(x))
    print(graphopt.explain(model, x, options=options))


if __name__ == "__main__":
    main()
