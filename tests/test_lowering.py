"""Kernels of the user's take what they support on every target, refuse the rest, and are checked as passes are."""

from __future__ import annotations

import pytest
import torch

import graphopt
from graphopt import ops
from graphopt.errors import OptionError
from graphopt.lowering import CustomLowering, arguments, lowering
from graphopt.passes.recognize.recognize_attention import recognize_attention
from graphopt.passes.recognize.recognize_rms_norm import recognize_rms_norm
from graphopt.testing import assert_not_applied, check_kernel, check_pass

aten = torch.ops.aten


def float32_only(node: torch.fx.Node) -> str | None:
    return None if arguments(node)["x"].meta["val"].dtype == torch.float32 else "it computes in float32 only"


@lowering(ops.rms_norm, float32_only)
def mean_square_norm(x, weight, eps, weight_offset, cast_first):
    scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return x * scale if weight is None else x * scale * (weight + weight_offset)


@lowering(ops.rms_norm, lambda node: None)
def norm_without_epsilon(x, weight, eps, weight_offset, cast_first):
    return weight * x * x.square().mean(-1, keepdim=True).rsqrt()


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-3)).to(x.dtype) + 1


def operands(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(3, 8).to(dtype), torch.randn(8).to(dtype)]


@pytest.mark.parametrize("target", ["reference", "triton", pytest.param("cpu", marks=pytest.mark.rotate(one_in=4)),
                                    pytest.param("inductor", marks=pytest.mark.rotate(one_in=4))])  # fmt: skip
def test_runs_on_every_target_at_two_sizes(target: str) -> None:
    torch.compiler.reset()
    options = {"target": target, "passes": [mean_square_norm], "strict": True}
    compiled = torch.compile(norm, backend="graphopt", options=options)
    for rows in (3, 5):
        x, weight = torch.randn(rows, 8), torch.randn(8)
        torch.testing.assert_close(compiled(x, weight), norm(x, weight))
    (graph,) = graphopt.explain(norm, *operands(), options=options).graphs
    assert {done.name: done.rewrites for done in graph.passes}["mean_square_norm"] == 1


def test_keeps_the_contract_of_passes() -> None:
    traced = check_pass([recognize_rms_norm, mean_square_norm], norm, operands(), count=1)
    assert "graphopt_kernels.mean_square_norm" in str(traced.after.graph)
    check_kernel(ops.rms_norm, mean_square_norm.kernel, [*operands(), 1e-3, 0.5, False])


def test_refuses_with_the_reason_that_it_is_given() -> None:
    passes = [recognize_rms_norm, mean_square_norm]
    assert_not_applied(passes, norm, operands(torch.bfloat16), reason="float32 only")


def test_a_wrong_kernel_is_undone_by_verification_and_left_out_by_a_limit() -> None:
    options = {"target": "reference", "passes": [norm_without_epsilon]}
    (graph,) = graphopt.explain(norm, *operands(), options={**options, "verify": "sample"}).graphs
    (undone,) = [done for done in graph.passes if done.error]
    assert undone.name == "norm_without_epsilon" and "VerificationError" in undone.error
    (limited,) = graphopt.explain(norm, *operands(), options={**options, "limit": 1}).graphs
    assert {done.name: done.rewrites for done in limited.passes}["norm_without_epsilon"] == 0


def test_takes_arguments_that_are_given_by_name_only() -> None:
    @lowering(ops.attention, lambda node: None)
    def attend(q, k, v, mask=None, *, is_causal, scale, softcap, window, nan_rows):
        assert (softcap, window, nan_rows) == (0.0, 0, False)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous().transpose(1, 2)

    def program(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) + 1

    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8)
    check_pass([recognize_attention, attend], program, [q, k, v], count=1)


def test_takes_plain_operators_too() -> None:
    @lowering(aten.relu.default, lambda node: None, exactness="bitwise")
    def positive_part(x):
        return torch.where(x > 0, x, torch.where(x.isnan(), x, 0.0))

    check_pass(positive_part, lambda x: x.relu() + 1, [torch.randn(3, 4)], count=1)


def test_a_kernel_defined_again_is_another_one() -> None:
    def make(number: float) -> CustomLowering:
        @lowering(aten.neg.default, lambda node: None)
        def opposite(x):
            return x * number

        return opposite

    first, second = make(-1.0), make(-2.0)
    assert first.kernel(torch.ones(1)).item() == -1.0 and second.kernel(torch.ones(1)).item() == -2.0


@pytest.mark.parametrize(
    ("op", "function", "message"),
    [
        (torch.relu, lambda x: x, "an operator overload is needed"),
        (aten.relu_.default, lambda x: x, "updates its arguments"),
        (aten.view.default, lambda x, size: x, "returns views"),
        (ops.rms_norm, lambda x, weight: x, "cannot take the arguments of graphopt::rms_norm"),
    ],
)
def test_what_cannot_be_lowered_is_an_error(op, function, message) -> None:
    with pytest.raises(OptionError, match=message):
        lowering(op, lambda node: None)(function)
