"""merge_parallel_linears: groups of any size, and the linears that stay out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt import ops
from graphopt.passes.canonicalize.merge_common_nodes import merge_common_nodes
from graphopt.passes.fuse.merge_parallel_linears import merge_parallel_linears
from graphopt.passes.recognize.recognize_linear import recognize_linear
from graphopt.testing import assert_not_applied, check_pass

PASSES = [merge_common_nodes, recognize_linear, merge_parallel_linears]


def qkv(x: Tensor, wq: Tensor, bq: Tensor, wk: Tensor, wv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return F.linear(x, wq, bq), F.linear(x, wk), F.linear(x, wv)


QKV = [torch.randn(8, 6), torch.randn(8), torch.randn(4, 6), torch.randn(4, 6)]


def test_grouped_query_projections() -> None:
    found = check_pass(PASSES, qkv, [torch.randn(2, 3, 6), *QKV], count=1, second=[torch.randn(4, 1, 6), *QKV])
    merged = [node for node in found.after.graph.nodes if node.target is ops.parallel_linear]
    assert [bias is None for bias in merged[0].args[2]] == [False, True, True]


def test_symbolic_sizes() -> None:
    check_pass(PASSES, qkv, [torch.randn(2, 3, 6), *QKV], count=1, dynamic=True)


def test_weight_made_late_is_moved_up() -> None:
    def late(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        y = F.linear(x, w).relu()
        return y + F.linear(x, torch.sigmoid(v) * 2)

    check_pass(PASSES, late, [torch.randn(2, 6), torch.randn(5, 6), torch.randn(5, 6)], count=1)


def test_weight_that_needs_the_other_result_stays_out() -> None:
    def dependent(x: Tensor, w: Tensor) -> Tensor:
        y = F.linear(x, w)
        return F.linear(x, y)

    assert_not_applied(
        PASSES, dependent, [torch.randn(6, 6), torch.randn(6, 6)], reason="its weight or bias can be ready only after"
    )


def test_the_others_are_merged_without_the_dependent_one() -> None:
    def three(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        y = F.linear(x, w)
        return F.linear(x, y), F.linear(x, v)

    found = check_pass(PASSES, three, [torch.randn(6, 6)] + [torch.randn(6, 6)] * 2, count=1, second=[])
    assert any("can be ready only after" in refusal.reason for refusal in found.refusals)


def test_linears_of_different_inputs_stay() -> None:
    def apart(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w) + F.linear(y, w)

    assert_not_applied(PASSES, apart, [torch.randn(3, 6), torch.randn(3, 6), torch.randn(5, 6)])


@settings(max_examples=5, deadline=None)
@given(
    widths=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    rows=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_number_of_linears(widths: list[int], rows: int, dtype: torch.dtype) -> None:
    def parallel(x: Tensor, *weights: Tensor) -> list[Tensor]:
        return [F.linear(x, weight) for weight in weights]

    inputs = [torch.randn(rows, 4, dtype=dtype), *(torch.randn(width, 4, dtype=dtype) for width in widths)]
    check_pass(PASSES, parallel, inputs, count=1, second=[])
