"""Generated attention over caches in parts, paged and quantised, under the interpreter, against its meaning."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt.backends.triton.attention_split import SPLIT_KEYS
from graphopt.passes.fuse.form_regions import form_regions
from tests.backends import attention_parts
from tests.backends.attention_parts import FORMS, PAGED, TOLERANCE, Parts, operands, pages
from tests.backends.graphs import run

EACH_FORM = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
PLAIN = {"is_causal": False, "scale": 0.3, "softcap": 0.0, "window": 0}


def generated(
    form: Parts, q: Tensor, parts: list[Tensor], length: int, mask: Tensor | None = None, **how: Any
) -> Tensor:
    def attend(q: Tensor, mask: Tensor | None, *parts: Tensor) -> Tensor:
        result: Tensor = form.attention(q, *parts, mask, length, *form.told, **(PLAIN | how))
        return result

    result, (compiled,) = run(attend, q, mask, *parts, prepare=form_regions)
    assert compiled.fallbacks == []
    rows = q.shape[2] * q.shape[1] // parts[-1].shape[1]
    (kernel,) = compiled.kernels.values()
    assert compiled.launches == 1 and bool(kernel.scratch) == (length > SPLIT_KEYS and rows <= 16)
    return result


def check(form: Parts, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **how: Any) -> None:
    parts, rows, values = form.operands(q, k, v)
    result = generated(form, q, parts, k.shape[2], mask, **how)
    expected = attention_parts.expected(q, rows.to(q.dtype), values.to(q.dtype), mask, **(PLAIN | how))
    tolerance = 5 * TOLERANCE[q.dtype]
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)
    assert result.dtype == q.dtype and result.transpose(1, 2).is_contiguous()


@pytest.mark.rotate(one_in=3)
@EACH_FORM
@pytest.mark.parametrize("keys", [1, 15, 16, 47, 48, 90])
def test_every_length_and_group(form: Parts, keys: int) -> None:
    check(form, *operands((6, 2), 1, keys, 16, batch=2))


@EACH_FORM
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_rows(form: Parts, dtype: torch.dtype) -> None:
    check(form, *(operand.to(dtype) for operand in operands((4, 2), 1, 100, 32)))


@pytest.mark.rotate(one_in=2)
@EACH_FORM
@pytest.mark.parametrize("queries", [3, 20])
def test_several_queries_masks_and_settings(form: Parts, queries: int) -> None:
    rows = operands((4, 2), queries, 70, 24)
    check(form, *rows, attention_parts.masked("left", 13, 1, queries, 70), softcap=5.0)
    check(form, *rows, attention_parts.masked("additive", 0, 1, queries, 70), is_causal=True, window=3)


@EACH_FORM
def test_values_of_another_size(form: Parts) -> None:
    q, k, _ = operands((2, 2), 1, 60, 16)
    check(form, q, k, torch.randn(1, 2, 60, 40))


def test_blocks_that_the_table_does_not_name_are_not_read() -> None:
    """The pool holds NaN between the blocks of the cache, and the tail before its last rows."""
    q, k, v = operands((2, 1), 1, 40, 16)
    assert generated(PAGED, q, [*pages(k), *pages(v)], 40).isfinite().all()


@EACH_FORM
def test_keys_of_few_queries_are_shared_out(form: Parts) -> None:
    check(form, *operands((6, 2), 2, SPLIT_KEYS + 100, 16, batch=2))


def test_one_kernel_for_all_lengths() -> None:
    def attend(q: Tensor, *parts: Tensor) -> Tensor:
        length = parts[1].shape[1] * 16 + 5
        result: Tensor = PAGED.attention(q, *parts, None, length, **PLAIN)
        return result

    for keys in (37, 85):
        q, k, v = operands((2, 1), 1, keys, 16)
        parts = [*pages(k), *pages(v)]
        for table in (parts[1], parts[4]):
            torch._dynamo.mark_dynamic(table, 1)
        result, (compiled,) = run(attend, q, *parts, prepare=form_regions)
        assert compiled.fallbacks == [] and compiled.launches == 1 and " n" in compiled.source
        torch.testing.assert_close(
            result.double(), attention_parts.expected(q, k, v, None, **PLAIN), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("nan_rows", [False, True])
def test_a_row_that_sees_nothing(nan_rows: bool) -> None:
    q, k, v = operands((2, 1), 2, 40, 16)
    mask = torch.ones(1, 1, 2, 40, dtype=torch.bool)
    mask[..., 1, :] = False
    result = generated(PAGED, q, [*pages(k, 2), *pages(v, 2)], 40, mask, nan_rows=nan_rows)
    assert result[:, :, 0].isfinite().all()
    assert result[:, :, 1].isnan().all() if nan_rows else (result[:, :, 1] == 0).all()


def test_what_is_not_finite_shows() -> None:
    for form in FORMS.values():
        q, k, v = operands((2, 2), 1, 100, 16)
        k[0, 0, 5, 3] = math.nan
        result = generated(form, q, form.operands(q, k, v)[0], 100)
        assert result[:, 0].isnan().all() and result[:, 1].isfinite().all(), form.name
