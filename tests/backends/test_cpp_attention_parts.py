"""Compiled attention over caches in parts, paged and quantised, against its meaning: sizes, masks, heads, threads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.quantization import cache_operations as layout
from tests.backends import attention_parts
from tests.backends.attention_parts import FORMS, PAGED, TOLERANCE, Parts, operands, pages

pytestmark = pytest.mark.usefixtures("cpp_library")
EACH_FORM = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
QUANTISED = pytest.mark.parametrize(
    "form", [form for form in FORMS.values() if form is not PAGED], ids=lambda form: form.name
)
PLAIN = {"is_causal": False, "scale": 0.3, "softcap": 0.0, "window": 0}


def run(form: Parts, q: Tensor, parts: list[Tensor], length: int, mask: Tensor | None = None, **how: Any) -> Tensor:
    kernel = getattr(torch.ops.graphopt_cpp, form.attention._schema.name.removeprefix("graphopt::"))
    result: Tensor = kernel(q, *parts, mask, length, *form.told, *(PLAIN | how).values())
    return result


def check(form: Parts, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **how: Any) -> Tensor:
    """The kernel and the dialect's operation against attention, in float64, over the rows that the parts stand for."""
    parts, rows, values = form.operands(q, k, v)
    wanted = attention_parts.expected(q, rows, values, mask, **(PLAIN | how))
    result = run(form, q, parts, k.shape[2], mask, **how)
    results = [result]
    if q.dtype == torch.float32:  # the meaning rounds rows to the dtype of q
        results.append(form.attention(q, *parts, mask, k.shape[2], *form.told, **(PLAIN | how)))
    for got in results:
        torch.testing.assert_close(got.double(), wanted, rtol=TOLERANCE[q.dtype], atol=TOLERANCE[q.dtype])
        assert got.dtype == q.dtype and got.transpose(1, 2).is_contiguous()
    return result


@EACH_FORM
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_instruction_set(isa: str, form: Parts, dtype: torch.dtype) -> None:
    check(form, *(operand.to(dtype) for operand in operands((6, 2), 1, 300, 64, batch=2)))


@pytest.mark.parametrize(
    ("form", "size"),
    [pytest.param(form, size, id=f"{name}-{size}") for name, form in FORMS.items() for size in form.sizes],
)
def test_head_sizes(form: Parts, size: int) -> None:
    check(form, *operands((2, 2), 2, 130, size))


@EACH_FORM
def test_values_of_another_size(form: Parts) -> None:
    q, k, _ = operands((4, 2), 1, 90, 16)
    check(form, q, k, torch.randn(1, 2, 90, 24))


@EACH_FORM
@settings(max_examples=25, deadline=None)
@given(case=attention_parts.cases())
def test_any_shape(form: Parts, case: tuple[list[Tensor], Tensor | None, dict[str, Any]]) -> None:
    rows, mask, how = case
    check(form, *rows, mask, **how)


@EACH_FORM
def test_threads_share_the_keys(form: Parts, threads: int) -> None:
    check(form, *operands((3, 1), 1, 3000, 64))


@QUANTISED
@settings(max_examples=10, deadline=None)
@given(first=st.integers(0, 150), count=st.integers(1, 50))
def test_what_the_mask_hides_is_not_read(form: Parts, first: int, count: int) -> None:
    q, k, v = operands((2, 2), 1, 200, 16)
    visible = torch.zeros(1, 1, 1, 200, dtype=torch.bool)
    visible[..., first : first + count] = True
    expected = check(form, q, k, v, visible)
    low, high = first // layout.GROUP * layout.GROUP, -(-(first + count) // layout.GROUP) * layout.GROUP
    for rows in (k, v):
        rows[:, :, :low] = rows[:, :, high:] = math.nan
    assert torch.equal(run(form, q, form.operands(q, k, v)[0], 200, visible), expected)


@EACH_FORM
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows(form: Parts, value: float) -> None:
    q, k, v = operands((2, 2), 1, 100, 16)
    k[0, 0, 5, 3], q[..., 3] = value, 1.0
    result = run(form, q, form.operands(q, k, v)[0], 100)
    assert result[:, 0].isnan().all() and result[:, 1].isfinite().all()


@QUANTISED
@pytest.mark.parametrize("size", [512, 544])
def test_codes_whose_sums_have_just_room_and_longer_rows(form: Parts, size: int) -> None:
    q, k, v = operands((2, 1), 1, 120, size)
    k[..., :] = q[:, :1]  # all products of one sign, and the largest that there are
    check(form, 0.0309 * q.sign(), k.abs().sign() * k.sign(), v.abs().clamp(0.9, 1.0))


@QUANTISED
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_queries_of_any_magnitude_share_a_head(form: Parts, dtype: torch.dtype) -> None:
    q, k, v = operands((5, 1), 2, 200, 32)
    q *= torch.tensor([0.0, 1e-30, 1e-4, 0.3, 2.0])[:, None, None]
    check(form, q.to(dtype), k.to(dtype), v.to(dtype))


@QUANTISED
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_token_that_is_not_finite_shows_in_its_head(form: Parts, value: float) -> None:
    q, k, v = operands((4, 2), 1, 100, 16)
    v[0, 1, 40, 3] = value
    result = run(form, q, form.operands(q, k, v)[0], 100)
    assert result[:, 2:].isnan().all() and result[:, :2].isfinite().all()


@QUANTISED
def test_weights_of_very_different_size_in_one_block(form: Parts) -> None:
    """One key takes nearly all of the weight: what the others are rounded to is small beside it."""
    q, k, v = operands((3, 1), 1, 180, 64)
    k[:, :, 70] = 2 * q[:, :1, 0]
    check(form, q, k, v)


def test_wrong_parts_of_quantised_caches_are_refused() -> None:
    form = FORMS["int8"]
    q, k, v = operands((2, 2), 1, 100, 16)
    parts = form.operands(q, k, v)[0]
    with pytest.raises(RuntimeError, match="not a part of 160 rows"):
        run(form, q, parts, 160)
    with pytest.raises(RuntimeError, match="not a part"):
        run(form, q, [*parts[3:], *parts[:3]], 100)
    with pytest.raises(RuntimeError, match="kind must be int8, fp8 or int4, got int3"):
        torch.ops.graphopt_cpp.attention_quantized(q, *parts, None, 100, "int3", *PLAIN.values())


def test_wrong_parts_of_paged_caches_are_refused() -> None:
    q, k, v = operands((2, 2), 1, 100, 16)
    keys, values = pages(k), pages(v)
    with pytest.raises(RuntimeError, match="not a cache of 160 rows"):
        run(PAGED, q, [*keys, *values], 160)
    for number in (-1, 1000):
        with pytest.raises(RuntimeError, match=f"block {number} of a pool of 13"):
            run(PAGED, q, [keys[0], torch.full_like(keys[1], number), keys[2], *values], 100)
    with pytest.raises(RuntimeError, match="table"):
        run(PAGED, q, [keys[0], keys[1].int(), keys[2], *values], 100)
