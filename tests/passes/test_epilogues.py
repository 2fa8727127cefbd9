"""Which elementwise readers a product takes into its kernel, and which would make it store more."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.test_joined_columns import formed

bf16 = torch.bfloat16


def inputs(rows: int = 20) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 24).to(bf16), torch.randn(40, 24).to(bf16)


def test_a_detour_over_a_wider_type_is_in_the_kernel() -> None:
    found, _ = formed(lambda x, w: torch.tanh(F.linear(x, w).float() / 30).to(bf16), *inputs())
    assert len(found) == 1 and {"linear", "tanh"} <= set(found[0])


def test_what_would_be_stored_wider_is_left_to_its_readers() -> None:
    """Two bytes are stored for a number, and widened where they are read."""
    found, _ = formed(lambda x, w: torch.softmax(F.linear(x, w).float() * 3, 0), *inputs())
    assert [("linear" in region, "mul" in region) for region in found] == [(True, False), (False, True)]


def test_what_is_read_both_ways_leaves_the_kernel_whole() -> None:
    """The wide number is read outside too: it is not stored, nor anything that is computed from it."""
    def function(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        wide = F.linear(x, w).float() * 3
        return wide.sum(0), wide.relu().to(bf16)

    found, _ = formed(function, *inputs())
    assert found[0] == ["linear"] and len(found) > 1
