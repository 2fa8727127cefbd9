"""slice_before_linear: only the rows that are used are computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt import ops
from graphopt.passes.canonicalize.remove_noops import remove_noops
from graphopt.passes.recognize.recognize_linear import recognize_linear
from graphopt.passes.recognize.slice_before_linear import slice_before_linear
from graphopt.testing import assert_not_applied, check_pass

PASSES = [remove_noops, recognize_linear, slice_before_linear]
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
X, W = torch.randn(2, 5, 8), torch.randn(6, 8)

APPLIED: dict[str, Callable[..., Tensor]] = {
    "last token": lambda x, w: F.linear(x, w)[:, -1].exp(),
    "last tokens": lambda x, w: F.linear(x, w)[:, -2:].exp(),
    "first sequence": lambda x, w: F.linear(x, w)[0],
    "with bias": lambda x, w: F.linear(x, w, w.sum(1))[:, -1].argmax(-1),
}


@pytest.mark.parametrize("rows", APPLIED)
@pytest.mark.parametrize("dynamic", [False, True])
def test_rows(rows: str, dynamic: bool) -> None:
    second = [torch.randn(3, 7, 8), W] if dynamic else None
    found = check_pass(PASSES, APPLIED[rows], [X, W], count=1, dynamic=dynamic, second=second, verify="off")
    (linear,) = (node for node in found.after.graph.nodes if node.target is ops.linear)
    whole = next(node for node in found.before.graph.nodes if node.target in PRODUCTS)
    assert str(linear.meta["val"].shape) != str(whole.meta["val"].shape)


def test_last_token_of_one_sequence_as_a_result() -> None:
    check_pass(PASSES, lambda x, w: F.linear(x, w)[:, -1], [X[:1], W], count=1, second=[])


REFUSALS: dict[str, Callable[..., object]] = {
    "it picks features": lambda x, w: F.linear(x, w)[..., :2].exp(),
    "seen by the caller": lambda x, w: F.linear(x, w)[:, -1],
    "or by a view": lambda x, w: F.linear(x, w)[:, -1].t().exp(),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_not_applied(reason: str) -> None:
    assert_not_applied(PASSES, REFUSALS[reason], [X, W], reason=reason)


def test_all_rows_are_used_elsewhere() -> None:
    def twice(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = F.linear(x, w)
        return y[:, -1].exp(), y.sum()

    assert_not_applied(PASSES, twice, [X, W])
