"""Norms of heads, and codes with a scale for each group, in the kernel of the product that they are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt import ops
from graphopt.passes.fuse import joined_columns
from graphopt.quantization import operations, schemes
from tests.backends.test_triton_joined_columns import launched, whole
from tests.backends.test_triton_models import DECODERS, launches
from tests.backends.test_triton_resources import assert_fit, written
from tests.backends.test_triton_rows import rms_norm

bf16, GROUP = torch.bfloat16, 8
SCALE = torch.linspace(0.5, 2, GROUP)


def grouped(y: Tensor, size: int = GROUP) -> Tensor:
    return y.unflatten(-1, (-1, size))


def coded(y: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of int8, and the scale that a group of columns shares."""
    groups = grouped(y).float()
    scale = groups.abs().amax(-1, keepdim=True) / 127
    codes = (groups / torch.where(scale == 0, 1.0, scale)).round().clamp(-127, 127)
    return codes.flatten(-2).to(torch.int8), scale.squeeze(-1)


def spread_out(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of uint8 between the extremes of a group."""
    groups = grouped(y).float()
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / 15
    codes = ((groups - low) / torch.where(step == 0, 1.0, step)).round()
    return codes.to(torch.uint8), step, low


EPILOGUES: dict[str, Callable[[Tensor], Any]] = {
    "codes and a scale": coded,
    "codes, a step and an offset": spread_out,
    "a norm of heads": lambda y: rms_norm(grouped(y), SCALE),
    "a norm of heads, heads first": lambda y: rms_norm(grouped(y).transpose(1, 2), SCALE),
    "a layer norm of heads": lambda y: F.layer_norm(grouped(y), (GROUP,)),
    "a softmax over groups": lambda y: torch.softmax(grouped(y) / 40, -1),
    "a norm of few columns": lambda y: F.layer_norm(y, (y.shape[-1],)),
    "which groups are negative": lambda y: (grouped(y) < 0).all(-1),
}


def inputs(rows: tuple[int, int], dtype: torch.dtype, columns: int = 4 * GROUP) -> tuple[Tensor, Tensor]:
    return whole(-9, 9, *rows, 20).to(dtype), whole(-9, 9, columns, 20).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, bf16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [(1, 17), (2, 35)], ids=str)
@pytest.mark.parametrize("name", EPILOGUES)
def test_groups_are_reduced_by_the_kernel_that_makes_them(
    name: str, rows: tuple[int, int], dtype: torch.dtype
) -> None:
    def function(x: Tensor, w: Tensor) -> Any:
        return EPILOGUES[name](F.linear(x, w))

    given = inputs(rows, dtype)
    got, compiled = launched(function, *given)
    want = function(*given)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert compiled.launches == 1
    for mine, eager in zip(*((a if isinstance(a, tuple) else (a,)) for a in (got, want)), strict=True):
        assert mine.stride() == eager.stride()
        if not eager.is_floating_point():
            assert mine.equal(eager)


def normed_and_rotated(heads: int, size: int) -> Callable[..., Any]:
    def function(x: Tensor, w: Tensor, v: Tensor, scale: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q = F.linear(x, w).unflatten(-1, (heads, size))
        return ops.rope(rms_norm(q, scale).transpose(1, 2), cos, sin), F.linear(x, v)

    return function


@pytest.mark.parametrize("dtype", [torch.float32, bf16], ids=str)
@pytest.mark.parametrize("rows", [(1, 20), (2, 33)], ids=str)
def test_heads_are_normed_and_then_rotated(rows: tuple[int, int], dtype: torch.dtype) -> None:
    """The norm is over both folds of a head."""
    x, w = inputs(rows, dtype)
    others = [torch.randn(size).to(dtype) for size in ((24, 20), (GROUP,), (rows[1], GROUP), (rows[1], GROUP))]
    function = normed_and_rotated(4, GROUP)
    got, compiled = launched(function, x, w, *others)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, function(x, w, *others), rtol=tolerance, atol=tolerance)
    assert compiled.launches == 1


def test_a_gate_is_coded() -> None:
    x, g, u = torch.randn(40, 24), torch.randn(32, 24), torch.randn(32, 24)

    def function(x: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return coded(F.silu(F.linear(x, g)) * F.linear(x, u))

    (codes, scale), compiled = launched(function, x, g, u)
    want, step = function(x, g, u)
    torch.testing.assert_close(scale, step)
    assert compiled.launches == 1 and (codes.int() - want.int()).abs().max() <= 1


def test_a_column_that_is_not_a_number_spoils_its_group_alone() -> None:
    x, w = inputs((1, 18), torch.float32)
    w[GROUP + 1] = torch.nan
    got, _ = launched(lambda x, w: grouped(F.linear(x, w)).amax(-1), x, w)
    assert not got[..., [0, 2, 3]].isnan().any() and got[..., 1].isnan().all()


def test_steps_along_k_are_dealt_out_and_the_merge_reduces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined_columns, "draws_too_little", lambda result, columns: "")
    x, w = whole(-3, 3, 40, 8192), whole(-3, 3, 2 * GROUP, 8192)
    got, compiled = launched(lambda x, w: coded(F.linear(x, w)), x, w)
    assert [kernel.kind for kernel in compiled.kernels.values()] == ["linear_parts", "linear_merge"]
    for mine, want in zip(got, coded(F.linear(x, w)), strict=True):
        assert mine.equal(want)


@pytest.mark.parametrize("scheme", ["int8", "int4-g32"])
def test_products_of_quantised_weights_are_coded_again(scheme: str) -> None:
    x, parts = torch.randn(30, 64), schemes.named(scheme).pack(torch.randn(32, 64) / 8)

    def function(x: Tensor, *parts: Tensor) -> Any:
        return rms_norm(grouped(operations.quantized_linear(x, list(parts), None, scheme)), torch.ones(GROUP))

    got, compiled = launched(function, x, *parts)
    torch.testing.assert_close(got, function(x, *parts), rtol=1e-4, atol=1e-4)
    assert compiled.launches == 1


def test_the_number_of_rows_is_not_specialised() -> None:
    x, w = inputs((2, 19), torch.float32)
    torch._dynamo.mark_dynamic(x, 1)
    got, compiled = launched(lambda x, w: coded(F.linear(x, w)), x, w)
    assert "n0" in compiled.source.split("def kernel_0")[1][:400] and compiled.launches == 1
    for mine, want in zip(got, coded(F.linear(x, w)), strict=True):
        assert mine.equal(want)


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 5), st.sampled_from([2, 4, 16, 32, 64]), st.sampled_from(["norm", "amax", "rope"]),
    st.integers(17, 80),
)
def test_any_grouping_gives_eagers_answers(heads: int, size: int, kind: str, rows: int) -> None:
    x, w = inputs((1, rows), torch.float32, heads * size)
    cos, sin, scale = torch.randn(rows, size), torch.randn(rows, size), torch.randn(size)

    def function(x: Tensor, w: Tensor, scale: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = grouped(F.linear(x, w), size)
        if kind == "amax":
            return y.abs().amax(-1)
        y = rms_norm(y, scale)
        return ops.rope(y.transpose(1, 2), cos, sin) if kind == "rope" else y

    got, compiled = launched(function, x, w, scale, cos, sin)
    assert compiled.launches == 1
    torch.testing.assert_close(got, function(x, w, scale, cos, sin), rtol=1e-5, atol=1e-5)


def test_norms_of_heads_are_no_kernels_of_their_own_with_many_rows() -> None:
    """A layer of Qwen3 takes as many kernels as one of Llama."""
    ids = torch.randint(0, 99, (2, 20))
    counts = [launches(DECODERS[name], 2, ids) - launches(DECODERS[name], 1, ids) for name in ("Llama", "Qwen3")]
    assert counts[0] == counts[1]


def heads_fit(rows: int, size: int, dtype: torch.dtype) -> None:
    shapes = [(1, rows, 1024), (1024, 1024), (256, 1024), (size,), (rows, size), (rows, size)]
    given = [torch.empty(shape, dtype=dtype) for shape in shapes]
    assert_fit(written(normed_and_rotated(1024 // size, size), *given))


def codes_fit(rows: int, size: int, dtype: torch.dtype) -> None:
    def function(x: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        groups = grouped(F.silu(F.linear(x, g)) * F.linear(x, u), size)
        scale = groups.abs().amax(-1, keepdim=True).float() / 127
        return (groups / scale).round().to(torch.int8), scale

    assert_fit(written(function, *(torch.empty(shape, dtype=dtype) for shape in ((rows, 1024), *[(1536, 1024)] * 2))))


@pytest.mark.parametrize("kernel", [heads_fit, codes_fit])
def test_common_groups_fit(kernel: Callable[..., None]) -> None:
    kernel(1000, 128, bf16)


@pytest.mark.rotate(one_in=10)
@pytest.mark.parametrize("dtype", [bf16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("rows", [17, 64, 140, 1000])
@pytest.mark.parametrize("kernel", [heads_fit, codes_fit])
def test_groups_fit(kernel: Callable[..., None], rows: int, size: int, dtype: torch.dtype) -> None:
    kernel(rows, size, dtype)
