"""Generated attention under the interpreter against the dialect's meaning."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graphopt.ops  # noqa: F401  (registers the dialect)
from graphopt.passes.fuse.form_regions import form_regions
from tests.backends.graphs import run

attention = torch.ops.graphopt.attention

SHAPES = [(2, 4, 20, 20, 16, 16, 4), (1, 4, 1, 33, 16, 16, 2), (1, 8, 70, 70, 8, 24, 2), (1, 6, 5, 130, 20, 20, 1)]
"""batch, heads, queries, keys, head size, value size, KV heads"""


def assert_agrees(*inputs: torch.Tensor, tolerance: float = 1e-4, **settings: Any) -> str:
    def function(*tensors: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = attention(*tensors, scale=0.3, **settings)
        return result

    wide = [t.float() if t.is_floating_point() else t for t in inputs]
    got, compiled = run(function, *inputs, prepare=form_regions)
    assert compiled[0].fallbacks == [] and compiled[0].launches == 1
    want = function(*inputs)
    strides = zip(got.stride(), want.stride(), got.shape, strict=True)
    assert all(mine == eager for mine, eager, size in strides if size != 1)
    torch.testing.assert_close(got.float(), function(*wide), rtol=tolerance, atol=tolerance)
    return compiled[0].source


def operands(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    batch, heads, queries, keys, size, width, kv_heads = shape
    sizes = [(batch, heads, queries, size), (batch, kv_heads, keys, size), (batch, kv_heads, keys, width)]
    return [torch.randn(s).to(dtype) for s in sizes]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"is_causal": True}, {"softcap": 5.0}, {"is_causal": True, "window": 7}],
    ids=["full", "causal", "softcap", "window"],
)
def test_settings(shape: tuple[int, ...], settings: dict[str, Any]) -> None:
    assert_agrees(*operands(shape), **settings)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_masks_broadcast(shape: tuple[int, ...]) -> None:
    batch, _, queries, keys, *_ = shape
    assert_agrees(*operands(shape), torch.rand(batch, 1, queries, keys) > 0.4)
    assert_agrees(*operands(shape), torch.randn(queries, keys))


def test_a_row_that_sees_nothing_is_zero() -> None:
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool)
    mask[..., 3, :] = False
    assert_agrees(*operands((1, 2, 20, 20, 16, 16, 2)), mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_operands(dtype: torch.dtype) -> None:
    assert_agrees(*operands((1, 4, 33, 70, 32, 32, 2), dtype), tolerance=2e-2)


def test_few_queries_read_each_key_once_for_all_heads_of_its_group() -> None:
    source = assert_agrees(*operands((2, 8, 1, 40, 16, 16, 2)))
    assert "cdiv(4, 16) * 4" in source.split("def call", 1)[1]


def test_causal_walk_ends_at_the_diagonal() -> None:
    assert "last_0" in assert_agrees(*operands((1, 2, 200, 200, 16, 16, 2)), is_causal=True)


def test_a_cache_seen_through_views_is_not_copied() -> None:
    def function(q: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        keys = cache.permute(1, 2, 0, 3)
        result: torch.Tensor = attention(q, keys, keys, scale=0.3)
        return result

    q, cache = torch.randn(1, 4, 3, 16), torch.randn(50, 1, 2, 16)
    got, compiled = run(function, q, cache, prepare=form_regions)
    assert compiled[0].launches == 1 and compiled[0].fallbacks == []
    torch.testing.assert_close(got, function(q, cache), rtol=1e-4, atol=1e-4)
