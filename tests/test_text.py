"""Graphs as text: stable, short, and different where graphs differ."""

from __future__ import annotations

import torch

from graphopt import text
from graphopt.testing import trace


def graph_of(function, *inputs, dynamic=None):
    traced = trace(function, dynamic=dynamic)
    with torch.no_grad():
        traced(*inputs)
    return traced.graphs[0].after


def test_one_line_for_each_node() -> None:
    graph = graph_of(lambda x, y: (x * 2.0 + y).transpose(0, 1), torch.ones(2, 3), torch.ones(2, 3))
    assert text.render(graph) == "\n".join([
        "%arg0_1 f32[2, 3] = input",
        "%arg1_1 f32[2, 3] = input",
        "%0 f32[2, 3] = aten.mul.Tensor(%arg0_1, 2.0)",
        "%1 f32[2, 3] = aten.add.Tensor(%0, %arg1_1)",
        "%2 f32[3, 2] @(1, 3) = aten.permute.default(%1, [1, 0])",
        "return (%2,)",
    ])  # fmt: skip


def test_symbols_and_dtypes_are_written_short() -> None:
    graph = graph_of(lambda x: x.to(torch.bfloat16) + 1, torch.ones(5, 3), dynamic=True)
    rendered = text.canonical_symbols(text.render(graph))
    assert "prims.convert_element_type.default(%arg2_1, bf16)" in rendered
    assert "bf16[s0, s1]" in rendered


def test_graphs_of_two_compilations_have_equal_text() -> None:
    def function(x):
        return torch.softmax(x, -1) @ x.T

    first = graph_of(function, torch.ones(4, 6), dynamic=True)
    second = graph_of(function, torch.ones(7, 9), dynamic=True)
    assert text.canonical_symbols(text.render(first)) == text.canonical_symbols(text.render(second))


def test_diff_shows_what_changed_and_nothing_for_equal_graphs() -> None:
    graph = graph_of(lambda x: x + 1, torch.ones(3))
    other = graph_of(lambda x: x + 2, torch.ones(3))
    assert text.diff(graph, graph) == ""
    difference = text.diff(graph, other)
    assert "-%add f32[3] = aten.add.Tensor(%arg0_1, 1)" in difference
    assert "+%add f32[3] = aten.add.Tensor(%arg0_1, 2)" in difference


def test_comments_name_the_source_line() -> None:
    graph = graph_of(lambda x: x + 1, torch.ones(3))
    assert "test_text.py:" in text.render(graph, comments=True)


def test_arguments_of_every_kind() -> None:
    assert text.argument([1, (2,), None, slice(0, None, 2), torch.float16, torch.device("cpu")]) == (
        "[1, (2,), None, 0::2, f16, cpu]"
    )
    assert text.value((torch.ones(2), None)) == "(f32[2], None)"
    assert text.value(torch.ones(4, 4).t()) == "f32[4, 4] @(1, 4)"
