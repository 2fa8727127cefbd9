"""Compiled attention over quantised keys and values against its meaning: kinds, lengths, masks, heads, threads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt import ops
from graphopt.quantization import cache_operations as layout
from graphopt.runtime import kv_quantized

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
pytestmark = pytest.mark.usefixtures("cpp_library")
kernels = torch.ops.graphopt_cpp


def parts(rows: Tensor, kind: str, keys: bool) -> list[Tensor]:
    return kv_quantized.reserve(rows, 0, kind, keys)


def exact(codes: Tensor, params: Tensor, tail: Tensor, length: int, kind: str, keys: bool) -> Tensor:
    """All rows in float64; `layout.whole` would round them to the dtype of the tail."""
    packed = layout.dequantize_rows(codes, params, kind, keys, torch.float64)
    return torch.cat([packed, tail[:, :, tail.shape[2] - (length - codes.shape[2]) :].double()], 2)


def check(
    kind: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    softcap: float = 0.0,
    window: int = 0,
) -> Tensor:
    """The kernel against attention on the rows that the parts stand for, in float64."""
    k_parts, v_parts = parts(k, kind, True), parts(v, kind, False)
    length = k.shape[2]
    how: dict[str, Any] = {"is_causal": is_causal, "scale": 0.3, "softcap": softcap, "window": window}
    result: Tensor = kernels.attention_quantized(q, *k_parts, *v_parts, mask, length, kind, *how.values())
    wide = [exact(*part, length, kind, keys) for part, keys in ((k_parts, True), (v_parts, False))]
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    expected = ops.meaning(ops.attention)(q.double(), *wide, mask, **how)
    torch.testing.assert_close(result.double(), expected, rtol=TOLERANCE[q.dtype], atol=TOLERANCE[q.dtype])
    assert result.dtype == q.dtype and result.transpose(1, 2).is_contiguous()
    return result


def operands(
    heads: int, kv_heads: int, rows: int, keys: int, size: int, dtype: torch.dtype = torch.float32, batch: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(batch, h, n, size) for h, n in ((heads, rows), (kv_heads, keys), (kv_heads, keys)))
    k[..., 1] *= 30
    return q.to(dtype), k.to(dtype), v.to(dtype)


@pytest.mark.parametrize("kind", layout.KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_instruction_set(isa: str, kind: str, dtype: torch.dtype) -> None:
    check(kind, *operands(6, 2, 1, 300, 64, dtype, batch=2))


@pytest.mark.parametrize("kind", layout.KINDS)
@pytest.mark.parametrize("size", [2, 16, 40, 80, 96, 128])
def test_head_sizes(kind: str, size: int) -> None:
    check(kind, *operands(2, 2, 2, 130, size))


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(layout.KINDS),
    batch=st.integers(1, 2),
    group=st.integers(1, 5),
    rows=st.integers(1, 18),
    keys=st.integers(1, 200),
    shape=st.sampled_from(("none", "left", "right", "additive")),
    hidden=st.integers(0, 120),
    causal=st.booleans(),
    softcap=st.sampled_from((0.0, 5.0)),
    window=st.sampled_from((0, 3)),
)
def test_any_shape(
    kind: str,
    batch: int,
    group: int,
    rows: int,
    keys: int,
    shape: str,
    hidden: int,
    causal: bool,
    softcap: float,
    window: int,
) -> None:
    q, k, v = operands(2 * group, 2, rows, keys, 16, batch=batch)
    place = torch.arange(keys)
    masks = {
        "none": None,
        "left": (place >= min(hidden, keys - 1))[None, None, None],
        "right": (place < max(1, keys - hidden))[None, None, None].expand(batch, 1, rows, keys),
        "additive": torch.randn(batch, 1, rows, keys),
    }
    check(kind, q, k, v, masks[shape], is_causal=causal, softcap=softcap, window=window)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_share_the_keys(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check("int8", *operands(3, 1, 1, 3000, 64))
    finally:
        torch.set_num_threads(before)


def test_masked_rows_are_not_read() -> None:
    q, k, v = operands(2, 2, 1, 200, 16)
    visible = torch.zeros(1, 1, 1, 200, dtype=torch.bool)
    visible[..., 64:190] = True
    expected = check("int8", q, k, v, visible)
    k[:, :, :64], v[:, :, :64], k[:, :, 192:], v[:, :, 192:] = [math.nan] * 4
    length = 200
    how = (visible, length, "int8", False, 0.3, 0.0, 0)
    assert torch.equal(
        kernels.attention_quantized(q, *parts(k, "int8", True), *parts(v, "int8", False), *how), expected
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows(value: float) -> None:
    q, k, v = operands(2, 2, 1, 100, 16)
    k[0, 0, 5, 3] = value
    result = kernels.attention_quantized(
        q, *parts(k, "int8", True), *parts(v, "int8", False), None, 100, "int8", False, 0.3, 0.0, 0
    )
    assert result[:, 0].isnan().all() and result[:, 1].isfinite().all()


def test_wrong_parts_are_refused() -> None:
    q, k, v = operands(2, 2, 1, 100, 16)
    keys, values = parts(k, "int8", True), parts(v, "int8", False)
    rest = (None, 100, "int8", False, 0.3, 0.0, 0)
    with pytest.raises(RuntimeError, match="not a part of 160 rows"):
        kernels.attention_quantized(q, *keys, *values, None, 160, *rest[2:])
    with pytest.raises(RuntimeError, match="not a part"):
        kernels.attention_quantized(q, *values, *keys, *rest)
    with pytest.raises(RuntimeError, match="kind must be int8, fp8 or int4, got int3"):
        kernels.attention_quantized(q, *keys, *values, None, 100, "int3", *rest[3:])
