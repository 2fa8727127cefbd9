"""Index maps turned round: where chains of views show an element, and digits that are joined again."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import sympy
import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt.index_arithmetic import FloorDivide, Remainder
from graphopt.index_inverse import ONE_TO_ONE, base_of, rejoin, shown_index
from graphopt.index_map import Index

aten = torch.ops.aten
CHAINS: dict[str, Any] = {
    "heads of a product": lambda x: x.view(2, 3, 4, 5).permute(0, 2, 1, 3),
    "heads folded into the batch": lambda x: x.view(2, 3, 4, 5).transpose(1, 2).reshape(8, 3, 5),
    "a split, a transpose and a copy": lambda x: x.unsqueeze(0).transpose(-1, -2).clone(),
    "two permutations": lambda x: x.permute(2, 0, 1).permute(1, 2, 0),
}


def sizes(node: Node) -> Index:
    return tuple(map(sympy.Integer, node.meta["val"].shape))


@pytest.mark.parametrize("name", CHAINS)
def test_every_element_is_shown_where_it_is(name: str) -> None:
    x = torch.arange(120.0).view(2, 3, 20)
    graph_module: GraphModule = make_fx(CHAINS[name], tracing_mode="fake")(x)
    (last,) = graph_module.graph.output_node().all_input_nodes
    (placeholder,) = graph_module.graph.find_nodes(op="placeholder")
    assert base_of(last) is placeholder
    symbols = sympy.symbols("i j k", integer=True, nonnegative=True)
    index = shown_index(last, symbols, sizes, dict(zip(symbols, sizes(placeholder), strict=True)))
    shown = CHAINS[name](x)
    for place in itertools.product(*map(range, x.shape)):
        at = tuple(int(i.xreplace(dict(zip(symbols, map(sympy.Integer, place), strict=True)))) for i in index)
        assert shown[at] == x[place]


def test_a_view_that_leaves_elements_out_is_no_link_of_a_chain() -> None:
    graph_module = make_fx(lambda x: x[1:].t(), tracing_mode="fake")(torch.randn(3, 4))
    (last,) = graph_module.graph.output_node().all_input_nodes
    assert base_of(last).target == aten.slice.Tensor and aten.slice.Tensor not in ONE_TO_ONE


def test_digits_of_one_number_are_joined() -> None:
    n, s = sympy.symbols("n s", integer=True, nonnegative=True)
    digits = 512 * s + 64 * FloorDivide(n, sympy.Integer(64)) + Remainder(n, sympy.Integer(64))
    assert rejoin(digits) == 512 * s + n
    apart = 128 * FloorDivide(n, sympy.Integer(64)) + Remainder(n, sympy.Integer(64))
    assert rejoin(apart) == apart
