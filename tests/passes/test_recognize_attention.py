"""recognize_attention: fused operators, eager chains, grouped heads, masks, and what must stay."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt import ops
from graphopt.passes.canonicalize.merge_common_nodes import merge_common_nodes
from graphopt.passes.canonicalize.remove_noops import remove_noops
from graphopt.passes.recognize.recognize_attention import recognize_attention
from graphopt.testing import TracedGraph, assert_not_applied, check_pass

PASSES = [remove_noops, merge_common_nodes, recognize_attention]


def inputs(batch: int = 2, rows: int = 3, length: int = 5, groups: int = 1) -> list[Tensor]:
    q = torch.randn(batch, rows, 4, 8).transpose(1, 2)
    k, v = (torch.randn(batch, 4 // groups, length, 8) for _ in range(2))
    return [q, k, v]


def attention_of(found: TracedGraph) -> Any:
    (node,) = (node for node in found.after.graph.nodes if node.target is ops.attention)
    return node


def finite_mask(q: Tensor, k: Tensor) -> Tensor:
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return torch.where(visible, 0.0, torch.finfo(torch.float32).min).to(q.dtype)[None, None]


def repeated(x: Tensor, groups: int = 2) -> Tensor:
    batch, heads, length, width = x.shape
    return x[:, :, None].expand(batch, heads, groups, length, width).reshape(batch, heads * groups, length, width)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.25 + finite_mask(q, k)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


SPELLINGS: dict[str, Callable[..., Tensor]] = {
    "fused": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "fused causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "fused scale": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.25),
    "fused mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, finite_mask(q, k)),
    "eager": eager,
    "eager without mask": lambda q, k, v: torch.softmax(q @ k.mT * 0.25, -1) @ v,
    "eager divided": lambda q, k, v: torch.softmax(q @ k.mT / math.sqrt(8.0), -1) @ v,
    "eager unscaled": lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v,
    "eager scaled queries": lambda q, k, v: torch.softmax((q * 0.25) @ k.mT, -1) @ v,
    "eager capped": lambda q, k, v: torch.softmax(
        torch.tanh(q @ k.mT * 0.25 / 30.0) * 30.0 + finite_mask(q, k), -1
    )
    @ v,
}


@pytest.mark.rotate(one_in=3)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling(spelling: str) -> None:
    found = check_pass(PASSES, SPELLINGS[spelling], inputs(), second=inputs(batch=3))
    node = attention_of(found)
    assert node.kwargs.get("is_causal", False) is (spelling == "fused causal")
    assert node.kwargs.get("softcap", 0.0) == (30.0 if spelling == "eager capped" else 0.0)


@pytest.mark.parametrize("spelling", ["fused scale", "eager"])
def test_symbolic_sizes(spelling: str) -> None:
    # Not verified piecewise: nothing in a fused operator says that keys and values are equally long.
    found = check_pass(
        PASSES, SPELLINGS[spelling], inputs(), dynamic=True, second=inputs(3, 4, 7), verify="off"
    )
    attention_of(found)


@pytest.mark.parametrize("call", [eager, F.scaled_dot_product_attention])
def test_keys_and_values_are_taken_before_repetition(call: Callable[..., Tensor]) -> None:
    found = check_pass(PASSES, lambda q, k, v: call(q, repeated(k), repeated(v)), inputs(groups=2), second=[])
    _, k, v, *_ = attention_of(found).args
    assert k.op == v.op == "placeholder"


def test_repetition_of_the_keys_alone_stays() -> None:
    q, k, _ = inputs(groups=2)
    found = check_pass(PASSES, lambda q, k, v: eager(q, repeated(k), v), [q, k, torch.randn(2, 4, 5, 8)], second=[])
    assert attention_of(found).args[1].op == "call_function"


def test_other_order_of_repetition_stays() -> None:
    def tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return eager(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))

    found = check_pass(PASSES, tiled, inputs(groups=2), second=[])
    assert attention_of(found).args[1].op == "call_function"


def test_mask_of_zero_and_infinity_becomes_boolean() -> None:
    def masked(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, visible)

    visible = torch.rand(2, 1, 3, 5) > 0.4
    visible[..., 0] = True
    found = check_pass(PASSES, masked, [*inputs(), visible], second=[])
    assert attention_of(found).args[3].meta["val"].dtype == torch.bool


def test_result_keeps_its_strides() -> None:
    found = check_pass(PASSES, lambda q, k, v: torch.softmax(q @ k.mT * 0.25, -1) @ v, inputs(), second=[])
    (result,) = found.after.graph.output_node().all_input_nodes
    assert result.meta["val"].is_contiguous()


@pytest.mark.parametrize("fused", [True, False])
def test_row_that_sees_no_key(fused: bool) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        if fused:
            return F.scaled_dot_product_attention(q, k, v, mask)
        return torch.softmax(q @ k.mT * 0.25 + mask, -1) @ v

    mask = torch.zeros(3, 5)
    mask[1] = -math.inf
    found = check_pass(PASSES, attention, [*inputs(), mask], second=[])
    assert attention_of(found).kwargs.get("nan_rows", False) is not fused


def folded(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None = None, beta: float = 1.0) -> Tensor:
    """Attention as BLOOM spells it: heads folded into the batch, a bias where the product is added to."""
    (batch, heads, rows, width), length = q.shape, k.shape[2]
    keys = k.reshape(batch * heads, length, width).transpose(-1, -2)
    scores = bias.baddbmm(q.reshape(batch * heads, rows, width), keys, beta=beta, alpha=0.25)
    scores = scores.view(batch, heads, rows, length)
    weights = F.softmax(scores if mask is None else scores + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    seen = torch.bmm(weights.view(batch * heads, rows, length), v.reshape(batch * heads, length, width))
    return seen.view(batch, heads, rows, width).permute(0, 2, 1, 3).reshape(batch, rows, heads * width)


@pytest.mark.parametrize("masked", [False, True], ids=["alone", "masked"])
@pytest.mark.parametrize("bias", [(8, 1, 5), (8, 3, 5), (1, 1, 5), (3, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_that_the_product_is_added_to(bias: tuple[int, ...], masked: bool, dtype: torch.dtype) -> None:
    given = [value.to(dtype) for value in (*inputs(), torch.randn(bias))]

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return folded(q, k, v, bias, finite_mask(q, k) if masked else None)

    found = attention_of(check_pass(PASSES, attention, given, second=[]))
    assert found.kwargs["scale"] == 0.25 and found.kwargs["nan_rows"]
    heads = 1 if bias == (1, 1, 5) or len(bias) == 2 else 4
    sizes = tuple(found.args[3].meta["val"].shape)
    rows = 3 if masked else bias[-2]
    assert torch.Size((1, *sizes)[-3:]) == torch.Size((heads, rows, 5))


def test_a_bias_that_counts_half_is_refused() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return folded(q, k, v, bias, beta=0.5)

    assert_not_applied(PASSES, attention, [*inputs(), torch.randn(8, 1, 5)], reason="its bias counts 0.5 times")


def test_bias_and_mask_of_float16_are_refused() -> None:
    given = [value.half() for value in (*inputs(), torch.randn(8, 1, 5), torch.zeros(2, 1, 3, 5))]
    assert_not_applied(PASSES, folded, given, reason="only where their sum cannot overflow")


def test_scores_that_are_filled_are_refused() -> None:
    """As MPT spells it: a key that is NaN is hidden from those who must not see it; added to a mask it would not be."""

    def filled(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, hidden: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(-1, -2)) * 0.25 + bias
        scores = scores.masked_fill(hidden, torch.finfo(q.dtype).min)
        return torch.softmax(scores.float(), -1).to(v.dtype) @ v

    given = [*inputs(), torch.randn(4, 1, 5), torch.rand(2, 1, 3, 5) > 0.5]
    assert_not_applied(PASSES, filled, given, reason="found aten.where.self")


def weights_too(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.softmax(q @ k.mT * 0.25, -1)
    return weights @ v, weights


def other_dimension(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * 0.25, -2) @ v


def three_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q[0] @ k[0].mT * 0.25, -1) @ v[0]


def scaled_after_the_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT + finite_mask(q, k)) * 0.25, -1) @ v


REFUSALS: list[tuple[Callable[..., Any], str]] = [
    (weights_too, "expected no other user, has 2"),
    (other_dimension, "expected dim=3, found 2"),
    (three_dimensions, "queries have 3 dimensions"),
    (scaled_after_the_mask, "expected aten.bmm.default, found aten.add.Tensor"),
]


@pytest.mark.parametrize(("function", "reason"), REFUSALS, ids=lambda value: getattr(value, "__name__", ""))
def test_not_applied(function: Callable[..., Any], reason: str) -> None:
    assert_not_applied(PASSES, function, inputs(), reason=reason)


@settings(max_examples=5, deadline=None)
@given(
    rows=st.integers(1, 4),
    length=st.integers(1, 6),
    groups=st.sampled_from([1, 2, 4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    call=st.sampled_from([eager, F.scaled_dot_product_attention]),
)
def test_any_shape(rows: int, length: int, groups: int, dtype: torch.dtype, call: Callable[..., Tensor]) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return call(q, repeated(k, groups), repeated(v, groups))

    given_ = [value.to(dtype) for value in inputs(1, rows, length, groups)]
    check_pass(PASSES, attention, given_, second=[], verify="sample")
