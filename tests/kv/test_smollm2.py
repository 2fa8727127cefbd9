"""SmolLM2 on the CPU kernels: 512 new tokens, in everything people do with a cache, are eager's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from graphopt import counters
from tests.kv import scenarios
from tests.suite.test_real_models import _smollm2

# Minutes for each scenario: 512 steps twice, and beams three times as wide.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

TOKENS = 512
TEXT = (
    "A compiler reads a program and writes another one that does the same work with less effort. The best of them are"
    " patient: they look at every value, ask where it comes from and who will need it, and keep only what matters."
)
EXACTLY = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}


def prompt(length: int = 7, batch: int = 1) -> Tensor:
    ids = torch.tensor(_smollm2(torch.float32)[1](TEXT, add_special_tokens=False)["input_ids"])
    return torch.stack([ids.roll(-5 * row)[:length] for row in range(batch)])


def greedy(model: Any) -> Tensor:
    return model.generate(prompt(), **EXACTLY)


def sampled(model: Any) -> Tensor:
    torch.manual_seed(1)
    return model.generate(prompt(), **{**EXACTLY, "do_sample": True, "top_k": 20})


def beams(model: Any) -> Tensor:
    return model.generate(prompt(), num_beams=3, **EXACTLY)


def assisted(model: Any) -> Tensor:
    return model.generate(prompt(30), prompt_lookup_num_tokens=3, **EXACTLY)


def left_padded(model: Any) -> Tensor:
    tokens, mask = prompt(9, batch=3), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = mask[1, :1] = 0
    return model.generate(tokens, attention_mask=mask, **EXACTLY)


def chunked_prefill(model: Any) -> Tensor:
    return model.generate(prompt(29), prefill_chunk_size=6, **EXACTLY)


def fixed_cache(model: Any) -> Tensor:
    return model.generate(prompt(), cache_implementation="static", **EXACTLY)


def two_continuations(model: Any) -> Tensor:
    token, cache = scenarios.step(model, prompt(), DynamicCache(config=model.config))
    scenarios.follow(model, token, cache, 3)
    other = scenarios.shallow(cache)
    first = scenarios.follow(model, token, cache, TOKENS // 2)
    return torch.cat(first + scenarios.follow(model, token + 1, other, TOKENS // 2), 1)


def crop_then_continue(model: Any) -> Tensor:
    token, cache = scenarios.step(model, prompt(), DynamicCache(config=model.config))
    first = scenarios.follow(model, token, cache, TOKENS // 2)
    cache.crop(-16)
    return torch.cat(first + scenarios.follow(model, token, cache, TOKENS // 2), 1)


def run(scenario: Callable[[Any], Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """The tokens of eager and of the compiled model."""
    model, _ = _smollm2(torch.float32)
    forward = model.forward
    try:
        expected = scenario(model)
        model.forward = torch.compile(forward, backend="graphopt", options={"strict": True, **options})
        return expected, scenario(model)
    finally:
        model.forward = forward


@pytest.mark.parametrize(
    "scenario",
    [
        greedy,
        sampled,
        beams,
        assisted,
        left_padded,
        chunked_prefill,
        fixed_cache,
        two_continuations,
        crop_then_continue,
    ],
)
def test_tokens_are_those_of_eager(scenario: Callable[[Any], Tensor]) -> None:
    expected, got = run(scenario)
    assert got.tolist() == expected.tolist()


def test_graphs_of_one_generation_and_of_other_lengths() -> None:
    model, _ = _smollm2(torch.float32)
    forward, before = model.forward, counters["graphs"]
    model.forward = torch.compile(forward, backend="graphopt")
    try:
        for length, most in ((7, 2), (5, 3), (9, 3), (11, 3), (13, 3), (20, 3)):
            model.generate(prompt(length), max_new_tokens=4, do_sample=False)
            assert counters["graphs"] - before <= most
    finally:
        model.forward = forward
