"""recognize_rms_norm: the spellings of models, and the near misses that must stay."""

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
from graphopt.passes.recognize.recognize_rms_norm import recognize_rms_norm
from graphopt.testing import assert_not_applied, check_near_misses, check_pass

PASSES = [remove_noops, merge_common_nodes, recognize_rms_norm]
EPS = 1e-6


def llama(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def gemma(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * (1.0 + weight.float())).type_as(x)


def olmo(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (weight.float() * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS))).to(x.dtype)


def without_weight(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def swapped(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (torch.rsqrt(EPS + wide.pow(2).mean(2, keepdim=True)) * wide).to(x.dtype) * weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [llama, gemma, olmo, without_weight, swapped])
def test_spelling(norm: Callable[..., Tensor], dtype: torch.dtype) -> None:
    inputs = [torch.randn(2, 3, 8).to(dtype), torch.randn(8).to(dtype)]
    found = check_pass(PASSES, norm, inputs, count=1, second=[torch.randn(5, 1, 8).to(dtype), inputs[1]])
    (node,) = (node for node in found.after.graph.nodes if node.target is ops.rms_norm)
    assert node.args[2] == EPS


def test_offset_and_rounding_are_arguments() -> None:
    inputs = [torch.randn(2, 3, 8).bfloat16(), torch.randn(8).bfloat16()]
    (node,) = (n for n in check_pass(PASSES, gemma, inputs).after.graph.nodes if n.target is ops.rms_norm)
    assert node.args[3:] == (1.0, False)


def test_symbolic_sizes() -> None:
    check_pass(PASSES, llama, [torch.randn(2, 3, 8), torch.randn(8)], count=1, dynamic=True)


def test_norm_of_each_head() -> None:
    def queries(x: Tensor, weight: Tensor) -> Tensor:
        return llama(x.view(*x.shape[:2], 4, 8), weight).transpose(1, 2)

    check_pass(PASSES, queries, [torch.randn(2, 3, 32), torch.randn(8)], count=1, dynamic=True)


def test_wide_weight_of_a_narrow_input() -> None:
    check_pass(PASSES, llama, [torch.randn(2, 3, 8).bfloat16(), torch.randn(8)], count=1)


def test_weight_of_two_dimensions_stays_outside() -> None:
    found = check_pass(PASSES, llama, [torch.randn(2, 3, 8), torch.randn(3, 8)], count=1)
    (node,) = (node for node in found.after.graph.nodes if node.target is ops.rms_norm)
    assert node.args[1] is None


def narrow(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def sum_for_mean(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS))


def other_dimension(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS))


def cubed(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + EPS))


def other_input(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x.sin() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def result_used_twice(x: Tensor, weight: Tensor) -> Tensor:
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * (x * scale) + scale


REFUSALS: list[tuple[Callable[..., Tensor], torch.dtype, str]] = [
    (narrow, torch.bfloat16, "expected cast to bfloat16 on the way, found nothing"),
    (sum_for_mean, torch.float32, "expected aten.mean.dim, found aten.sum.dim_IntList"),
    (other_dimension, torch.float32, "expected a result of shape"),
    (cubed, torch.float32, "expected exponent=2, found 3"),
    (other_input, torch.float32, "expected x again (%sin), found %arg"),
    (result_used_twice, torch.float32, "expected no other user, has 2"),
]


@pytest.mark.parametrize(("norm", "dtype", "reason"), REFUSALS, ids=lambda value: getattr(value, "__name__", ""))
def test_not_applied(norm: Callable[..., Tensor], dtype: torch.dtype, reason: str) -> None:
    inputs = [torch.randn(2, 3, 8).to(dtype), torch.randn(8).to(dtype)]
    found = assert_not_applied(PASSES, norm, inputs, reason=reason)
    near = next(refusal for refusal in found.refusals if reason in refusal.reason)
    assert near.reason.startswith("rms_norm: ") and "nodes matched at %" in near.reason
    assert "test_recognize_rms_norm.py:" in near.where


def test_near_misses_are_rewritten_rightly_or_not_at_all() -> None:
    check_near_misses(recognize_rms_norm, llama, [torch.randn(2, 3, 8), torch.randn(8)], verify="off")


@settings(max_examples=6, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    norm=st.sampled_from([llama, gemma]),
)
def test_any_shape(shape: list[int], dtype: torch.dtype, norm: Callable[..., Tensor]) -> None:
    check_pass(PASSES, norm, [torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)], second=[])


def epsilon_outside_of_the_root(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * (torch.rsqrt(wide.pow(2).mean(-1, keepdim=True)) + EPS)).to(x.dtype)


def mean_over_another_dimension(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-2, keepdim=True) + EPS)).to(x.dtype)


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (epsilon_outside_of_the_root, "expected aten.rsqrt.default, found aten.add.Tensor"),
        (mean_over_another_dimension, "stopped at %rsqrt: expected a result of shape (2, 3, 1), found (2, 1, 8)"),
    ],
)
def test_one_near_miss_tells_what_is_amiss(norm: Callable[..., Tensor], reason: str) -> None:
    inputs = [torch.randn(2, 3, 8).bfloat16(), torch.randn(8).bfloat16()]
    left = assert_not_applied(PASSES, norm, inputs, reason=reason)
    assert len(left.reports[-1].refusals) == 1
