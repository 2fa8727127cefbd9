"""Which order of multiplication is cheapest for a low-rank adapter? The search decides for each number of tokens.

A linear layer with an adapter (LoRA; Hu et al., 2021), y = x W^T + (x A^T) B^T, may also be computed with the merged
weight, y = x (W + B A)^T: fewer products when there are many tokens, more when there are few. Two rewrites state that;
`graphopt.search.best` finds where which one pays, and the plot compares predicted and measured times of both orders.

python examples/research_order.py [order.png]
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

import graphopt
from graphopt import match, search

HIDDEN, RANK = 512, 128
TOKENS = (1, 8, 64, 256, 1024)

Tensors = tuple[torch.Tensor, ...]


def adapted(x: torch.Tensor, weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """x [T, K], weight [N, K], down [R, K], up [N, R] -> [T, N], the adapter beside the layer."""
    return x @ weight.t() + (x @ down.t()) @ up.t()


def merged(x: torch.Tensor, weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The same with one weight, made anew at every call."""
    return x @ (weight + up @ down).t()


SHAPES: dict[str, Any] = {"x": (6, 8), "weight": (10, 8), "down": (2, 8), "up": (10, 2)}


@graphopt.graph_pass(exactness="rounding", stage="canonicalize", training=False)
def merge_adapter(graph_module: fx.GraphModule) -> int:
    """x W^T + (x A^T) B^T -> x (W + B A)^T."""
    return match.rewrite(graph_module, match.pattern(**SHAPES)(adapted), merged)


@graphopt.graph_pass(exactness="rounding", stage="canonicalize", training=False)
def split_adapter(graph_module: fx.GraphModule) -> int:
    """x (W + B A)^T -> x W^T + (x A^T) B^T."""
    return match.rewrite(graph_module, match.pattern(**SHAPES)(merged), adapted)


def operands(tokens: int) -> Tensors:
    """Random operands of a layer of HIDDEN by HIDDEN with an adapter of rank RANK."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, HIDDEN), (HIDDEN, HIDDEN), (RANK, HIDDEN), (HIDDEN, RANK))
    return tuple(torch.randn(shape, generator=generator) / HIDDEN**0.5 for shape in shapes)


def times(program: Callable[..., torch.Tensor], given: Tensors, steps: tuple[Callable[..., int], ...]) -> search.Row:
    """Predicted and measured seconds of a program with some passes before the library's."""
    (row,) = search.sweep(program, *given, grid={"passes": [steps]}, fixed={"target": "reference"}, rounds=9).rows
    return row


def main(path: str) -> None:
    """For each number of tokens: both orders, and what the search chose starting from the adapter beside the layer."""
    torch.set_num_threads(1)  # what else the machine does disturbs one thread least
    rows = []
    for tokens in TOKENS:
        given = operands(tokens)
        with torch.no_grad():
            (plan,) = search.best(adapted, *given, using=(merge_adapter, split_adapter), roofline="cpu")
        beside, together = times(adapted, given, ()), times(adapted, given, (merge_adapter,))
        assert beside.bytes != together.bytes and max(beside.error, together.error) < 1e-5
        chosen = "merged" if plan.moves else "beside"
        rows.append((beside, together))
        print(f"{tokens:5} tokens: search says {chosen:6} ({plan})")
        print(f"      measured: beside {beside.measured * 1e3:.3f} ms, merged {together.measured * 1e3:.3f} ms")
    plot(path, rows)


def plot(path: str, rows: list[tuple[search.Row, search.Row]]) -> None:
    """Predicted (dashed) and measured (solid) time of both orders over the number of tokens."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4))
    for index, (name, colour) in enumerate((("beside the layer", "#4c78a8"), ("merged weight", "#f58518"))):
        axis.plot(TOKENS, [pair[index].measured * 1e3 for pair in rows], "o-", color=colour, label=f"{name}, measured")
        axis.plot(
            TOKENS, [pair[index].predicted * 1e3 for pair in rows], "--", color=colour, label=f"{name}, predicted"
        )
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title="a low-rank adapter in two orders")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    print(f"written to {path}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "order.png")
