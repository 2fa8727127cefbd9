"""Growing caches: tokens are eager's in everything people do with a cache, and almost nothing is copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from graphopt import counters
from tests.kv import scenarios


def compiled(model: Any, **options: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="graphopt", options={"target": "inductor", **options})
    return model


@pytest.mark.parametrize("scenario", scenarios.SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_tokens_are_those_of_eager(scenario: Callable[[Any], torch.Tensor]) -> None:
    expected = scenario(scenarios.tiny_llama())
    assert torch.equal(scenario(compiled(scenarios.tiny_llama(), strict=True)), expected)


def test_tokens_under_inference_mode() -> None:
    expected = scenarios.greedy(scenarios.tiny_llama())
    with torch.inference_mode():
        assert torch.equal(scenarios.greedy(compiled(scenarios.tiny_llama(), strict=True)), expected)
