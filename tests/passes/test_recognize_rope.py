"""recognize_rope: halves and pairs, whole and partial, and what only looks alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt import ops
from graphopt.passes.canonicalize.merge_common_nodes import merge_common_nodes
from graphopt.passes.canonicalize.remove_noops import remove_noops
from graphopt.passes.recognize.recognize_rope import recognize_rope
from graphopt.testing import assert_not_applied, check_pass

PASSES = [remove_noops, merge_common_nodes, recognize_rope]


def rotate_half(x: Tensor) -> Tensor:
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x * cos.unsqueeze(1)) + (rotate_half(x) * sin.unsqueeze(1))


def pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated = torch.stack((-x[:, :, :, 1::2], x[:, :, :, ::2]), dim=-1).flatten(-2)
    return x * cos[:, None] + rotated * sin[:, None]


def partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat((halves(turned, cos, sin), kept), dim=-1)


def inputs(rows: int = 3, width: int = 8, turned: int = 8, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    x = torch.randn(2, rows, 4, width).to(dtype).transpose(1, 2)
    return [x, torch.randn(2, rows, turned).to(dtype), torch.randn(2, rows, turned).to(dtype)]


@pytest.mark.parametrize(("dtype", "dynamic"), [(torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("function", [halves, pairs, partial])
def test_spelling(function: Callable[..., Tensor], dtype: torch.dtype, dynamic: bool) -> None:
    turned = 4 if function is partial else 8
    given_ = inputs(turned=turned, dtype=dtype)
    second = inputs(rows=5, turned=turned, dtype=dtype)
    found = check_pass(PASSES, function, given_, count=1, dynamic=dynamic, second=second)
    (node,) = (node for node in found.after.graph.nodes if node.target is ops.rope)
    assert (len(node.args) == 4 and node.args[3]) is (function is pairs)


def test_queries_and_keys_share_the_angles() -> None:
    def both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return halves(q, cos, sin), halves(k, cos, sin)

    q, cos, sin = inputs()
    check_pass(PASSES, both, [q, q[:, :2].clone(), cos, sin], count=2)


def other_sign(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x[..., :4], x[..., 4:]
    return x * cos[:, None] + torch.cat((x2, -x1), dim=-1) * sin[:, None]


def thirds(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos[:, None] + torch.cat((-x[..., 3:], x[..., :3]), dim=-1) * sin[:, None]


def subtracted(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos[:, None] - rotate_half(x) * sin[:, None]


def other_input(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x.sin() * cos[:, None] + rotate_half(x) * sin[:, None]


def scaled(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.add(x * cos[:, None], rotate_half(x) * sin[:, None], alpha=2)


REFUSALS = [
    (other_sign, "expected aten.neg.default"),
    (thirds, "expected a result of shape"),
    (subtracted, ""),
    (other_input, "expected x again (%sin), found %slice"),
    (scaled, ""),
]


@pytest.mark.parametrize(("function", "reason"), REFUSALS, ids=lambda value: getattr(value, "__name__", ""))
def test_not_applied(function: Callable[..., Tensor], reason: str) -> None:
    assert_not_applied(PASSES, function, inputs(), reason=reason or None)


@settings(max_examples=6, deadline=None)
@given(
    rows=st.integers(1, 4),
    width=st.sampled_from([2, 6, 8]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    function=st.sampled_from([halves, pairs]),
)
def test_any_shape(rows: int, width: int, dtype: torch.dtype, function: Callable[..., Tensor]) -> None:
    check_pass(PASSES, function, inputs(rows, width, width, dtype), second=[])
