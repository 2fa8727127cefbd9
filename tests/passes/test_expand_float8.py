"""Casts to and from eight-bit floats as arithmetic on bytes: the bits of torch's own cast, in the producer's kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.passes.fuse.form_regions import form_regions
from graphopt.quantization import elementwise
from tests.backends.graphs import run
from tests.backends.test_triton_matmul import fuse
from tests.backends.test_triton_resources import assert_fit, written

bf16 = torch.bfloat16
FORMATS = list(elementwise.FLOAT8)


def all_halves(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


def same_bits(mine: Tensor, want: Tensor) -> bool:
    return mine.dtype == want.dtype and mine.view(torch.uint8).equal(want.view(torch.uint8))


@pytest.mark.parametrize("source", [bf16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_every_number_of_two_bytes_becomes_torchs_code(dtype: torch.dtype, source: torch.dtype) -> None:
    x = all_halves(source)
    assert elementwise.to_float8(x.float(), dtype).equal(x.to(dtype).view(torch.uint8))


@settings(max_examples=200, deadline=None)
@given(st.floats(width=32), st.sampled_from(FORMATS))
def test_any_float_becomes_torchs_code(number: float, dtype: torch.dtype) -> None:
    x = torch.tensor([number])
    assert elementwise.to_float8(x, dtype).equal(x.to(dtype).view(torch.uint8))


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_every_code_becomes_its_number(dtype: torch.dtype) -> None:
    data = torch.arange(256).to(torch.uint8)
    got, want = elementwise.from_float8(data, dtype), data.view(dtype).float()
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert got.signbit().logical_or(got.isnan()).equal(want.signbit().logical_or(want.isnan()))


@pytest.mark.parametrize("source", [torch.float32, bf16, torch.float16, torch.float64, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_a_cast_is_in_the_kernel_of_what_it_casts(dtype: torch.dtype, source: torch.dtype) -> None:
    x = (torch.randn(5, 33) * 100).to(source)
    got, (compiled,) = run(lambda x: (x * 3).to(dtype), x, prepare=form_regions)
    assert same_bits(got, (x * 3).to(dtype)) and compiled.fallbacks == [] and compiled.launches == 1


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_codes_are_read_by_the_kernel_that_needs_their_numbers(dtype: torch.dtype) -> None:
    x = (torch.randn(5, 33) * 10).to(dtype)
    got, (compiled,) = run(lambda x: x.to(bf16).relu() + 1, x, prepare=form_regions)
    assert got.equal(x.to(bf16).relu() + 1) and compiled.fallbacks == [] and compiled.launches == 1


def test_from_one_format_to_another() -> None:
    x = all_halves(bf16).to(torch.float8_e4m3fn)
    got, (compiled,) = run(lambda x: x.to(torch.float8_e5m2), x, prepare=form_regions)
    torch.testing.assert_close(got.float(), x.to(torch.float8_e5m2).float(), rtol=0, atol=0, equal_nan=True)
    assert got.dtype == torch.float8_e5m2 and compiled.launches == 1


def test_another_format_stays_torchs_cast() -> None:
    x = torch.randn(40)
    got, (compiled,) = run(lambda x: (x * 2).to(torch.float8_e4m3fnuz), x, prepare=form_regions)
    assert same_bits(got, (x * 2).to(torch.float8_e4m3fnuz)) and compiled.launches == 1


def quantised(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """By a scale that is given."""
    if dtype == torch.int8:
        return lambda y, scale: (y / scale).round().clamp(-128, 127).to(dtype)
    limit = torch.finfo(dtype).max
    return lambda y, scale: (y / scale).clamp(-limit, limit).to(dtype)


def coded_product(dtype: torch.dtype) -> Callable[..., Any]:
    return lambda x, w, b, scale: quantised(dtype)(F.gelu(F.linear(x, w, b)), scale)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("source", [torch.float32, bf16], ids=str)
@pytest.mark.parametrize("dtype", [torch.int8, *FORMATS], ids=str)
def test_a_product_stores_codes(dtype: torch.dtype, source: torch.dtype, rows: int) -> None:
    """Codes are the product's epilogue: nothing wider is stored. Sums are exact, and so are the codes."""
    x, w = torch.randint(-4, 4, (rows, 24)).to(source), torch.randint(-4, 4, (36, 24)).to(source)
    b, scale = torch.ones(36, dtype=source), torch.tensor(0.5, dtype=source)
    function: Callable[..., Any] = lambda x, w, b, scale: quantised(dtype)(F.linear(x, w, b).relu(), scale)  # noqa: E731
    got, (compiled,) = run(function, x, w, b, scale, prepare=fuse)
    assert same_bits(got, function(x, w, b, scale)) and compiled.fallbacks == [] and compiled.launches == 1


@pytest.mark.parametrize("dtype", [torch.int8, *FORMATS], ids=str)
def test_products_that_store_codes_fit(dtype: torch.dtype) -> None:
    for rows in (1, 16, 1000):
        sizes = (rows, 1024), (1536, 1024), (1536,), ()
        assert_fit(written(coded_product(dtype), *(torch.empty(size, dtype=bf16) for size in sizes)))
