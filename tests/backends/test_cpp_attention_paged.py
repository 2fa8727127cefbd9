"""Compiled attention over blocks against its meaning: tables in any order, lengths, masks, heads, threads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt import ops
from graphopt.runtime.kv_paged import BLOCK, TAIL, attention_paged

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
pytestmark = pytest.mark.usefixtures("cpp_library")


def pages(rows: Tensor, new: int = 1) -> list[Tensor]:
    """The parts of rows [B, H, S, D]: blocks in random order in a pool with others between, that hold NaN."""
    batch, heads, length, size = rows.shape
    count = (length - min(new, length)) // BLOCK
    table = torch.randperm(2 * batch * count + 1)[: batch * count].view(batch, count)
    pool = torch.full((2 * batch * count + 1, heads, BLOCK, size), math.nan, dtype=rows.dtype)
    pool[table.flatten()] = rows[:, :, : count * BLOCK].unflatten(2, (count, BLOCK)).transpose(1, 2).flatten(0, 1)
    recent = rows[:, :, count * BLOCK :]
    tail = rows.new_full((TAIL + new, batch, heads, size), math.nan).permute(1, 2, 0, 3)
    tail[:, :, tail.shape[2] - recent.shape[2] :] = recent
    return [pool[0], table, tail]


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    cap: float = 0.0,
    window: int = 0,
) -> Tensor:
    """The kernel and the dialect's operation against attention over the rows in float64."""
    parts = *pages(k, q.shape[2]), *pages(v, q.shape[2])
    how: dict[str, Any] = {"is_causal": causal, "scale": 0.3, "softcap": cap, "window": window}
    kernel = torch.ops.graphopt_cpp.attention_paged
    results = kernel(q, *parts, mask, k.shape[2], *how.values()), attention_paged(q, *parts, mask, k.shape[2], **how)
    wide = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    expected = ops.meaning(ops.attention)(q.double(), k.double(), v.double(), wide, **how)
    for result in results:
        torch.testing.assert_close(result.double(), expected, rtol=TOLERANCE[q.dtype], atol=TOLERANCE[q.dtype])
        assert result.dtype == q.dtype and result.transpose(1, 2).is_contiguous()
    return results[0]


def operands(heads: tuple[int, int], rows: int, keys: int, size: int, batch: int = 1) -> list[Tensor]:
    return [torch.randn(batch, h, n, size) for h, n in ((heads[0], rows), (heads[1], keys), (heads[1], keys))]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    check(*(operand.to(dtype) for operand in operands((6, 2), 1, 300, 64, batch=2)))


@pytest.mark.parametrize("size", [1, 2, 17, 40, 80, 128])
def test_head_sizes(size: int) -> None:
    check(*operands((2, 2), 2, 130, size))


def test_values_of_another_size() -> None:
    q, k, _ = operands((4, 2), 1, 90, 16)
    check(q, k, torch.randn(1, 2, 90, 24))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    group=st.integers(1, 5),
    rows=st.integers(1, 18),
    keys=st.integers(1, 200),
    shape=st.sampled_from(("none", "left", "right", "additive")),
    hidden=st.integers(0, 120),
    causal=st.booleans(),
    cap=st.sampled_from((0.0, 5.0)),
    window=st.sampled_from((0, 3)),
)
def test_any_shape(
    batch: int, group: int, rows: int, keys: int, shape: str, hidden: int, causal: bool, cap: float, window: int
) -> None:
    place = torch.arange(keys)
    masks = {
        "none": None,
        "left": (place >= min(hidden, keys - 1))[None, None, None],
        "right": (place < max(1, keys - hidden))[None, None, None].expand(batch, 1, rows, keys),
        "additive": torch.randn(batch, 1, rows, keys),
    }
    given_rows = operands((2 * group, 2), rows, keys, 16, batch=batch)
    check(*given_rows, masks[shape], causal=causal, cap=cap, window=window)


def test_threads_share_the_keys(threads: int) -> None:
    check(*operands((3, 1), 1, 3000, 64))


def test_what_is_not_finite_shows() -> None:
    q, k, v = operands((2, 2), 1, 100, 16)
    k[0, 0, 5, 3] = math.nan
    result = torch.ops.graphopt_cpp.attention_paged(q, *pages(k), *pages(v), None, 100, False, 0.3, 0.0, 0)
    assert result[:, 0].isnan().all() and result[:, 1].isfinite().all()


def test_wrong_parts_are_refused() -> None:
    q, k, v = operands((2, 2), 1, 100, 16)
    keys, values = pages(k), pages(v)
    kernel, how = torch.ops.graphopt_cpp.attention_paged, (False, 0.3, 0.0, 0)
    with pytest.raises(RuntimeError, match="not a cache of 160 rows"):
        kernel(q, *keys, *values, None, 160, *how)
    for number in (-1, 1000):
        with pytest.raises(RuntimeError, match=f"block {number} of a pool of 13"):
            kernel(q, keys[0], torch.full_like(keys[1], number), keys[2], *values, None, 100, *how)
    with pytest.raises(RuntimeError, match="table"):
        kernel(q, keys[0], keys[1].int(), keys[2], *values, None, 100, *how)
