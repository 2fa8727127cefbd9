"""drop_relayouts: copies that undo each other go, single ones and seen ones stay."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.passes.recognize.drop_relayouts import drop_relayouts
from graphopt.testing import assert_not_applied, check_pass

X = torch.randn(2, 3, 4, 5)


def there_and_back(x: Tensor, first: tuple[int, ...], second: tuple[int, ...]) -> Tensor:
    return x.exp().permute(first).contiguous().permute(second).contiguous().sin()


def test_copies_that_undo_each_other_go() -> None:
    swap = (0, 2, 1, 3)
    found = check_pass(drop_relayouts, lambda x: there_and_back(x, swap, swap), [X], count=1, dynamic=True)
    assert not any(node.target is torch.ops.aten.clone.default for node in found.after.graph.nodes)


def test_other_layout_stays() -> None:
    assert_not_applied(drop_relayouts, lambda x: there_and_back(x, (0, 2, 1, 3), (0, 3, 1, 2)), [X])


def test_single_copy_stays() -> None:
    assert_not_applied(drop_relayouts, lambda x: x.exp().transpose(1, 2).contiguous().sin(), [X])


def test_copy_of_an_input_that_is_returned_stays() -> None:
    def copied(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2).contiguous()

    assert_not_applied(drop_relayouts, copied, [X])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=5, deadline=None)
@given(first=st.permutations(range(3)), second=st.permutations(range(3)))
def test_any_permutations(dtype: torch.dtype, first: list[int], second: list[int]) -> None:
    check_pass(drop_relayouts, lambda x: there_and_back(x, tuple(first), tuple(second)), [X[0].to(dtype)], second=[])
