"""Caches of fixed size: written in place, and read no farther than the mask lets anybody see."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import StaticCache

from tests.kv import scenarios

LENGTH = 2048


pytestmark = pytest.mark.usefixtures("cpp_library")


def filled(model: Any) -> tuple[torch.Tensor, StaticCache]:
    """The next token and the cache after an eager prefill."""
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    return scenarios.step(model, scenarios.prompt(), cache)


def mask(used: int) -> torch.Tensor:
    return (torch.arange(LENGTH) < used)[None, None, None]


def decode(forward: Any, token: torch.Tensor, cache: StaticCache, used: int) -> torch.Tensor:
    with torch.no_grad():
        position = torch.tensor([[used - 1]])
        return forward(token, past_key_values=cache, attention_mask=mask(used), position_ids=position).logits


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = torch.ops.graphopt_cpp.attention(q, k, v, allowed, False, 0.25, 0.0, 0)
    return result


def test_tokens_are_those_of_eager() -> None:
    settings = {"max_new_tokens": 20, "do_sample": False, "cache_implementation": "static"}
    expected = scenarios.tiny_llama().generate(scenarios.prompt(), **settings)
    model = scenarios.tiny_llama()
    model.forward = torch.compile(model.forward, backend="graphopt", options={"strict": True})
    assert torch.equal(model.generate(scenarios.prompt(), **settings), expected)


def test_step_writes_in_place_and_reads_only_what_is_used() -> None:
    model = scenarios.tiny_llama()
    token, cache = filled(model)
    token, twin = filled(model)
    expected = decode(model, token, twin, 8)
    for layer in cache.layers:
        # Whoever reads or copies these rows is found out.
        layer.keys[:, :, 8:] = layer.values[:, :, 8:] = math.nan
    addresses = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
    forward = torch.compile(model.forward, backend="graphopt", options={"strict": True})
    torch.testing.assert_close(decode(forward, token, cache, 8), expected)
    assert addresses == [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
    for layer, other in zip(cache.layers, twin.layers, strict=True):
        torch.testing.assert_close(layer.keys[:, :, :8], other.keys[:, :, :8])
        torch.testing.assert_close(layer.values[:, :, :8], other.values[:, :, :8])

    with torch.profiler.profile(profile_memory=True) as profile:
        decode(forward, token, cache, 9)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert allocated < cache.layers[0].keys.nbytes / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_attention_does_not_read_what_the_mask_hides(dtype: torch.dtype, kind: str) -> None:
    q, k, v = (torch.randn(2, heads, rows, 16).to(dtype) for heads, rows in ((4, 3), (2, 90), (2, 90)))
    visible = torch.zeros(2, 1, 3, 90, dtype=torch.bool)
    visible[0, :, :, 11:40] = visible[1, :, :2, 20:61] = True
    allowed = visible if kind == "bool" else torch.where(visible, 0.0, -math.inf).to(dtype)
    expected = attend(q, k, v, allowed)
    for rows in (slice(0, 11), slice(61, 90)):
        k[:, :, rows] = v[:, :, rows] = math.nan
    assert torch.equal(attend(q, k, v, allowed), expected)


def test_large_negative_numbers_do_not_hide() -> None:
    """All keys at the lowest number weigh the same: none of them may be left out."""
    q, k, v = (torch.randn(1, 2, rows, 16) for rows in (1, 40, 40))
    lowest = torch.full((1, 1, 1, 40), torch.finfo(torch.float32).min)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, lowest, scale=0.25)
    torch.testing.assert_close(attend(q, k, v, lowest), expected)


@pytest.mark.parametrize("rows", [2, 20])
def test_nothing_visible_gives_zeros_or_nan(rows: int) -> None:
    q, k, v = (torch.randn(1, 2, count, 16) for count in (rows, 40, 40))
    nothing = torch.zeros(1, 1, rows, 40, dtype=torch.bool)
    assert torch.equal(attend(q, k, v, nothing), torch.zeros_like(q))
    assert torch.ops.graphopt_cpp.attention(q, k, v, nothing, False, 0.25, 0.0, 0, True).isnan().all()
