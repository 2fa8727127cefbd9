"""remove_noops: what changes nothing goes, what keeps values or memory apart stays."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from graphopt.passes.canonicalize.remove_noops import remove_noops
from graphopt.testing import assert_not_applied, check_pass
from graphopt.testing.strategies import programs

NOOPS: dict[str, Callable[[Tensor], Tensor]] = {
    "view to the same shape": lambda x: x.exp().view(x.shape).sin(),
    "permutation and back": lambda x: x.exp().transpose(0, 1).transpose(0, 1).sin(),
    "unsqueeze and squeeze": lambda x: x.exp().unsqueeze(1).squeeze(1).sin(),
    "whole slice": lambda x: x.exp()[:, 0:100].sin(),
    "expand to the same shape": lambda x: x.exp().expand(x.shape).sin(),
    "clone": lambda x: x.exp().clone().sin(),
    "times one": lambda x: (x.exp() * 1.0).sin(),
    "divided by one": lambda x: (x.exp() / 1).sin(),
    "minus zero": lambda x: (x.exp() - 0.0).sin(),
    "cat of one": lambda x: torch.cat([x.exp(), x.new_empty(0, x.shape[1])]).sin(),
    "widened and narrowed": lambda x: x.bfloat16().float().bfloat16().sin(),
}


@pytest.mark.parametrize("noop", NOOPS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_noop_goes(noop: str, dynamic: bool) -> None:
    x = torch.tensor([[-0.0, math.inf, math.nan], [1e-40, -3.0, 65504.0]])
    found = check_pass(remove_noops, NOOPS[noop], [x], dynamic=dynamic)
    computing = [node for node in found.after.graph.nodes if node.op == "call_function"]
    expected = 2 if dynamic and noop == "whole slice" else 1  # no symbol is proven below 100
    assert len(computing) - (noop == "whole slice" and dynamic) <= expected + 1


STAYS: dict[str, Callable[[Tensor], object]] = {
    "plus zero, which changes -0.0": lambda x: (x + 0.0).sin(),
    "minus negative zero": lambda x: (x - (-0.0)).sin(),
    "times one in a wider dtype": lambda x: (x.int() * 1.0).sin(),
    "narrowed and widened": lambda x: x.bfloat16().float().sin(),
    "a real permutation": lambda x: x.t().contiguous().sin(),
    "a conjugate": lambda x: torch.complex(x, x).conj().imag * 2,
}


@pytest.mark.parametrize("kept", STAYS)
def test_not_applied(kept: str) -> None:
    assert_not_applied(remove_noops, STAYS[kept], [torch.tensor([[-0.0, 2.5, 3.25]])])


def test_copy_of_an_input_that_is_returned_stays() -> None:
    assert_not_applied(remove_noops, lambda x: x.clone(), [torch.randn(3)], reason="keeps apart")


def test_two_results_keep_their_own_memory() -> None:
    def twice(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.exp()
        return y, y.clone()

    assert_not_applied(remove_noops, twice, [torch.randn(3)], reason="keeps apart")


def test_view_of_a_copy_keeps_its_own_memory() -> None:
    def views(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.exp()
        return y[0], y.clone()[1]

    assert_not_applied(remove_noops, views, [torch.randn(3, 2)], reason="keeps apart")


def test_old_value_of_a_changed_input_stays() -> None:
    def update(x: Tensor) -> Tensor:
        old = x.clone()
        x.add_(1)
        return old * 2 + x

    check_pass(remove_noops, update, [torch.randn(3)])


def test_copy_that_only_the_graph_sees_goes_with_its_result() -> None:
    check_pass(remove_noops, lambda x: x.exp().clone(), [torch.randn(3)], count=1)


@settings(max_examples=10, deadline=None)
@given(program=programs(most_steps=6))
def test_any_program(program: object) -> None:
    check_pass(remove_noops, program.function, program.inputs, verify="off", second=[])  # type: ignore[attr-defined]
