"""merge_common_nodes: equal nodes are computed once, unless that can be seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from graphopt.passes.canonicalize.merge_common_nodes import merge_common_nodes
from graphopt.testing import assert_not_applied, check_pass
from graphopt.testing.strategies import programs

X = torch.randn(4, 4)


def test_equal_chains_become_one() -> None:
    check_pass(merge_common_nodes, lambda x: x.t().exp().sin() + x.t().exp().cos(), [X], count=2, dynamic=True)


def test_casts_and_views_count() -> None:
    check_pass(
        merge_common_nodes, lambda x: x[1:].double() * x[1:].double().sum(), [X], count=2, second=[torch.randn(7, 2)]
    )


APART: dict[str, Callable[[Tensor], object]] = {
    "1 and 1.0": lambda x: (lambda y: (y * 1 + 1, y * 1.0))((x > 0).int()),
    "0.0 and -0.0": lambda x: torch.copysign(x, torch.full_like(x, 0.0)) - torch.copysign(
        x, torch.full_like(x, -0.0)
    ),
    "random numbers": lambda x: torch.rand_like(x) - torch.rand_like(x),
    "different dtypes": lambda x: x.double().sum() + x.bfloat16().sum(),
}


@pytest.mark.parametrize("pair", APART)
def test_not_applied(pair: str) -> None:
    assert_not_applied(merge_common_nodes, APART[pair], [X])


def test_results_of_the_graph_stay_apart() -> None:
    assert_not_applied(merge_common_nodes, lambda x: (x.exp(), x.exp()), [X], reason="must stay apart")


def test_views_of_results_stay_apart() -> None:
    assert_not_applied(merge_common_nodes, lambda x: (x.exp()[0], x.exp()[1]), [X], reason="must stay apart")


def test_input_that_is_changed_is_read_twice() -> None:
    def update(x: Tensor) -> Tensor:
        y = x.sin()
        x.mul_(2)
        return y + x.sin()

    check_pass(merge_common_nodes, update, [X])


@settings(max_examples=10, deadline=None)
@given(program=programs(most_steps=8))
def test_any_program(program: object) -> None:
    check_pass(merge_common_nodes, program.function, program.inputs, verify="off", second=[])  # type: ignore[attr-defined]
