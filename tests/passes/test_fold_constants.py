"""fold_constants: what no input reaches is computed once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.passes.canonicalize.fold_constants import LARGEST, fold_constants
from graphopt.testing import assert_not_applied, check_pass

aten = torch.ops.aten


def causal(x: Tensor) -> Tensor:
    i = torch.arange(x.shape[-2])[:, None]
    j = torch.arange(x.shape[-1])[None, :]
    return x.masked_fill(j > i, float("-inf"))


def test_mask_becomes_one_constant() -> None:
    found = check_pass(fold_constants, causal, [torch.randn(2, 5, 5)], count=1, second=[torch.randn(3, 5, 5)])
    assert sum(node.op == "get_attr" for node in found.after.graph.nodes) == 1


def test_equal_elements_become_full() -> None:
    found = check_pass(fold_constants, lambda x: x + torch.ones(3).mul(2).neg(), [torch.randn(2, 3)], count=1)
    assert not any(node.op == "get_attr" for node in found.after.graph.nodes)
    assert any(node.target is aten.full.default for node in found.after.graph.nodes)


@pytest.mark.parametrize("value", [0.0, -0.0, float("inf"), float("nan")])
def test_sign_and_nan_survive(value: float) -> None:
    check_pass(fold_constants, lambda x: torch.copysign(x, torch.full((3,), value).neg()), [torch.randn(3)])


STAYS: dict[str, Callable[[Tensor], object]] = {
    "a constant alone": lambda x: x + torch.arange(3),
    "a large result": lambda x: x[0] + (torch.arange(LARGEST + 1) * 2).sum() * 0 + (torch.arange(LARGEST + 1) * 2)[:3],
    "random numbers": lambda x: x + torch.rand(3).exp(),
    "a result of the graph": lambda x: (x.sin(), torch.arange(3) * 2),
}


@pytest.mark.parametrize("kept", STAYS)
def test_not_applied(kept: str) -> None:
    assert_not_applied(fold_constants, STAYS[kept], [torch.randn(3)])


def test_symbolic_sizes_stay_symbolic() -> None:
    assert_not_applied(fold_constants, causal, [torch.randn(2, 5, 6)], dynamic=True)


def test_result_is_new_memory_at_every_call() -> None:
    def constant(x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.arange(3) * 2
        return x.sin(), y.view(3, 1)

    assert_not_applied(fold_constants, constant, [torch.randn(3)])


@settings(max_examples=6, deadline=None)
@given(
    size=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
    start=st.integers(-2, 2),
)
def test_any_constant(size: int, dtype: torch.dtype, start: int) -> None:
    def function(x: Tensor) -> Tensor:
        return x + (torch.arange(start, start + size) // 2).to(dtype).unsqueeze(-1)

    check_pass(fold_constants, function, [torch.randn(2, size, 3)])
