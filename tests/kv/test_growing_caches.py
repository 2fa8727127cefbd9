"""Growing caches: tokens are eager's in everything people do with a cache, and almost nothing is copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

from graphopt import counters
from tests.kv import scenarios


def compiled(model: Any, **options: Any) -> Any:
    chosen = {"target": "inductor", **options}
    model.forward = torch.compile(model.forward, backend="graphopt", options=chosen)
    return model


def tiny(model: Any, config: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return model(config(vocab_size=scenarios.VOCABULARY, **sizes, **settings)).eval()


FEW = (scenarios.greedy, scenarios.beams, scenarios.two_continuations, scenarios.assisted)


@pytest.mark.rotate(one_in=2)
@pytest.mark.parametrize(
    "scenario",
    [pytest.param(one, id=one.__name__, marks=() if one in FEW else pytest.mark.slow) for one in scenarios.SCENARIOS],
)
def test_tokens_are_those_of_eager(scenario: Callable[[Any], torch.Tensor]) -> None:
    expected = scenario(scenarios.tiny_llama())
    assert torch.equal(scenario(compiled(scenarios.tiny_llama(), strict=True)), expected)


@pytest.mark.rotate(one_in=2)
def test_lengths_that_are_found_equal_while_tracing() -> None:
    """Each layer's length has a symbol, which attention finds equal to others; inputs must tell the one that stays."""

    def model() -> Gemma2ForCausalLM:
        return tiny(Gemma2ForCausalLM, Gemma2Config, num_hidden_layers=2, head_dim=8)

    expected = scenarios.greedy(model())
    assert torch.equal(scenarios.greedy(compiled(model(), strict=True)), expected)


def test_tokens_under_inference_mode() -> None:
    expected = scenarios.greedy(scenarios.tiny_llama())
    with torch.inference_mode():
        assert torch.equal(scenarios.greedy(compiled(scenarios.tiny_llama(), strict=True)), expected)


def test_two_graphs_for_a_generation_and_one_more_for_other_lengths() -> None:
    model, before = compiled(scenarios.tiny_llama()), counters["graphs"]
    scenarios.greedy(model)
    assert counters["graphs"] - before == 2
    for length in (5, 9, 11, 13, 20):
        model.generate(scenarios.prompt(length), max_new_tokens=6, do_sample=False)
    assert counters["graphs"] - before <= 3


def test_copied_bytes_are_bounded_by_the_cache_not_by_its_square() -> None:
    model, before = compiled(scenarios.tiny_llama()), counters.copy()
    scenarios.greedy(model, tokens=200)
    copied = counters["kv_bytes_copied"] - before["kv_bytes_copied"]
    final = 2 * 207 * 2 * 16 * 4  # keys and values, rows, heads, head size, bytes
    assert 0 < copied < 4 * final
    assert counters["kv_copies"] - before["kv_copies"] < 20


@pytest.mark.slow
def test_sliding_windows_are_not_copied_for_each_token() -> None:
    def model() -> MistralForCausalLM:
        return tiny(MistralForCausalLM, MistralConfig, num_hidden_layers=1, sliding_window=12)

    expected, before = scenarios.greedy(model()), counters["kv_copies"]
    assert torch.equal(scenarios.greedy(compiled(model(), strict=True)), expected)
    assert counters["kv_copies"] - before < 8
