"""recognize_linear: every spelling of a product with a weight, and the products that stay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt import ops
from graphopt.passes.canonicalize.remove_noops import remove_noops
from graphopt.passes.recognize.recognize_linear import recognize_linear
from graphopt.testing import assert_not_applied, check_pass

W, B = torch.randn(6, 8), torch.randn(6)


class Linear(nn.Module):
    """A weight [N, K] or [K, N] that is a parameter, and how it is used."""

    def __init__(self, weight: Tensor, call: object) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.randn(6))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.weight, self.bias)  # type: ignore[operator, no-any-return]


def test_linear_of_a_batch_becomes_one_node() -> None:
    check_pass(
        recognize_linear,
        lambda x, w, b: F.linear(x, w, b),
        [torch.randn(2, 3, 8), W, B],
        count=1,
        second=[torch.randn(5, 4, 8), W, B],
        after="""
            %0 f32[2, 3, 6] = graphopt.linear.default(%arg0_1, %arg1_1, %arg2_1)
            return (%0,)
        """,
    )


SPELLINGS = {
    "mm": lambda x, w, b: x.reshape(-1, 8) @ w.t(),
    "addmm": lambda x, w, b: torch.addmm(b, x.reshape(-1, 8), w.t()),
    "matmul": lambda x, w, b: torch.matmul(x, w.transpose(0, 1)),
    "einsum": lambda x, w, b: torch.einsum("bsk,nk->bsn", x, w),
    "bmm": lambda x, w, b: torch.bmm(x, w.t().expand(x.shape[0], 8, 6)),
    "permuted input": lambda x, w, b: x.permute(1, 0, 2) @ w.t(),
    "expanded input": lambda x, w, b: F.linear(x[:1].expand(3, -1, -1), w),
    "one row": lambda x, w, b: F.linear(x[0, 0], w, b),
    "a computed weight": lambda x, w, b: F.linear(x, w * 2),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_spelling(spelling: str, dynamic: bool) -> None:
    model = Linear(torch.randn(6, 8), SPELLINGS[spelling])
    found = check_pass(recognize_linear, model, [torch.randn(2, 3, 8)], count=1, dynamic=dynamic)
    targets = [node.target for node in found.after.graph.nodes]
    assert ops.linear in targets and not any(str(target).startswith("aten.bmm") for target in targets)


def test_weight_stored_transposed_is_read_through_a_view() -> None:
    model = Linear(torch.randn(8, 6), lambda x, w, b: torch.addmm(b, x.reshape(-1, 8), w))
    found = check_pass(recognize_linear, model, [torch.randn(2, 3, 8)], count=1)
    assert sum(node.target is torch.ops.aten.permute.default for node in found.after.graph.nodes) == 1


def test_result_seen_in_two_shapes_keeps_both() -> None:
    def two_shapes(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = x.reshape(6, 8) @ w.t()
        return y.view(2, 3, 6), y.view(3, 2, 6)

    check_pass(recognize_linear, two_shapes, [torch.randn(2, 3, 8), W], count=1, second=[])


def test_no_rows() -> None:
    check_pass(recognize_linear, lambda x: torch.addmm(B, x, W.t()), [torch.randn(0, 8)], count=1)


REFUSALS = {
    "neither transposed nor a weight": (lambda x, w, b: x @ x.transpose(1, 2), torch.randn(2, 3, 8)),
    "scales its terms": (lambda x, w, b: torch.addmm(b, x, w.t(), alpha=2), torch.randn(3, 8)),
    "not one row of the result": (lambda x, w, b: torch.addmm(b[:3, None], x, w.t()), torch.randn(3, 8)),
    "not in floating point": (lambda x, w, b: x @ x.t(), torch.ones(3, 3, dtype=torch.int64)),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_not_applied(reason: str) -> None:
    function, x = REFUSALS[reason]
    assert_not_applied(recognize_linear, function, [x, W, B], reason=reason)


def test_keys_of_multi_query_attention_are_no_weight() -> None:
    def scores(q: Tensor, k: Tensor) -> Tensor:
        return torch.matmul(q, k.view(5, 8)[None, None].transpose(-1, -2))

    assert_not_applied(recognize_linear, scores, [torch.randn(1, 4, 3, 8), torch.randn(5, 8)])


@settings(max_examples=6, deadline=None)
@given(
    lead=st.lists(st.integers(1, 3), min_size=0, max_size=3),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    bias=st.booleans(),
)
def test_any_shape(lead: list[int], sizes: tuple[int, int], dtype: torch.dtype, bias: bool) -> None:
    rows, columns = sizes
    inputs = [torch.randn(*lead, columns).to(dtype), torch.randn(rows, columns).to(dtype)]
    if bias:
        inputs.append(torch.randn(rows).to(dtype))
    check_pass([remove_noops, recognize_linear], F.linear, inputs, second=[])
