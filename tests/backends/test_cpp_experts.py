"""Grouped products on the compiled kernels: against each expert by itself, any division of rows, what is declined."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.integrations import moe as moe  # registers transformers::grouped_mm_fallback

import graphopt
from graphopt import grouped
from graphopt.backends.cpp import experts as lowering

pytestmark = pytest.mark.usefixtures("cpp_library")
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
N, K = 48, 64


def each_by_itself(x: Tensor, experts: Tensor, ends: Tensor) -> Tensor:
    """For experts [E, N, K], in float64."""
    out, begin = x.new_zeros(x.shape[0], experts.shape[1], dtype=torch.float64), 0
    for expert, end in zip(experts.double(), ends.tolist(), strict=True):
        out[begin:end] = x[begin:end].double() @ expert.t()
        begin = end
    return out


def check(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype is dtype and got.shape == want.shape and got.is_contiguous()
    assert ((got.double() - want).abs() <= torch.finfo(dtype).eps * want.abs() + 1e-4).all()


@DTYPES
@pytest.mark.parametrize("ends", ([0, 0, 0], [6, 6, 6], [1, 4, 6], [0, 1, 1], [20, 60, 64]))
def test_each_row_meets_its_expert(ends: list[int], dtype: torch.dtype) -> None:
    x, experts = torch.randn(max(6, ends[-1]), K).to(dtype), torch.randn(3, N, K).to(dtype)
    for kind in (torch.int32, torch.int64):
        last = torch.tensor(ends, dtype=kind)
        check(torch.ops.graphopt_cpp.grouped_linear(x, experts, last), each_by_itself(x, experts, last), dtype)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_any_division_of_the_rows(counts: list[int], behind: int) -> None:
    ends = torch.tensor(counts).cumsum(0)
    x, experts = torch.randn(int(ends[-1]) + behind, K), torch.randn(len(counts), 8, K)
    check(torch.ops.graphopt_cpp.grouped_linear(x, experts, ends), each_by_itself(x, experts, ends), torch.float32)


@pytest.mark.parametrize("ends", ([4, 2, 6], [1, 2, 7], [-1, 2, 3]))
def test_ends_that_do_not_fit_are_an_error(ends: list[int]) -> None:
    with pytest.raises(IndexError, match="must rise and stay within 6 rows"):
        torch.ops.graphopt_cpp.grouped_linear(torch.randn(6, K), torch.randn(3, N, K), torch.tensor(ends))


class Mixture(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, N, K).to(dtype))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return torch.ops.transformers.grouped_mm_fallback(x, self.weight.transpose(-2, -1), ends)


@DTYPES
def test_a_model_calls_it_and_sees_changed_weights(dtype: torch.dtype) -> None:
    model, ends = Mixture(dtype), torch.tensor([1, 4, 6], dtype=torch.int32)
    run = torch.compile(model, backend="graphopt", options={"strict": True})
    with torch.no_grad():
        for rows in (6, 40):
            x = torch.randn(rows, K).to(dtype)
            check(run(x, ends), each_by_itself(x, model.weight, ends), dtype)
            model.weight.mul_(-2)
        (graph,) = graphopt.explain(model, x, ends).graphs
    assert [choice.lowering for choice in graph.lowerings] == ["cpp.grouped_linear"]


def choices(function: Any, *inputs: Tensor) -> tuple[fx.GraphModule, list[str]]:
    graph_module = make_fx(function, tracing_mode="fake")(*inputs)
    made = lowering.choose(graph_module)
    graph_module.graph.lint()
    return graph_module, [reason for choice in made for _, reason in choice.declined]


@pytest.mark.parametrize(
    ("function", "inputs", "reason"),
    [
        (lambda x, w, e: torch._grouped_mm(x, w, e), (torch.ones(6, 64).bfloat16(), torch.ones(3, 64, 48).bfloat16()),
         "the experts are kept as [E, K, N]"),
        (lambda x, w, e: torch._grouped_mm(x.t(), w, e), (torch.ones(6, 64).bfloat16(), torch.ones(6, 48).bfloat16()),
         "it is no product of rows [S, K], sorted by expert, with experts [E, K, N]"),
        (lambda x, w, e: torch.ops.transformers.grouped_mm_fallback(x, w.mT, e),
         (torch.ones(6, 64).double(), torch.ones(3, 48, 64).double()),
         "dtype float64 is none of float32, bfloat16, float16"),
    ],
    ids=("kept as [E, K, N]", "gradient", "dtype"),
)  # fmt: skip
def test_declined(function: Any, inputs: tuple[Tensor, ...], reason: str) -> None:
    graph_module, reasons = choices(function, *inputs, torch.tensor([1, 4, 6], dtype=torch.int32))
    assert reasons == [reason]
    assert len(grouped.products(graph_module)) == 1
