"""simplify_shapes: each symbolic size is computed once, however it is spelled."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.passes.canonicalize.simplify_shapes import simplify_shapes
from graphopt.testing import assert_not_applied, check_pass


def test_two_spellings_of_one_size() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        rows, columns = x.shape
        return x.reshape(rows * columns * 2 // 2) + y.reshape(columns * rows)

    inputs = [torch.randn(3, 5), torch.randn(3, 5)]
    found = check_pass(simplify_shapes, function, inputs, dynamic=True, second=[torch.randn(4, 7), torch.randn(4, 7)])
    products = [node for node in found.after.graph.nodes if isinstance(node.meta.get("val"), torch.SymInt)]
    expressions = [node.meta["val"].node.expr for node in products]
    assert len(set(expressions)) == len(expressions)


def test_different_sizes_stay() -> None:
    def function(x: Tensor) -> Tensor:
        rows, columns = x.shape
        return x.new_zeros(rows + columns).sum() + x.new_zeros(rows * columns).sum() + x.sum()

    assert_not_applied(simplify_shapes, function, [torch.randn(3, 5)], dynamic=True)


def test_known_sizes_have_nothing_to_simplify() -> None:
    assert_not_applied(simplify_shapes, lambda x: x.reshape(-1).sin(), [torch.randn(3, 5)], dynamic=False)


@settings(max_examples=6, deadline=None)
@given(factor=st.integers(1, 4), rows=st.integers(2, 5), columns=st.integers(2, 5))
def test_any_arithmetic(factor: int, rows: int, columns: int) -> None:
    def function(x: Tensor) -> Tensor:
        size = x.shape[0] * factor + x.shape[1] * factor
        return x.new_ones(factor * (x.shape[1] + x.shape[0])).sum() + x.new_ones(size).sum() + x.sum()

    check_pass(simplify_shapes, function, [torch.randn(rows, columns)], dynamic=True, second=[torch.randn(7, 9)])
