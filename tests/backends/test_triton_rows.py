"""Generated row kernels under the interpreter against eager: dtypes, NaN, shapes, gathers, several outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.backends.triton.interpret import launch
from tests.backends.graphs import run

bf16 = torch.bfloat16


def assert_agrees(
    function: Callable[..., Any], *inputs: Any, rtol: float = 1e-5, atol: float = 1e-5, **options: Any
) -> str:
    """Run a function as one region; it must be one kernel, and give eager's values and dtypes. Returns the source."""
    want = function(*[i.clone() if isinstance(i, torch.Tensor) else i for i in inputs])
    got, compiled = run(function, *inputs, **options)
    assert [c.fallbacks for c in compiled] == [[]] * len(compiled)
    assert all(c.launches == 1 for c in compiled)
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol, equal_nan=True)
    return compiled[0].source


def rms_norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


@pytest.mark.parametrize("columns", [1, 40, 257, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, bf16, torch.float16])
def test_a_norm_rounds_where_eager_rounds(columns: int, dtype: torch.dtype) -> None:
    x, w = torch.randn(2, 3, columns).to(dtype), torch.randn(columns).to(dtype)
    assert_agrees(rms_norm, x, w, rtol=1e-5 if dtype == torch.float32 else 8e-3)


def test_each_operation_on_bfloat16_rounds() -> None:
    x, y = torch.randn(64, 7).to(bf16), torch.randn(64, 7).to(bf16)
    assert_agrees(lambda a, b: (a + b) * b - a, x, y, rtol=0, atol=0)


@pytest.mark.parametrize("columns", [5, 9000])
def test_softmax_walks_a_long_row_three_times(columns: int) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        shifted = (x - x.amax(-1, keepdim=True)).exp()
        return shifted / shifted.sum(-1, keepdim=True)

    source = assert_agrees(function, torch.randn(3, columns))
    assert source.count("    for start") == (3 if columns == 9000 else 0)


@pytest.mark.parametrize("columns", [7, 8500])
def test_extremes_and_their_places_let_nan_through(columns: int) -> None:
    x = torch.randn(5, columns)
    x[1, 3] = x[1, 5] = float("nan")
    x[2] = 1.0
    x[3] = float("-inf")
    assert_agrees(lambda a: (a.argmax(-1), a.argmin(-1), a.amax(-1), a.max(-1)), x)


def test_maximum_minimum_clamp_and_relu_let_nan_through() -> None:
    x = torch.tensor([float("nan"), 1.0, -2.0, -0.0, float("inf")])
    y = torch.tensor([0.0, float("nan"), 3.0, 0.0, 1.0])
    assert_agrees(
        lambda a, b: (torch.maximum(a, b), torch.minimum(a, b), a.clamp(-1, 1), a.relu(), torch.fmax(a, b)), x, y
    )


def test_integer_division_rounds_and_signs_as_eager() -> None:
    a = torch.tensor([7, -7, 7, -7, 0, 6, -6])
    b = torch.tensor([2, 2, -2, -2, 3, -3, 3])
    assert_agrees(lambda x, y: (x // y, x % y, torch.div(x, y, rounding_mode="trunc"), torch.fmod(x, y), x / y), a, b)


def test_float_remainder_has_the_divisors_sign() -> None:
    a, b = torch.tensor([5.5, -5.5, 5.5, -5.5, 1.0]), torch.tensor([2.0, 2.0, -2.0, -2.0, 0.1])
    assert_agrees(lambda x, y: (x % y, torch.fmod(x, y), torch.floor_divide(x, y)), a, b)


def test_booleans_and_promotion() -> None:
    flags, numbers, wide = torch.rand(9) > 0.5, torch.arange(9), torch.randn(9)
    assert_agrees(
        lambda f, n, w: (f & (n > 3), f + n, n * w, f * w, n.to(torch.int8) + 1, ~f, (n + 0.5).to(torch.int32)),
        flags,
        numbers,
        wide,
    )


def test_small_integers_wrap() -> None:
    x = torch.tensor([120, 127, -128, 5], dtype=torch.int8)
    assert_agrees(lambda a: (a + a, a * a, -a), x)


def test_negative_numbers_beside_unsigned_tensors_wrap() -> None:
    x = torch.tensor([0, 3, 200, 255], dtype=torch.uint8)
    assert_agrees(lambda a: (a * -2, a + -1, a == -1, a.clamp(min=3)), x)


def test_int8_to_bfloat16_goes_by_value() -> None:
    assert_agrees(lambda a: a.to(bf16) * 2, torch.tensor([-128, -3, 0, 5, 127], dtype=torch.int8))


@pytest.mark.parametrize("columns", [33, 8200])
def test_sums_scans_and_variances(columns: int) -> None:
    x = torch.randn(3, columns)
    assert_agrees(lambda a: (a.sum(-1), a.mean(-1, keepdim=True), a.std(-1)), x, atol=1e-3)
    assert_agrees(lambda a: torch.var_mean(a, -1, correction=0), x, atol=1e-3)
    assert_agrees(lambda a: a.cumsum(-1), x, rtol=1e-3, atol=1e-3)


def test_reductions_over_other_dimensions() -> None:
    assert_agrees(lambda a: (a.sum(1), a.amax(1)), torch.randn(3, 5, 4))
    assert_agrees(lambda a: a.sum((0, 2)), torch.randn(3, 5, 4))
    assert_agrees(lambda a: (a.sum(), (a > 0).any(), (a > -9).all()), torch.randn(3, 5))


def test_integers_sum_in_int64() -> None:
    assert_agrees(lambda a: (a.sum(-1), a.prod(-1)), torch.full((2, 5), 100, dtype=torch.int8))


def test_rotary_embedding_is_views_and_one_kernel() -> None:
    def rope(q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        heads = q.view(1, 6, 4, 8).transpose(1, 2)
        return heads * cos + torch.cat((-heads[..., 4:], heads[..., :4]), -1) * sin

    assert_agrees(
        rope, torch.randn(1, 6, 32).to(bf16), torch.randn(6, 8).to(bf16), torch.randn(6, 8).to(bf16), rtol=0, atol=0
    )


def test_gathers() -> None:
    table, ids = torch.randn(11, 6), torch.randint(0, 11, (2, 3))
    assert_agrees(lambda w, i: F.embedding(i, w) * 2, table, ids)
    assert_agrees(lambda w, i: (w[i], w[:, i % 6], torch.gather(w, 0, i[:1, :3] % 2)), table, ids)
    assert_agrees(lambda w, i: w[i - 11], table, ids)


def test_outputs_of_other_shapes_are_sections_of_one_launch() -> None:
    source = assert_agrees(
        lambda a, b: (a * 2, torch.cat([b, b + 1], 1), b.sum(-1)), torch.randn(4, 8), torch.randn(3, 5)
    )
    assert "blocks_1" in source


def test_views_are_index_maps() -> None:
    x = torch.randn(4, 6, 5)
    assert_agrees(lambda a: (a.transpose(0, 2)[1:, ::2].flip(0) + 1, a.unfold(1, 3, 2).sum(-1), a.roll(2, 1) * 2), x)
    assert_agrees(lambda a: F.pad(a, (1, 2, 0, 1), value=3.0) + a.new_ones(7, 8), x)


def test_inputs_may_be_strided() -> None:
    assert_agrees(lambda a, b: a + b, torch.randn(6, 10)[:, ::2], torch.randn(5, 6).t())


def test_empty_tensors() -> None:
    assert_agrees(lambda a: (a.sum(-1), a * 2), torch.randn(3, 0))
    assert_agrees(lambda a: (a.sum(-1), a * 2), torch.randn(0, 3))


def test_symbolic_sizes_are_parameters() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.cat([x, y], 1).softmax(-1), x * x.shape[0], y.view(-1)[1:] + 1

    source = assert_agrees(function, torch.randn(4, 9), torch.randn(4, 5), dynamic=True)
    assert "n0" in source and "s" in source.split("def call", 1)[1]


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, bf16]),
    seed=st.integers(0, 1000),
)
def test_norm_and_residual_of_any_shape(rows: int, columns: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    x, y, w = torch.randn(rows, columns).to(dtype), torch.randn(rows, columns).to(dtype), torch.randn(columns).to(dtype)

    def function(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return a + b, rms_norm(a + b, c)

    assert_agrees(function, x, y, w, rtol=1e-5 if dtype == torch.float32 else 1.6e-2)


def test_sizes_whose_product_is_wide_do_not_wrap() -> None:
    """The first program of a kernel over 65536 x 65536 elements; its mask once was a product of 32 bits."""
    x = torch.randn(1024)
    _, compiled = run(lambda a: a * 2, torch.randn(5, 7), dynamic=True)
    kernel = compiled[0].kernels["kernel_0_rows"]
    for size, index in ((65_536, tl.int64), (40, tl.int32)):
        out = torch.zeros(1024)
        launch(compiled[0].namespace["kernel_0_rows"], 1, x, out, size, size, **kernel.constants, INDEX=index)
        assert out.equal(x * 2)
