"""Quantised KV caches in whole models: each step reads what the cache shows, whatever people do with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from graphopt import counters
from graphopt.runtime.kv_quantized import QuantizedCache, part_of
from tests.kv import scenarios


def compiled(model: Any, kind: str, **options: Any) -> Any:
    chosen = {"target": "cpu", "kv_dtype": kind, **options}
    model.forward = torch.compile(model.forward, backend="graphopt", options=chosen)
    return model


def logits_and_cache(forward: Any, tokens: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
    with torch.no_grad():
        output = forward(tokens, past_key_values=cache, use_cache=True)
    return output.logits[:, -1], output.past_key_values


@pytest.mark.parametrize("kind", ["int8", pytest.param("fp8", marks=pytest.mark.slow), "int4"])
def test_decode_reads_what_the_cache_shows(kind: str) -> None:
    """Each step must be eager's on the plain tensors that the quantised cache reads as."""
    model, before = scenarios.tiny_llama(), counters["graphs"]
    eager, forward = model.forward, torch.compile(model.forward, backend="graphopt", options={"kv_dtype": kind})
    tokens = scenarios.prompt(70, batch=2)
    logits, cache = logits_and_cache(forward, tokens, DynamicCache(config=model.config))
    expected, _ = logits_and_cache(eager, tokens, DynamicCache(config=model.config))
    torch.testing.assert_close(logits, expected)  # the first graph attends in full precision
    for index in range(40):
        token = scenarios.prompt(1, batch=2, seed=index)
        assert all(type(layer.keys) is type(layer.values) is QuantizedCache for layer in cache.layers)
        plain = DynamicCache(config=model.config)
        for number, layer in enumerate(cache.layers):
            plain.update(layer.keys.plain(), layer.values.plain(), number)
        expected, _ = logits_and_cache(eager, token, plain)
        logits, cache = logits_and_cache(forward, token, cache)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 110 and counters["graphs"] - before == 2


@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param(one, id=one.__name__, marks=() if one is scenarios.beams else pytest.mark.slow)
        for one in scenarios.SCENARIOS
    ],
)
def test_scenarios_run_and_stay_close(scenario: Callable[[Any], torch.Tensor]) -> None:
    """Their caches are short: nearly all rows are still in full precision, so that the tokens are eager's."""
    expected = scenario(scenarios.tiny_llama())
    assert torch.equal(scenario(compiled(scenarios.tiny_llama(), "int8", strict=True)), expected)


def test_plain_cache_of_an_eager_prefill_is_taken() -> None:
    model = scenarios.tiny_llama()
    token, cache = scenarios.step(model, scenarios.prompt(90), DynamicCache(config=model.config))
    keys = cache.layers[0].keys.clone()
    _, cache = scenarios.step(compiled(model, "int8"), token, cache)
    assert isinstance(cache.layers[0].keys, QuantizedCache)
    assert torch.equal(cache.layers[0].keys[:, :, :90], part_of(keys, "int8", True).read())
